// What fuzzing kernels shares: operands of random strides, each in memory that ends where it does, and the loop over
// draws. Operands are small whole numbers, so that every sum is exact and results are compared bit for bit.
#pragma once

#include "../../csrc/cuda/kernels/dropout.cuh"
#include "launches.h"

using namespace fused_lora::cuda;

namespace {

std::mt19937_64 draw;

int64_t upto(int64_t most) { return static_cast<int64_t>(draw() % (most + 1)); }

// (rows, columns) of T, strided at random: in rows or columns, with gaps, from an unaligned start, repeated.
template <typename T>
struct Drawn {
  std::unique_ptr<T[]> memory;
  T* first;
  int64_t stride_0, stride_1;

  Drawn(int64_t rows, int64_t columns) {
    const int64_t gap = upto(2) == 0 ? 1 + upto(2) : 1;
    const int64_t more = upto(2) * upto(9);
    if (upto(1)) {
      stride_1 = gap, stride_0 = columns * gap + more;
    } else {
      stride_0 = gap, stride_1 = rows * gap + more;
    }
    if (upto(9) == 0) stride_0 = 0;
    const int64_t offset = upto(2) == 0 ? upto(8) : 0;
    const bool empty = rows == 0 || columns == 0;
    const int64_t count = empty ? 0 : (rows - 1) * stride_0 + (columns - 1) * stride_1 + 1;
    memory.reset(new T[offset + count]);
    first = memory.get() + offset;
    for (int64_t i = 0; i < count; ++i) round_to(static_cast<float>(upto(6) - 3), first[i]);
  }

  float at(int64_t i, int64_t j) const { return to_float(first[i * stride_0 + j * stride_1]); }
};

// An adapter's matrix: of the base's type or float32.
template <typename T>
struct Adapter {
  Drawn<T> narrow;
  Drawn<float> wide;
  bool is_float32;

  Adapter(int64_t rows, int64_t columns)
      : narrow(rows, columns), wide(rows, columns), is_float32(sizeof(T) == 2 && upto(1)) {}
  float at(int64_t i, int64_t j) const { return is_float32 ? wide.at(i, j) : narrow.at(i, j); }
  Matrix matrix() const {
    if (is_float32) return {wide.first, wide.stride_0, wide.stride_1, 1};
    return {narrow.first, narrow.stride_0, narrow.stride_1, 0};
  }
};

template <typename T>
Matrix matrix(const Drawn<T>& drawn) {
  return {drawn.first, drawn.stride_0, drawn.stride_1, 0};
}

template <typename T>
bool equal(const T* got, int64_t index, float expected) {
  T rounded;
  round_to(expected, rounded);
  return std::memcmp(got + index, &rounded, sizeof(T)) == 0 || to_float(got[index]) == to_float(rounded);
}

#define REQUIRE(condition)                         \
  if (!(condition)) {                              \
    std::printf("line %d: " #condition, __LINE__); \
    return false;                                  \
  }

// half of the elements are dropped, so that what is kept is doubled exactly
DropoutArguments draw_dropout(const int64_t* seed) {
  if (upto(1)) return {nullptr, 0, 1.0f};
  return {seed, 1 << 15, 2.0f};
}

// Full of NaN: what a kernel does not write is seen.
template <typename T>
std::unique_ptr<T[]> unwritten(int64_t count) {
  std::unique_ptr<T[]> memory(new T[count]);
  std::memset(static_cast<void*>(memory.get()), 0xFF, count * sizeof(T));
  return memory;
}

struct Scratch {
  std::unique_ptr<float[]> slots;
  std::vector<int32_t> counters;

  template <typename AnyPlan>
  explicit Scratch(const AnyPlan& plan) : slots(unwritten<float>(plan.slot_floats)), counters(plan.counters, 0) {}
  bool clean() const {
    return std::all_of(counters.begin(), counters.end(), [](int32_t count) { return count == 0; });
  }
};

// What a launch has written to out and h, by plain loops over operands that know their elements.
template <typename T, typename A, typename W, typename U, typename V>
bool is_right(Arithmetic arithmetic, const LoraMatmulArguments& given, const A& a, const W& w, const U& u, const V& v) {
  const Dropout drops_input(given.dropout, !given.dropout_on_output),
      drops_output(given.dropout, given.dropout_on_output);
  const int64_t M = given.M, P = given.P, Q = given.Q, R = given.R;
  for (int64_t m = 0; m < M; ++m) {
    std::vector<float> h(R);
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t q = 0; q < Q; ++q) {
        if (!drops_input.active || drops_input.keeps(m * Q + q)) h[r] += a.at(m, q) * u.at(q, r);
      }
      T rounded;
      round_to(h[r] * (drops_input.active ? given.dropout.keep_scale : 1.0f), rounded);
      REQUIRE(equal(static_cast<const T*>(given.h), m * R + r, to_float(rounded)));
      h[r] = arithmetic == Arithmetic::kTf32 ? float_of(tf32_bits(to_float(rounded))) : to_float(rounded);
    }
    for (int64_t p = 0; p < P; ++p) {
      float sum = given.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(given.bias)[p]), lora = 0;
      for (int64_t q = 0; q < Q; ++q) sum += a.at(m, q) * w.at(q, p);
      for (int64_t r = 0; r < R; ++r) lora += h[r] * v.at(r, p);
      if (drops_output.active) lora = drops_output.keeps(m * P + p) ? lora * given.dropout.keep_scale : 0.0f;
      REQUIRE(equal(static_cast<const T*>(given.out), m * P + p, sum + given.scale * lora));
    }
  }
  return true;
}

// run FIRST COUNT: so many draws, each from a seed.
template <typename Run>
int fuzz(int argc, char** argv, const Run& run) {
  if (argc != 3) {
    std::printf("usage: FIRST COUNT\n");
    return 2;
  }
  const uint64_t first = std::strtoull(argv[1], nullptr, 10), count = std::strtoull(argv[2], nullptr, 10);
  for (uint64_t seed = first; seed < first + count; ++seed) {
    if (!run(seed)) {
      std::printf(", with seed %llu\n", static_cast<unsigned long long>(seed));
      return 1;
    }
  }
  std::printf("%llu draws are right\n", static_cast<unsigned long long>(count));
  return 0;
}

}  // namespace
