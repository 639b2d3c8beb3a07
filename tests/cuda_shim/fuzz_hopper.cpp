// fuzz_hopper FIRST COUNT: as fuzz.cpp, Hopper's kernel.
#include "fuzz.h"
#include "hopper_library.cpp"

namespace {

// (rows, columns) of T as the TMA takes them: rows are contiguous, or columns are, aligned to 16 bytes.
template <typename T>
struct Aligned {
  bool transposed;
  int64_t stride;
  std::unique_ptr<T[]> memory;

  Aligned(int64_t rows, int64_t columns, bool transposed) : transposed(transposed) {
    if (transposed) std::swap(rows, columns);
    stride = columns + 8 * upto(2);
    const int64_t count = (rows - 1) * stride + columns;
    memory.reset(new T[count]);
    for (int64_t i = 0; i < count; ++i) round_to(static_cast<float>(upto(6) - 3), memory[i]);
  }
  float at(int64_t i, int64_t j) const { return to_float(memory[transposed ? j * stride + i : i * stride + j]); }
  Matrix matrix() const { return transposed ? Matrix{memory.get(), 1, stride, 0} : Matrix{memory.get(), stride, 1, 0}; }
};

template <typename T>
bool matmul(Arithmetic arithmetic, bool along_q) {
  const int64_t M = 129 + upto(250), P = 8 + 8 * upto(40), Q = 8 + 8 * upto(30), R = 8 + 8 * upto(31);
  const Aligned<T> a(M, Q, false), w(Q, P, along_q), bias(1, P, false);
  const Adapter<T> u(Q, R), v(R, P);
  const int64_t seed = static_cast<int64_t>(draw());
  const auto out = unwritten<T>(M * P), low = unwritten<T>(M * R);
  LoraMatmulArguments given{M,          P,          Q,
                            R,          a.matrix(), w.matrix(),
                            u.matrix(), v.matrix(), upto(1) ? bias.memory.get() : nullptr,
                            0.5f,       !along_q,   draw_dropout(&seed),
                            out.get(),  low.get(),  nullptr,
                            nullptr,    1};
  REQUIRE(hopper_why_not(arithmetic, given) == nullptr);
  const HopperPlan plan = plan_hopper_matmul(arithmetic, given, static_cast<int>(2 + upto(20)));
  Scratch scratch(plan);
  given.slots = scratch.slots.get(), given.counters = scratch.counters.data();
  REQUIRE(launch_hopper_matmul(arithmetic, plan, given, nullptr) == 0);
  REQUIRE(scratch.clean());
  return is_right<T>(arithmetic, given, a, w, u, v);
}

bool run(uint64_t seed) {
  draw.seed(seed);
  shim::Machine::here().turns = {seed, static_cast<int>(2 + upto(9)), static_cast<int>(upto(3))};
  return upto(1) ? matmul<BFloat16>(Arithmetic::kBFloat16, upto(1)) : matmul<Half>(Arithmetic::kHalf, upto(1));
}

}  // namespace

int main(int argc, char** argv) { return fuzz(argc, argv, run); }
