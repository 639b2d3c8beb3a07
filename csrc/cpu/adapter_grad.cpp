#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "../tensors.h"
#include "dropout.h"
#include "operators.h"

namespace fused_lora::cpu {
namespace {

// scale · lowᵀ wide: (R, C)
at::Tensor product(const at::Tensor& low, const at::Tensor& wide, double scale) {
  at::Tensor grad = at::mm(low.t(), wide);
  return multiply_(grad, scale);
}

// scale · lowᵀ D(wide): (R, C); 16-bit blocks are summed in float32
at::Tensor dropped_product(const at::Tensor& low, const at::Tensor& wide, double scale, const Dropout& dropout) {
  const auto dtype = c10::promoteTypes(wide.scalar_type(), at::kFloat);
  at::Tensor grad = at::zeros({low.size(1), wide.size(1)}, wide.options().dtype(dtype));
  for_row_blocks(wide, [&](int64_t first, int64_t count, const at::Tensor& dropped) {
    dropout.apply(wide.narrow(0, first, count), first, dropped);
    grad.add_(at::mm(low.narrow(0, first, count).t(), dropped));
  });
  return multiply_(grad, scale * dropout.keep_scale());
}

}  // namespace

std::tuple<std::optional<at::Tensor>, std::optional<at::Tensor>> adapter_grad(
    const std::optional<at::Tensor>& x, const std::optional<at::Tensor>& g, const std::optional<at::Tensor>& dy,
    const std::optional<at::Tensor>& h, double scale, const std::optional<at::Tensor>& seed, double dropout_p,
    at::ScalarType dtype_A, at::ScalarType dtype_B) {
  // autograd is the caller's: fused_lora/functional.py
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_floating("dtype_A", dtype_A);
  check_floating("dtype_B", dtype_B);
  std::optional<at::Tensor> dA, dB;
  if (x && g) {
    const at::Tensor x2 = rows("x", *x);
    check_low_rank("g", *g, "x", x2);
    dA = seed ? dropped_product(*g, x2, scale, Dropout(*seed, dropout_p)) : product(*g, x2, scale);
    dA = dA->to(dtype_A);
  }
  if (dy && h) {
    const at::Tensor dy2 = rows("dy", *dy);
    check_low_rank("h", *h, "dy", dy2);
    // hᵀ dy, not dyᵀ h: the narrow matrix on the left is the faster product
    dB = product(*h, dy2, scale).t().to(dtype_B).contiguous();
  }
  return {dA, dB};
}

}  // namespace fused_lora::cpu
