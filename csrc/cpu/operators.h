// The operators on CPU tensors. fused_lora/reference.py says what they compute.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace fused_lora::cpu {

// (out, h)
std::tuple<at::Tensor, at::Tensor> lora_matmul(const at::Tensor& a, const at::Tensor& w, const at::Tensor& u,
                                               const at::Tensor& v, const std::optional<at::Tensor>& bias, double scale,
                                               const std::optional<at::Tensor>& seed, double dropout_p,
                                               bool dropout_on_output);

// (dA, dB)
std::tuple<std::optional<at::Tensor>, std::optional<at::Tensor>> adapter_grad(
    const std::optional<at::Tensor>& x, const std::optional<at::Tensor>& g, const std::optional<at::Tensor>& dy,
    const std::optional<at::Tensor>& h, double scale, const std::optional<at::Tensor>& seed, double dropout_p,
    at::ScalarType dtype_A, at::ScalarType dtype_B);

// (rows, cols) of dtype: 1 / (1 - p) where the mask keeps, 0 elsewhere
at::Tensor dropout_mask(const at::Tensor& seed, int64_t rows, int64_t cols, double dropout_p, at::ScalarType dtype);

}  // namespace fused_lora::cpu
