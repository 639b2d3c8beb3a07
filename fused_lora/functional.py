"""``lora_linear``: validate, choose an implementation, autograd. The mathematics is in ``reference.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, composed, ops, plans, reference, validation
from .backends import LayerPass, native
from .dropout import dropout_mask, dropout_threshold, whole_mask
from .torch_internals import autocast_dtype, dispatch_modes, exports, in_forward_ad, in_functorch, is_tracing


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    impl: str = "auto",
) -> Tensor:
    """``x Wᵀ + scale · (D(x) Aᵀ) Bᵀ + bias``, with gradients for x, A, B and bias, and none for a frozen W.

    Args:
        x: (..., K), of any leading shape, strided or not, empty too; the weight's dtype.
        weight: (N, K), float16, bfloat16, float32 or float64. While it is frozen (``requires_grad=False``) no gradient
            is formed for it; otherwise it gets its own, as in ``F.linear``.
        lora_A: (R, K) and lora_B: (N, R), of the weight's dtype, or float32: then they are rounded to the weight's
            dtype where they are used, and their gradients come back in float32.
        scale: finite number; alpha / R, or alpha / sqrt(R) for rsLoRA.
        bias: (N,) of the weight's dtype, or None.
        dropout_p: in [0, 1), applied to x before A while ``training``. Same rate and scaling as ``nn.Dropout``, to
            1/65536, with its own stream of bits; the seed comes from PyTorch's generator on x's device.
        impl: "auto", "triton", "native" or "eager". "auto" chooses by the rule of ``backends.choose``; another choice
            that cannot run here raises.

    Returns:
        (..., N) of the weight's dtype. Inside ``torch.autocast`` the compute dtype is autocast's, as for ``F.linear``.

    Raises:
        TypeError, ValueError: an argument breaks a rule above; the message names argument, rule and value.
        RuntimeError: ``impl`` cannot run here; the message says why.

    What is kept for the backward is what the wanted gradients need: x for A's, h (M, R) for B's.
    Double backward works. Source of the method: https://arxiv.org/abs/2106.09685.
    """
    operands = (x, weight, lora_A, lora_B) if bias is None else (x, weight, lora_A, lora_B, bias)
    if not torch.compiler.is_compiling():
        plan = plans.find(operands, scale, dropout_p, training, impl)
        if plan is not None:
            if plan.forward is not None and not plan.drops and not plan.trains:
                return plan.forward(x, weight, lora_A, lora_B, bias, scale, None, False)[0]
            return _planned(plan, x, weight, lora_A, lora_B, bias, scale, dropout_p)
    # to a tracer sizes are no numbers: PyTorch's operations check them
    traced = not torch.compiler.is_compiling() and is_tracing()
    distributed = not traced and validation.check_operands(x, weight, lora_A, lora_B, bias)
    scale = validation.check_scale(scale)
    given_p = dropout_p = validation.check_dropout(dropout_p, "dropout_p")
    validation.check_impl(impl)
    dropout_p = dropout_p if training else 0.0
    if not torch.compiler.is_compiling() and any(tensor.is_neg() for tensor in operands):
        # kernels read what is in memory: of a tensor with the negative bit, the negative
        x, weight, lora_A, lora_B = (tensor.resolve_neg() for tensor in (x, weight, lora_A, lora_B))
        bias = None if bias is None else bias.resolve_neg()
    if distributed:
        # here, not at the top: it imports torch.distributed
        from .parallel import sharding

        local = sharding.localize(x, weight, lora_A, lora_B, bias)
        return local.join(_in_compute_dtype(*local.operands, scale, dropout_p, impl, local.stream))
    y = _in_compute_dtype(x, weight, lora_A, lora_B, bias, scale, dropout_p, impl)
    if not torch.compiler.is_compiling() and not plans.watched() and _is_plain(operands, y.dtype):
        # such a call may go straight to its backend
        drops, trains = dropout_threshold(dropout_p) > 0, torch.is_grad_enabled() and _any_requires_grad(*operands)
        chosen = choose(impl, x, lora_A, lora_B, y.dtype, drops, trains)
        plan = plans.CallPlan(x, chosen, backends.planner(chosen, drops), drops, trains)
        plans.put(operands, given_p, training, impl, plan)
    return y


def choose(impl: str, x: Tensor, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype, drops: bool, trains: bool) -> str:
    """The backend, by what is asked of the layer where that decides, and where no compiler would build a size in.

    dtype: that is computed in.  drops: whether a mask is drawn.  trains: whether any gradient is wanted.
    """
    asked = None
    if impl == "auto" and _decides(x):
        (R, K), N = lora_A.shape, lora_B.shape[0]
        asked = LayerPass(trains, x.numel() // max(K, 1), K, N, R, lora_A.dtype, drops)
    return backends.choose(impl, x.device, dtype, asked)


def _decides(x: Tensor) -> bool:
    return x.is_cuda and not torch.compiler.is_compiling() and isinstance(x.numel(), int)


def _is_plain(operands: tuple[Tensor, ...], dtype: torch.dtype) -> bool:
    """Whether these are tensors of no other class, in memory as they count, and x and weight as they were computed."""
    own = all(type(tensor) in _PLAIN and not tensor.is_neg() for tensor in operands)
    return own and operands[0].dtype == operands[1].dtype == dtype


def _planned(
    plan: plans.CallPlan, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None,
    scale: float, dropout_p: float,
) -> Tensor:  # fmt: skip
    """What ``lora_linear`` returns, where a call like it has been checked and a backend chosen."""
    seed = new_seed(x.device, 0) if plan.drops else None
    if not plan.drops:
        dropout_p = 0.0
    if plan.impl == "native":
        return native.lora_linear(x, weight, lora_A, lora_B, bias, scale, seed, dropout_p)
    if plan.planner is not None and plan.forward is None:
        plan.forward = plan.planner.plan(x, weight.t(), lora_A.t(), lora_B.t(), bias, seed, dropout_p, False)
    if plan.trains:
        return _apply(x, weight, lora_A, lora_B, bias, scale, seed, dropout_p, plan.impl, plan)[0]
    if plan.forward is not None:
        return plan.forward(x, weight, lora_A, lora_B, bias, scale, seed, False)[0]
    return ops.lora_matmul(
        x, weight.t(), lora_A.t(), lora_B.t(), bias, scale, seed, dropout_p, False, plan.impl
    )[0]  # fmt: skip


def concatenate_adapters(adapters: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor, float]:
    """Several adapters of one layer as one of all their ranks, for a single call of :func:`lora_linear`.

    adapters: (lora_A (Rᵢ, K), lora_B (N, Rᵢ), scaleᵢ), at least one.
    Returns (lora_A (ΣRᵢ, K), lora_B (N, ΣRᵢ), scale), differentiable, with
    ``scale · B A = Σ scaleᵢ · Bᵢ Aᵢ``: the largest scale is the call's, the others are multiplied into their B.
    """
    if len(adapters) == 1:
        return adapters[0]
    dtype = adapters[0][0].dtype
    for A, B, _ in adapters:
        dtype = torch.promote_types(dtype, torch.promote_types(A.dtype, B.dtype))
    if torch.compiler.is_compiling():
        # which is the largest would be compiled in
        scale, columns = 1.0, [B * s for _, B, s in adapters]
    else:
        scale = max((scale for _, _, scale in adapters), key=abs)
        columns = [B if s == scale else B * (s / scale) for _, B, s in adapters]
    return torch.cat([A.to(dtype) for A, _, _ in adapters]), torch.cat([B.to(dtype) for B in columns], 1), scale


def _in_compute_dtype(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None,
    scale: float, dropout_p: float, impl: str, stream: int = 0,
) -> Tensor:  # fmt: skip
    """Autocast's casts, then the dtypes' rules. stream: dropout masks of different streams are independent."""
    dtype = autocast_dtype(x.device)
    if dtype is not None:
        x, weight = _autocast(x, dtype), _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
        validation.check_dtypes(x, weight, lora_A, lora_B, bias)
        # the casts are made: nothing inside may be cast again
        with torch.autocast(x.device.type, enabled=False):
            return _lora_linear(x, weight, lora_A, lora_B, bias, scale, dropout_p, impl, stream)
    validation.check_dtypes(x, weight, lora_A, lora_B, bias)
    return _lora_linear(x, weight, lora_A, lora_B, bias, scale, dropout_p, impl, stream)


def _lora_linear(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None,
    scale: float, dropout_p: float, impl: str, stream: int,
) -> Tensor:  # fmt: skip
    drops = dropout_threshold(dropout_p) > 0
    trains = torch.is_grad_enabled() and _any_requires_grad(x, weight, lora_A, lora_B, bias)
    impl = choose(impl, x, lora_A, lora_B, weight.dtype, drops, trains)
    traced = not torch.compiler.is_compiling() and is_tracing()
    seed = new_seed(x.device, stream) if drops and not traced else None
    if in_functorch() or in_forward_ad() or exports():
        return composed.lora_linear(x, weight, lora_A, lora_B, bias, scale, seed, dropout_p)
    if torch.compiler.is_compiling() and _is_symbolic(scale):
        # an operator's number would be compiled in, and compiled anew for each: B carries it instead
        lora_B, scale = lora_B * scale, 1.0
    if impl == "native" and _nobody_looks(x, weight, lora_A, lora_B, bias):
        return native.lora_linear(x, weight, lora_A, lora_B, bias, scale, seed, dropout_p)
    if trains:
        return _LoRALinear.apply(x, weight, lora_A, lora_B, bias, scale, seed, dropout_p, impl, None)[0]
    return ops.lora_matmul(
        x, weight.t(), lora_A.t(), lora_B.t(), bias, scale, seed, dropout_p, False, impl
    )[0]  # fmt: skip


def new_seed(device: torch.device, stream: int) -> Tensor:
    """(1,) of int64 on the device, so that manual_seed and activation checkpointing repeat it; the host never reads it.

    stream: masks of different streams are independent.
    """
    seed = torch.randint(_LARGEST_SEED, (1,), device=device)
    return seed + stream * _STREAM if stream else seed


_LARGEST_SEED = torch.iinfo(torch.int64).max
# 2^64 over the golden ratio, as an int64: both halves of a seed change
_STREAM = 0x9E3779B97F4A7C15 - (1 << 64)


def _is_symbolic(scale: float) -> bool:
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not has_static_value(scale)


def _nobody_looks(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> bool:
    """Whether C++ may have the operands to itself: they are plain tensors, no compiler traces what is done with them,
    and no mode watches it, as selective checkpointing does."""
    return (
        not torch.compiler.is_compiling()
        and dispatch_modes() == 0
        and type(x) in _PLAIN and type(weight) in _PLAIN and type(lora_A) in _PLAIN and type(lora_B) in _PLAIN
        and (bias is None or type(bias) in _PLAIN)
    )  # fmt: skip


_PLAIN = (Tensor, torch.nn.Parameter)


def _any_requires_grad(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None = None
) -> bool:  # fmt: skip
    return (
        lora_A.requires_grad or lora_B.requires_grad or x.requires_grad or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    )  # fmt: skip


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Autocast's own rule: floating point, but not float64."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


# which gradients are wanted: of x, A and B, and neither of W nor of the bias
_USUAL = (True, False, True, True, False)


class _LoRALinear(torch.autograd.Function):
    """(y, h). h is an output, not a hidden intermediate, so that a second derivative finds its way through it."""

    # forward and setup_context in one: PyTorch binds the arguments of two by their signature, 40 µs a call
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None,
        scale: float, seed: Tensor | None, dropout_p: float, impl: str, plan: plans.CallPlan | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y: Tensor
        h: Any
        if plan is not None and plan.forward is not None:
            y, h = plan.forward(x, weight, lora_A, lora_B, bias, scale, seed)
        else:
            y, h = ops.lora_matmul(x, weight.t(), lora_A.t(), lora_B.t(), bias, scale, seed, dropout_p, False, impl)
        ctx.call = scale, dropout_p, impl, plan, x.shape
        needs = ctx.needs_input_grad
        ctx.set_materialize_grads(False)
        # what the wanted gradients need, x for W's and A's and h for B's; the parameters are alive anyway
        kept_x, kept_h = (x if needs[1] or needs[2] else None), (h if needs[3] else None)
        ctx.save_for_backward(kept_x, weight, lora_A, lora_B, kept_h, seed)
        return y, h

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        given = dy if dy is not None else dh
        if given is None:
            return (None,) * 10
        # unpacked once: activation checkpointing recomputes in it, and refuses to be asked again
        saved = x, weight, lora_A, lora_B, h, seed = ctx.saved_tensors
        scale, *_, plan, _ = ctx.call
        needs = ctx.needs_input_grad[:5]
        if plan is not None and dh is None and needs == _USUAL and not torch.is_grad_enabled():
            # by far the most calls; autocast would change nothing, as kernels are no operators
            known = plan.gradients(needs, (dy, weight, lora_A, lora_B, x, h))
            if known is not None and known.input is not None and known.adapters is not None:
                dx, g = known.input(dy, weight, lora_B, lora_A, None, scale, seed)
                dA, dB = known.adapters(x, g, dy, h, scale, seed)
                return dx, None, dA, dB, None, None, None, None, None, None
        if autocast_dtype(given.device) is None:
            return gradients(dy, dh, saved, ctx.call, needs)
        # everything is in the compute dtype already; backward may run under another autocast than forward did
        with torch.autocast(given.device.type, enabled=False):
            return gradients(dy, dh, saved, ctx.call, needs)


def gradients(
    dy: Tensor | None, dh: Tensor | None, saved: tuple[Tensor, ...], call: tuple[Any, ...],
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """What ``_LoRALinear.backward`` returns.  saved, call: what its forward kept."""
    x, weight, lora_A, lora_B, h, seed = saved
    scale, dropout_p, impl, plan, x_shape = call
    grads: tuple[Tensor | None, ...]
    second = dh is not None or dy is None or torch.is_grad_enabled()
    # compilers take no second derivatives, but trace backward with grad mode on and a gradient of h
    if second and not torch.compiler.is_compiling():
        # a second derivative: grad mode is on inside backward exactly when create_graph was asked for
        mask = None
        if seed is not None:
            rows = dh.shape[0] if dh is not None else dy.numel() // weight.shape[0]  # type: ignore[union-attr]
            mask = dropout_mask(seed, rows, weight.shape[1], dropout_p)
        grads = reference.eager_backward(dy, dh, x, weight, lora_A, lora_B, h, scale, mask, dropout_p, needs)
        if grads[0] is not None:
            grads = (grads[0].view(x_shape), *grads[1:])
    else:
        assert dy is not None
        grads = _backward(dy, x, weight, lora_A, lora_B, h, scale, seed, dropout_p, impl, plan, needs)
    return (*grads, None, None, None, None, None)


# past what Function.apply looks for, transforms of torch.func: a plan is found only where there is none
_apply = super(torch.autograd.Function, _LoRALinear).apply


def _backward(
    dy: Tensor, x: Tensor | None, weight: Tensor, lora_A: Tensor, lora_B: Tensor, h: Tensor | None,
    scale: float, seed: Tensor | None, dropout_p: float, impl: str, plan: plans.CallPlan | None,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(dx, dW, dA, dB, dbias): at most one launch for dx and one for dA and dB together."""
    needs_x, needs_W, needs_A, needs_B, needs_bias = needs
    dx = dW = g = dA = dB = dbias = None
    # what a compiler traces has no such bit, and it refuses the question
    if not torch.compiler.is_compiling() and dy.is_neg():
        dy = dy.resolve_neg()
    dy2 = dy if dy.dim() == 2 else dy.reshape(-1, dy.shape[-1])
    if seed is not None and impl == "eager" and (torch.compiler.is_compiling() or (needs_x and needs_A)):
        # made once for both, and by a compiler in one loop; in forward too it would be the same mask, and be kept
        seed = whole_mask(seed, dy2.shape[0], weight.shape[1], dropout_p)
    known = None
    if plan is not None:
        operands = tuple(tensor for tensor in (dy, weight, lora_A, lora_B, x, h) if tensor is not None)
        known = plan.gradients(needs, operands, new=True)
    if needs_x and known is None:
        dx, g = ops.lora_matmul(dy, weight, lora_B, lora_A, None, scale, seed, dropout_p, True, impl)
    elif needs_x and known is not None:
        if known.input is None:
            known.input = known.planner.plan(dy, weight, lora_B, lora_A, None, seed, dropout_p, True)
        assert known.input is not None
        dx, g = known.input(dy, weight, lora_B, lora_A, None, scale, seed)
    elif needs_A:
        g = dy2 @ lora_B.to(dy.dtype)
    if needs_A or needs_B:
        given = (x if needs_A else None, g if needs_A else None, dy if needs_B else None, h)
        dtypes = (lora_A.dtype, lora_B.dtype)
        if known is None:
            dA, dB = ops.adapter_grad(*given, scale, seed, dropout_p, *dtypes, impl)
        else:
            if known.adapters is None:
                known.adapters = known.planner.adapter_grad_plan(*given, seed, dropout_p, *dtypes)
            dA, dB = known.adapters(*given, scale, seed)
    if needs_W:
        assert x is not None
        dW = dy2.t() @ x.reshape(-1, x.shape[-1])
    if needs_bias:
        dbias = dy2.sum(0)
    return dx, dW, (dA if needs_A else None), (dB if needs_B else None), dbias
