#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

#include "../tensors.h"
#include "dropout.h"
#include "operators.h"
#include "small_m.h"

namespace fused_lora::cpu {
namespace {

// Whether float32 products should be oneDNN's: PyTorch's own come from MKL, which is at its best on Intel alone.
bool onednn_is_faster() {
#ifdef __x86_64__
  static const bool faster = at::hasMKL() && __builtin_cpu_is("amd");
  return faster;
#else
  return false;
#endif
}

// a w without autograd by the operator of oneDNN's that inductor calls; undefined where PyTorch has none.
at::Tensor onednn_product(const at::Tensor& a, const at::Tensor& w) {
  static const auto op = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  if (!op) {
    return {};
  }
  torch::jit::Stack stack{a, w.t(), c10::IValue(), "none", c10::List<std::optional<at::Scalar>>(), ""};
  op->callBoxed(stack);
  return stack.front().toTensor();
}

// a w + bias: (M, P). a2 is a as (M, Q). The forward is the product that nn.Linear makes, which depends on a's shape
// and strides, so that a fresh adapter changes no bit of it; the input gradient is free to take the faster library.
at::Tensor base_product(const at::Tensor& a, const at::Tensor& a2, const at::Tensor& w,
                        const std::optional<at::Tensor>& bias, bool is_input_gradient) {
  // at::linear makes products of matrices of these too
  const bool of_matrices = a.dim() == 2 || (a.dim() == 3 && a.is_contiguous());
  if (!is_input_gradient && !of_matrices) {
    return at::linear(a, transposed(w), bias).reshape({a2.size(0), w.size(1)});
  }
  if (bias) {
    return at::addmm(*bias, a2, w);
  }
  if (is_input_gradient && a.scalar_type() == at::kFloat && onednn_is_faster()) {
    if (at::Tensor out = onednn_product(a2, w); out.defined()) {
      return out;
    }
  }
  return at::mm(a2, w);
}

// D(a) u
at::Tensor dropped_product(const at::Tensor& a, const at::Tensor& u, const Dropout& dropout) {
  at::Tensor h = at::empty({a.size(0), u.size(1)}, a.options());
  for_row_blocks(a, [&](int64_t first, int64_t count, const at::Tensor& dropped) {
    dropout.apply(a.narrow(0, first, count), first, dropped);
    at::Tensor block = h.narrow(0, first, count);
    at::mm_out(block, dropped, u);
  });
  return multiply_(h, dropout.keep_scale());
}

// out += scale · D'(h v)
void add_dropped_product(const at::Tensor& out, const at::Tensor& h, const at::Tensor& v, double scale,
                         const Dropout& dropout) {
  for_row_blocks(out, [&](int64_t first, int64_t count, at::Tensor product) {
    at::mm_out(product, h.narrow(0, first, count), v);
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
  check_matmul_operands(a2, w, u, v, bias);
  const std::optional<Dropout> dropout = seed ? std::make_optional<Dropout>(*seed, dropout_p) : std::nullopt;
  const at::Tensor u2 = in_dtype(u, a.scalar_type()), v2 = in_dtype(v, a.scalar_type());

  const at::Tensor h = dropout && !dropout_on_output ? dropped_product(a2, u2, *dropout) : at::mm(a2, u2);
  at::Tensor out;
  if (dropout && dropout_on_output) {
    out = base_product(a, a2, w, bias, dropout_on_output);
    add_dropped_product(out, h, v2, scale, *dropout);
  } else if (is_for_small_m(a2, w)) {
    out = at::empty({a2.size(0), w.size(1)}, a2.options());
    small_m_product(out, a2, w, h, v2, bias, scale);
  } else {
    out = base_product(a, a2, w, bias, dropout_on_output);
    out.addmm_(h, v2, /*beta=*/1, /*alpha=*/scale);
  }
  if (a.dim() != 2) {
    auto shape = a.sizes().vec();
    shape.back() = w.size(1);
    // a tensor of its own, not a view: autograd is not watching here
    out = out.view(shape);
  }
  return {out, h};
}

}  // namespace fused_lora::cpu
