// What both operators ask of their tensors. Python callers are validated before they come here; direct calls are not.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/accumulate.h>

namespace fused_lora {

inline void check_shape(const char* name, const at::Tensor& tensor, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must be of shape ", shape, ", got ", tensor.sizes());
}

inline void check_dtype(const char* name, const at::Tensor& tensor, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor.scalar_type());
}

inline void check_floating(const char* name, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf, name,
                   " must be float32, float64, bfloat16 or float16, got ", dtype);
}

// (..., C) as (M, C): a view wherever the strides allow it.
inline at::Tensor rows(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.dim() >= 1, name, " must have at least one dimension, got none");
  return tensor.reshape({c10::multiply_integers(tensor.sizes().slice(0, tensor.dim() - 1)), tensor.size(-1)});
}

// tensor *= factor, a tensor itself: mul_(Scalar) rounds its argument to a 16-bit tensor's dtype before it multiplies.
inline at::Tensor& multiply_(at::Tensor& tensor, double factor) {
  return tensor.mul_(at::scalar_tensor(factor, at::kDouble));
}

}  // namespace fused_lora
