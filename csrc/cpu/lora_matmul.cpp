#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include "../tensors.h"
#include "dropout.h"
#include "operators.h"

namespace fused_lora::cpu {
namespace {

void check_operands(const at::Tensor& a2, const at::Tensor& w, const at::Tensor& u, const at::Tensor& v,
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

// D(a) u
at::Tensor dropped_product(const at::Tensor& a, const at::Tensor& u, const Dropout& dropout) {
  at::Tensor thin = at::empty({a.size(0), u.size(1)}, a.options());
  for_row_blocks(a, [&](int64_t first, int64_t count, const at::Tensor& dropped) {
    dropout.apply(a.narrow(0, first, count), first, dropped);
    at::Tensor block = thin.narrow(0, first, count);
    at::mm_out(block, dropped, u);
  });
  return multiply_(thin, dropout.keep_scale());
}

// out += scale · D'(thin v)
void add_dropped_product(const at::Tensor& out, const at::Tensor& thin, const at::Tensor& v, double scale,
                         const Dropout& dropout) {
  for_row_blocks(out, [&](int64_t first, int64_t count, at::Tensor product) {
    at::mm_out(product, thin.narrow(0, first, count), v);
    dropout.apply(product, first, product);
    out.narrow(0, first, count).add_(product, scale * dropout.keep_scale());
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> lora_matmul(const at::Tensor& a, const at::Tensor& w, const at::Tensor& u,
                                               const at::Tensor& v, const std::optional<at::Tensor>& bias, double scale,
                                               const std::optional<at::Tensor>& seed, double dropout_p,
                                               bool dropout_on_output) {
  // autograd is the caller's: fused_lora/functional.py
  const at::AutoDispatchBelowADInplaceOrView guard;
  const at::Tensor a2 = rows("a", a);
  check_operands(a2, w, u, v, bias);
  const std::optional<Dropout> dropout = seed ? std::make_optional<Dropout>(*seed, dropout_p) : std::nullopt;
  const at::Tensor u2 = u.to(a.scalar_type()), v2 = v.to(a.scalar_type());

  auto shape = a.sizes().vec();
  shape.back() = w.size(1);
  const at::Tensor out = at::empty(shape, a.options());
  at::Tensor out2 = out.view({a2.size(0), w.size(1)});
  if (bias) {
    at::addmm_out(out2, *bias, a2, w);
  } else {
    at::mm_out(out2, a2, w);
  }

  const at::Tensor thin = dropout && !dropout_on_output ? dropped_product(a2, u2, *dropout) : at::mm(a2, u2);
  if (dropout && dropout_on_output) {
    add_dropped_product(out2, thin, v2, scale, *dropout);
  } else {
    out2.addmm_(thin, v2, /*beta=*/1, /*alpha=*/scale);
  }
  return {out, thin};
}

}  // namespace fused_lora::cpu
