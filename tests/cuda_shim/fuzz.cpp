// fuzz FIRST COUNT: the kernels on operands of random sizes, strides and offsets against plain loops. For the
// sanitizers: what is read or written beyond an operand, they see.
#include "fuzz.h"

#include "adapter_grad.cu"
#include "lora_matmul.cu"

namespace {

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
  const LoraMatmulArguments given{M,
                                  P,
                                  Q,
                                  R,
                                  matrix(a),
                                  matrix(w),
                                  u.matrix(),
                                  v.matrix(),
                                  with_bias ? bias.first : nullptr,
                                  scale,
                                  on_output,
                                  dropout,
                                  out.get(),
                                  low.get(),
                                  scratch.slots.get(),
                                  scratch.counters.data(),
                                  plan.split};
  REQUIRE(launch_lora_matmul(arithmetic, plan, given, nullptr) == 0);
  REQUIRE(scratch.clean());
  return is_right<T>(arithmetic, given, a, w, u, v);
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

int main(int argc, char** argv) { return fuzz(argc, argv, run); }
