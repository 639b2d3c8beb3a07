// fuzz FIRST COUNT: the kernels on operands of random sizes, strides and offsets, each in memory that ends where the
// operand does, against plain loops. Operands are small whole numbers, so that every sum is exact and results are
// compared bit for bit. For the sanitizers: what is read or written beyond an operand, they see.
#include "adapter_grad.cu"
#include "lora_matmul.cu"

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

  explicit Scratch(const Plan& plan) : slots(unwritten<float>(plan.slot_floats)), counters(plan.counters, 0) {}
  bool clean() const {
    return std::all_of(counters.begin(), counters.end(), [](int32_t count) { return count == 0; });
  }
};

template <typename T>
bool matmul(Arithmetic arithmetic, int sms) {
  const int64_t M = upto(1) ? upto(17) : upto(150), P = upto(150), Q = upto(300), R = upto(80);
  const Drawn<T> a(M, Q), w(Q, P), bias(1, P);
  const Adapter<T> u(Q, R), v(R, P);
  const int64_t seed = static_cast<int64_t>(draw());
  const DropoutArguments dropout = draw_dropout(&seed);
  const bool on_output = upto(1), with_bias = upto(1) && (bias.stride_1 == 1 || P < 2);
  const float scale = 0.5f;
  const Plan plan = plan_lora_matmul(arithmetic, M, P, Q, R, sms);
  Scratch scratch(plan);
  const auto out = unwritten<T>(M * P), low = unwritten<T>(M * R);
  if (M * (P + R) == 0) return true;
  REQUIRE(launch_lora_matmul(
              arithmetic, plan,
              {M, P, Q, R, matrix(a), matrix(w), u.matrix(), v.matrix(), with_bias ? bias.first : nullptr, scale,
               on_output, dropout, out.get(), low.get(), scratch.slots.get(), scratch.counters.data(), plan.split},
              nullptr) == 0);
  REQUIRE(scratch.clean());
  const Dropout drops_input(dropout, !on_output), drops_output(dropout, on_output);
  for (int64_t m = 0; m < M; ++m) {
    std::vector<float> h(R);
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t q = 0; q < Q; ++q) {
        if (!drops_input.active || drops_input.keeps(m * Q + q)) h[r] += a.at(m, q) * u.at(q, r);
      }
      T rounded;
      round_to(h[r] * (drops_input.active ? dropout.keep_scale : 1.0f), rounded);
      REQUIRE(equal(low.get(), m * R + r, to_float(rounded)));
      h[r] = arithmetic == Arithmetic::kTf32 ? float_of(tf32_bits(to_float(rounded))) : to_float(rounded);
    }
    for (int64_t p = 0; p < P; ++p) {
      float sum = with_bias ? bias.at(0, p) : 0.0f, lora = 0;
      for (int64_t q = 0; q < Q; ++q) sum += a.at(m, q) * w.at(q, p);
      for (int64_t r = 0; r < R; ++r) lora += h[r] * v.at(r, p);
      if (drops_output.active) lora = drops_output.keeps(m * P + p) ? lora * dropout.keep_scale : 0.0f;
      REQUIRE(equal(out.get(), m * P + p, sum + scale * lora));
    }
  }
  return true;
}

template <typename T>
bool gradient(Arithmetic arithmetic, int sms) {
  const int64_t M = upto(1) ? upto(17) : upto(400), K = upto(3) == 0 ? 0 : upto(200), N = upto(200), R = upto(80);
  const Drawn<T> x(M, K), dy(M, N), g(M, R), h(M, R);
  const int64_t seed = static_cast<int64_t>(draw());
  const DropoutArguments dropout = draw_dropout(&seed);
  const Plan plan = plan_adapter_grad(arithmetic, M, K, N, R, sms);
  Scratch scratch(plan);
  const auto dA = unwritten<T>(R * K);
  const auto dB = unwritten<float>(N * R);
  if (R * (K + N) == 0) return true;
  const float scale = 0.5f;
  REQUIRE(launch_adapter_grad(arithmetic,
                              {M,
                               R,
                               {matrix(x), matrix(g), K, 1, dA.get(), K, 1, sizeof(T) == 4},
                               {matrix(dy), matrix(h), N, 0, dB.get(), 1, R, 1},
                               scale,
                               dropout,
                               scratch.slots.get(),
                               scratch.counters.data(),
                               plan.split},
                              nullptr) == 0);
  REQUIRE(scratch.clean());
  const Dropout drops(dropout, true);
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t k = 0; k < K; ++k) {
      float sum = 0;
      for (int64_t m = 0; m < M; ++m) {
        if (!drops.active || drops.keeps(m * K + k)) sum += x.at(m, k) * g.at(m, r);
      }
      REQUIRE(equal(dA.get(), r * K + k, sum * scale * (drops.active ? dropout.keep_scale : 1.0f)));
    }
    for (int64_t n = 0; n < N; ++n) {
      float sum = 0;
      for (int64_t m = 0; m < M; ++m) sum += dy.at(m, n) * h.at(m, r);
      REQUIRE(equal(dB.get(), n * R + r, sum * scale));
    }
  }
  return true;
}

template <typename T>
bool both(Arithmetic arithmetic) {
  const int sms = static_cast<int>(1 + upto(30));
  return matmul<T>(arithmetic, sms) && gradient<T>(arithmetic, sms);
}

bool run(uint64_t seed) {
  draw.seed(seed);
  shim::Machine::here().turns = {seed, static_cast<int>(1 + upto(9)), static_cast<int>(upto(3))};
  const auto arithmetic = static_cast<Arithmetic>(upto(3));
  if (arithmetic == Arithmetic::kBFloat16) return both<BFloat16>(arithmetic);
  if (arithmetic == Arithmetic::kHalf) return both<Half>(arithmetic);
  return both<float>(arithmetic);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::printf("usage: fuzz FIRST COUNT\n");
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
