// 16-bit copies of adapters that the TMA cannot read as they are: float32 over a 16-bit base, or strides that it does
// not take. Adapters are thin, so a copy is small beside the product that follows.
//
// They are made in each pass and not kept for a version of the parameter: a write through .data, as optimizers and
// loaders make it, does not move the version counter, and a kept copy would silently serve the weights before it.
#pragma once

#include "../kernels/launches.h"
#include "hopper.cuh"

namespace fused_lora::cuda::hopper {

// rows × columns, contiguous, at `to`; null: not wanted.  Element (i, j) of it is from's at i · stride_0 + j ·
// stride_1.
struct Copy {
  Matrix from;
  void* to;
  int64_t rows, columns;

  __host__ __device__ int64_t elements() const { return to == nullptr ? 0 : rows * columns; }
};

struct Copies {
  Copy u, v;
};

constexpr int COPY_THREADS = 256, COPIED_BY_THREAD = 8;

template <typename Element>
__device__ void copy(const Copy& copy) {
  auto* to = static_cast<Element*>(copy.to);
  const int64_t step = static_cast<int64_t>(block_count()) * COPY_THREADS;
  for (int64_t at = block_index() * COPY_THREADS + thread_index(); at < copy.elements(); at += step) {
    const int64_t from = at / copy.columns * copy.from.stride_0 + at % copy.columns * copy.from.stride_1;
    if (copy.from.is_float32) {
      round_to(static_cast<const float*>(copy.from.data)[from], to[at]);
    } else {
      to[at] = static_cast<const Element*>(copy.from.data)[from];
    }
  }
}

template <typename Element>
__global__ void __launch_bounds__(COPY_THREADS) copy_adapters(const Copies copies) {
  copy<Element>(copies.u);
  copy<Element>(copies.v);
}

template <typename Element>
int launch_copies(const Copies& copies, void* stream) {
  const int64_t elements = copies.u.elements() + copies.v.elements();
  if (elements == 0) return 0;
  const int64_t blocks = (elements + COPY_THREADS * COPIED_BY_THREAD - 1) / (COPY_THREADS * COPIED_BY_THREAD);
  return launch(copy_adapters<Element>, static_cast<int>(blocks), COPY_THREADS, 0, stream, copies);
}

}  // namespace fused_lora::cuda::hopper
