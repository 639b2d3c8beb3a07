// What a launch is told, in plain C++: no header of PyTorch or CUDA, so that nvcc and a host compiler both take it.
// reference.py says what the operators compute; its symbols are used here.
#pragma once

#include <cstdint>

namespace fused_lora::cuda {

// exact: float32 products in float32.  tf32: on tensor cores, which round their operands to 10 bits of fraction.
enum class Arithmetic : int32_t { kBFloat16, kHalf, kExact, kTf32 };

constexpr int64_t element_bytes(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::kExact || arithmetic == Arithmetic::kTf32 ? 4 : 2;
}

// Element (i, j) is at data[i · stride_0 + j · stride_1].
// is_float32: float32 that is rounded to the arithmetic's type as it is read; an adapter's over a 16-bit base.
struct Matrix {
  const void* data;
  int64_t stride_0, stride_1;
  int32_t is_float32;
};

// seed: on the device, null for no dropout.  threshold, keep_scale: dropout.dropout_threshold and keep_scale.
struct DropoutArguments {
  const int64_t* seed;
  int32_t threshold;
  float keep_scale;
};

// How M, P and Q are cut. Nothing of it depends on values, so a result has the same bits every time.
struct Plan {
  int32_t small_m;      // tiles for at most 16 tokens
  int32_t split;        // parts of the contraction, each in a program of its own
  int32_t counters;     // int32 zeros that the launch needs, and leaves zero
  int64_t slot_floats;  // float32 scratch, in which the parts are kept until the last has come
};

struct LoraMatmulArguments {
  int64_t M, P, Q, R;
  Matrix a, w, u, v;  // (M, Q), (Q, P), (Q, R), (R, P)
  const void* bias;   // (P,) or null
  float scale;
  int32_t dropout_on_output;
  DropoutArguments dropout;
  void* out;          // (M, P), contiguous
  void* h;            // (M, R), contiguous
  float* slots;       // Plan::slot_floats
  int32_t* counters;  // Plan::counters; no other launch may use them meanwhile
  int32_t split;      // Plan::split
};

// One of the two gradients: scale · lowᵀ wide, contracted over M.
struct Reduction {
  Matrix wide, low;  // (M, columns), (M, R)
  int64_t columns;   // 0: not asked for
  int32_t has_dropout;
  void* out;  // element (r, column) is at out[r · stride_r + column · stride_column]
  int64_t stride_r, stride_column;
  int32_t out_is_float32;
};

struct AdapterGradArguments {
  int64_t M, R;
  Reduction dA, dB;
  float scale;
  DropoutArguments dropout;
  float* slots;
  int32_t* counters;
  int32_t split;
};

Plan plan_lora_matmul(Arithmetic arithmetic, int64_t M, int64_t P, int64_t Q, int64_t R, int32_t sms);
Plan plan_adapter_grad(Arithmetic arithmetic, int64_t M, int64_t K, int64_t N, int64_t R, int32_t sms);

// One launch on stream, a cudaStream_t, of the current device. Returns a cudaError_t.
int launch_lora_matmul(Arithmetic arithmetic, const Plan& plan, const LoraMatmulArguments& arguments, void* stream);
int launch_adapter_grad(Arithmetic arithmetic, const AdapterGradArguments& arguments, void* stream);

}  // namespace fused_lora::cuda
