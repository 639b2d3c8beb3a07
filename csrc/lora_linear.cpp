// lora_linear with its autograd, on whatever device has the operators below it. The formulas are reference.py's.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "tensors.h"

namespace fused_lora {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Operators, called through the dispatcher, which handles tensors that are not plain.

std::tuple<Tensor, Tensor> lora_matmul(const Tensor& a, const Tensor& w, const Tensor& u, const Tensor& v,
                                       const OptionalTensor& bias, double scale, const OptionalTensor& seed,
                                       double dropout_p, bool dropout_on_output) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fused_lora_native::lora_matmul", "")
                             .typed<decltype(lora_matmul)>();
  return op.call(a, w, u, v, bias, scale, seed, dropout_p, dropout_on_output);
}

std::tuple<OptionalTensor, OptionalTensor> adapter_grad(const OptionalTensor& x, const OptionalTensor& g,
                                                        const OptionalTensor& dy, const OptionalTensor& h, double scale,
                                                        const OptionalTensor& seed, double dropout_p,
                                                        at::ScalarType dtype_A, at::ScalarType dtype_B) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fused_lora_native::adapter_grad", "")
                             .typed<decltype(adapter_grad)>();
  return op.call(x, g, dy, h, scale, seed, dropout_p, dtype_A, dtype_B);
}

Tensor dropout_mask(const Tensor& seed, int64_t rows, int64_t cols, double p, at::ScalarType dtype) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fused_lora_native::dropout_mask", "")
                             .typed<decltype(dropout_mask)>();
  return op.call(seed, rows, cols, p, dtype);
}

OptionalTensor given(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

// What the backward knows besides tensors, and which gradients are wanted.
struct Call {
  double scale, dropout_p;
  bool needs_x, needs_W, needs_A, needs_B, needs_bias;
};

struct Saved {
  Tensor x, weight, lora_A, lora_B, h, seed;
};

struct Gradients {
  Tensor dx, dW, dA, dB, dbias;
};

// One pass for dx, one for dA and dB together.
Gradients gradients(const Tensor& dy, const Saved& saved, const Call& call) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Tensor dy2 = rows("dy", dy);
  const OptionalTensor seed = given(saved.seed);
  Gradients grads;
  Tensor g;
  if (call.needs_x) {
    std::tie(grads.dx, g) = lora_matmul(dy, saved.weight, saved.lora_B, saved.lora_A, std::nullopt, call.scale, seed,
                                        call.dropout_p, /*dropout_on_output=*/true);
  } else if (call.needs_A) {
    g = at::mm(dy2, in_dtype(saved.lora_B, dy.scalar_type()));
  }
  if (call.needs_A || call.needs_B) {
    auto [dA, dB] = adapter_grad(call.needs_A ? given(saved.x) : std::nullopt, given(g),
                                 call.needs_B ? OptionalTensor(dy) : std::nullopt, given(saved.h), call.scale, seed,
                                 call.dropout_p, saved.lora_A.scalar_type(), saved.lora_B.scalar_type());
    grads.dA = dA.value_or(Tensor());
    grads.dB = dB.value_or(Tensor());
  }
  if (call.needs_W) {
    grads.dW = at::mm(dy2.t(), rows("x", saved.x));
  }
  if (call.needs_bias) {
    grads.dbias = dy2.sum(0);
  }
  return grads;
}

// reference.eager_backward: of differentiable operations alone, for second derivatives and for whoever watches
// operations. dh: (M, R), the gradient that reaches h from elsewhere.  dy or dh may be undefined.
Gradients differentiable_gradients(const Tensor& dy, const Tensor& dh, const Saved& saved, const Call& call,
                                   at::IntArrayRef x_shape) {
  const auto dtype = saved.weight.scalar_type();
  const Tensor A = saved.lora_A.to(dtype), B = saved.lora_B.to(dtype);
  Gradients grads;
  Tensor total_dh = dh, dx;
  if (dy.defined()) {
    const Tensor dy2 = rows("dy", dy);
    const Tensor g = at::mm(dy2, B).mul(call.scale);
    total_dh = dh.defined() ? g.add(dh) : g;
    if (call.needs_x) {
      dx = at::mm(dy2, saved.weight);
    }
    if (call.needs_W) {
      grads.dW = at::mm(dy2.t(), rows("x", saved.x));
    }
    if (call.needs_B) {
      grads.dB = at::mm(dy2.t(), saved.h).mul(call.scale).to(saved.lora_B.scalar_type());
    }
    if (call.needs_bias) {
      grads.dbias = dy2.sum(0);
    }
  }
  const auto dropped = [&](const Tensor& tensor) {
    if (!saved.seed.defined()) {
      return tensor;
    }
    const auto wide = c10::promoteTypes(dtype, at::kFloat);
    return tensor.mul(dropout_mask(saved.seed, tensor.size(0), tensor.size(1), call.dropout_p, wide)).to(dtype);
  };
  if (call.needs_x) {
    const Tensor lora_dx = dropped(at::mm(total_dh, A));
    grads.dx = (dx.defined() ? dx.add(lora_dx) : lora_dx).view(x_shape);
  }
  if (call.needs_A) {
    grads.dA = at::mm(total_dh.t(), dropped(rows("x", saved.x))).to(saved.lora_A.scalar_type());
  }
  return grads;
}

// (y, h). h is an output, not a hidden intermediate, so that a second derivative finds its way through it.
struct LoRALinear : torch::autograd::Function<LoRALinear> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& lora_A,
                               const Tensor& lora_B, const OptionalTensor& bias, double scale,
                               const OptionalTensor& seed, double dropout_p) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, h] =
        lora_matmul(x, transposed(weight), transposed(lora_A), transposed(lora_B), bias, scale, seed, dropout_p, false);
    ctx->set_materialize_grads(false);
    // what the wanted gradients need, and nothing else; the parameters are alive anyway
    const bool keeps_x = lora_A.requires_grad() || weight.requires_grad(), keeps_h = lora_B.requires_grad();
    ctx->save_for_backward(
        {keeps_x ? x : Tensor(), weight, lora_A, lora_B, keeps_h ? h : Tensor(), seed.value_or(Tensor())});
    ctx->saved_data.reserve(4);
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["x_shape"] = x.sizes();
    ctx->saved_data["has_bias"] = bias.has_value();
    return {y, h};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor &dy = grads[0], &dh = grads[1];
    variable_list results(8);
    if (!dy.defined() && !dh.defined()) {
      return results;
    }
    // everything is in the compute dtype already; backward may run under another autocast than forward did
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const variable_list tensors = ctx->get_saved_variables();
    const Saved saved{tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], tensors[5]};
    const Call call{ctx->saved_data["scale"].toDouble(),
                    ctx->saved_data["dropout_p"].toDouble(),
                    ctx->needs_input_grad(0),
                    ctx->needs_input_grad(1),
                    ctx->needs_input_grad(2),
                    ctx->needs_input_grad(3),
                    ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(4)};
    // grad mode is on inside backward exactly when create_graph was asked for
    const bool plain = dy.defined() && !dh.defined() && !at::GradMode::is_enabled() &&
                       !c10::impl::TorchDispatchModeTLS::any_modes_set();
    const Gradients found =
        plain ? gradients(dy, saved, call)
              : differentiable_gradients(dy, dh, saved, call, ctx->saved_data["x_shape"].toIntVector());
    results[0] = found.dx;
    results[1] = found.dW;
    results[2] = found.dA;
    results[3] = found.dB;
    results[4] = found.dbias;
    return results;
  }
};

bool requires_grad(const OptionalTensor& tensor) { return tensor && tensor->requires_grad(); }

Tensor lora_linear_without_grad(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                                const OptionalTensor& bias, double scale, const OptionalTensor& seed,
                                double dropout_p) {
  return std::get<0>(
      lora_matmul(x, transposed(weight), transposed(lora_A), transposed(lora_B), bias, scale, seed, dropout_p, false));
}

Tensor lora_linear(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                   const OptionalTensor& bias, double scale, const OptionalTensor& seed, double dropout_p) {
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight must be of shape (N, K), got ", weight.sizes());
  TORCH_CHECK_VALUE(lora_A.dim() == 2, "lora_A must be of shape (R, K), got ", lora_A.sizes());
  TORCH_CHECK_VALUE(lora_B.dim() == 2, "lora_B must be of shape (N, R), got ", lora_B.sizes());
  // whoever calls has made autocast's casts
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  if (at::GradMode::is_enabled() && (lora_A.requires_grad() || lora_B.requires_grad() || x.requires_grad() ||
                                     weight.requires_grad() || requires_grad(bias))) {
    return LoRALinear::apply(x, weight, lora_A, lora_B, bias, scale, seed, dropout_p)[0];
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return lora_linear_without_grad(x, weight, lora_A, lora_B, bias, scale, seed, dropout_p);
}

}  // namespace
}  // namespace fused_lora

TORCH_LIBRARY_IMPL(fused_lora_native, Autograd, m) { m.impl("lora_linear", &fused_lora::lora_linear); }

TORCH_LIBRARY_IMPL(fused_lora_native, CompositeExplicitAutograd, m) {
  m.impl("lora_linear", &fused_lora::lora_linear_without_grad);
}
