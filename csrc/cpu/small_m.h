// The product for small M, the LoRA carried along: W is read once, and little else is read at all.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace fused_lora::cpu {

// Whether small_m_product is right and faster than PyTorch's products for a (M, Q) and w (Q, P): as
// measured, see small_m.cpp.
bool is_for_small_m(const at::Tensor& a, const at::Tensor& w);

// out = a w + scale · h v + bias, summed in float32 and rounded once. Each element is summed in an order of its own,
// which neither threads nor the other rows change.
// a: (M, Q).  w: (Q, P), its rows or its columns contiguous.  h: (M, R).  v: (R, P).  bias: (P,).
// out: (M, P), contiguous.  All of one dtype, float32 or bfloat16.
void small_m_product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& w, const at::Tensor& h,
                     const at::Tensor& v, const std::optional<at::Tensor>& bias, double scale);

}  // namespace fused_lora::cpu
