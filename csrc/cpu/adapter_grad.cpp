#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "../tensors.h"
#include "dropout.h"
#include "operators.h"

namespace fused_lora::cpu {
namespace {

// elements of dy up to which the slower product takes less than to transpose the faster one's result
constexpr int64_t kSmall = 1 << 14;

// scale · aᵀ b, contiguous
at::Tensor product(const at::Tensor& a, const at::Tensor& b, double scale) {
  at::Tensor grad = at::empty({a.size(1), b.size(1)}, b.options());
  // beta 0: nothing is read there, and the product itself is what is scaled
  return at::addmm_out(grad, grad, transposed(a), b, /*beta=*/0, /*alpha=*/scale);
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
    dA = in_dtype(*dA, dtype_A);
  }
  if (dy && h) {
    const at::Tensor dy2 = rows("dy", *dy);
    check_low_rank("h", *h, "dy", dy2);
    // hᵀ dy, not dyᵀ h: the narrow matrix on the left is the faster product
    dB = dy2.numel() <= kSmall ? product(dy2, *h, scale) : transposed(product(*h, dy2, scale));
    dB = in_dtype(*dB, dtype_B).contiguous();
  }
  return {dA, dB};
}

}  // namespace fused_lora::cpu
