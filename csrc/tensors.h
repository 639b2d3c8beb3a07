// What both operators ask of their tensors. Python callers are validated before they come here; direct calls are not.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/accumulate.h>

#include <optional>

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

// (..., C) as (M, C): a view wherever the strides allow it, and a matrix itself.
inline at::Tensor rows(const char* name, const at::Tensor& tensor) {
  if (tensor.dim() == 2) return tensor;
  TORCH_CHECK_VALUE(tensor.dim() >= 1, name, " must have at least one dimension, got none");
  return tensor.reshape({c10::multiply_integers(tensor.sizes().slice(0, tensor.dim() - 1)), tensor.size(-1)});
}

// The tensor itself where it has this dtype: the dispatcher takes as long to say so as a small product.
inline at::Tensor in_dtype(const at::Tensor& tensor, at::ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : tensor.to(dtype);
}

// A matrix's transpose, past the dispatcher where strides describe it. For what runs below autograd.
inline at::Tensor transposed(const at::Tensor& matrix) {
  const bool is_plain = matrix.dim() == 2 && matrix.layout() == at::kStrided && (matrix.is_cpu() || matrix.is_cuda());
  if (!is_plain) return matrix.t();
  return at::native::as_strided_tensorimpl(matrix, {matrix.size(1), matrix.size(0)},
                                           {matrix.stride(1), matrix.stride(0)});
}

// lora_matmul's, a as (M, Q).
inline void check_matmul_operands(const at::Tensor& a2, const at::Tensor& w, const at::Tensor& u, const at::Tensor& v,
                                  const std::optional<at::Tensor>& bias) {
  check_floating("a", a2.scalar_type());
  check_floating("u", u.scalar_type());
  check_floating("v", v.scalar_type());
  check_dtype("w", w, a2.scalar_type());
  TORCH_CHECK_VALUE(w.dim() == 2, "w must be of shape (Q, P), got ", w.sizes());
  TORCH_CHECK_VALUE(u.dim() == 2, "u must be of shape (Q, R), got ", u.sizes());
  check_shape("w", w, {a2.size(1), w.size(1)});
  check_shape("u", u, {a2.size(1), u.size(1)});
  check_shape("v", v, {u.size(1), w.size(1)});
  if (bias) {
    check_dtype("bias", *bias, a2.scalar_type());
    check_shape("bias", *bias, {w.size(1)});
  }
}

// low: (M, R), of wide's rows and dtype; wide: (M, C).
inline void check_low_rank(const char* low_name, const at::Tensor& low, const char* wide_name, const at::Tensor& wide) {
  check_floating(wide_name, wide.scalar_type());
  check_dtype(low_name, low, wide.scalar_type());
  TORCH_CHECK_VALUE(low.dim() == 2, low_name, " must be of shape (M, R), got ", low.sizes());
  check_shape(low_name, low, {wide.size(0), low.size(1)});
}

// tensor *= factor, a tensor itself: mul_(Scalar) rounds its argument to a 16-bit tensor's dtype before it multiplies.
inline at::Tensor& multiply_(at::Tensor& tensor, double factor) {
  return tensor.mul_(at::scalar_tensor(factor, at::kDouble));
}

}  // namespace fused_lora
