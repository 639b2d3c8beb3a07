// csrc/cuda/device/wgmma.cuh for a host compiler: every width at once, by the definition in the PTX ISA (products.h).
#pragma once

#include "hopper.cuh"

namespace fused_lora::cuda {

template <typename Element>
float element(uint16_t bits) {
  return to_float(Element{bits});
}

template <int N, typename Element, bool B_TRANSPOSED, bool A_TRANSPOSED = false>
struct Wgmma {
  static_assert(N % 16 == 0 && N <= 256, "a width that tools/wgmma.py can write");

  static void multiply(float (&acc)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    products().issue(me(), {a, b, N, A_TRANSPOSED, B_TRANSPOSED, accumulate, element<Element>}, acc, nullptr);
  }
  static void multiply_registers(float (&acc)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    products().issue(me(), {0, b, N, false, B_TRANSPOSED, accumulate, element<Element>}, acc, a);
  }
};

}  // namespace fused_lora::cuda
