"""``quantized_lora_linear``: ``lora_linear`` over a weight that is made for the call, and made again for its backward.

Nothing of W is kept between the two but its quantized tensors. The weight is an ordinary temporary: PyTorch's caching
allocator gives layers of a size, and of one stream, the same memory, and a captured graph takes it from its own pool.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import functional, ops, validation
from ..dropout import dropout_threshold
from ..torch_internals import autocast_dtype, exports, in_forward_ad, in_functorch
from . import KINDS, Packed, dequantize

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def quantized_lora_linear(
    x: Tensor,
    packed: Packed,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    bias: Tensor | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    impl: str = "auto",
) -> Tensor:
    """As :func:`fused_lora.lora_linear`, over a weight that is kept as ``packed`` and never trained.

    Args:
        packed: of (N, K).
        lora_A, lora_B: of the dtype that is computed in, or float32.
        compute_dtype: of the product, to which x, bias and the weight are brought; None takes autocast's, or x's.

    Returns:
        (..., N): of x's dtype over a weight of bitsandbytes, as its layers have it, else of the one computed in.

    Raises:
        TypeError, ValueError, RuntimeError: as ``lora_linear``.
    """
    validation.check_no_ids(x)
    given, keeps_dtype = x.dtype, KINDS[packed.recipe[0]].keeps_dtype
    dtype = compute_dtype or autocast_dtype(x.device) or given
    if not takes(dtype):
        raise TypeError(f"x must be float16, bfloat16 or float32 over a quantized weight, got {dtype}")
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        y = _lora_linear(x, packed, lora_A, lora_B, scale, bias, dropout_p if training else 0.0, impl)
    return y.to(given) if keeps_dtype else y


def _lora_linear(
    x: Tensor, packed: Packed, lora_A: Tensor, lora_B: Tensor, scale: float, bias: Tensor | None,
    dropout_p: float, impl: str,
) -> Tensor:  # fmt: skip
    wanted = any(tensor is not None and tensor.requires_grad for tensor in (x, lora_A, lora_B, bias))
    compiling, recorded = torch.compiler.is_compiling(), exports()
    if compiling or recorded or not (torch.is_grad_enabled() and wanted) or in_functorch() or in_forward_ad():
        # transforms of torch.func keep the weight, as they keep all
        make = _dequantize_again if compiling and not recorded else dequantize
        weight = make(packed, x.dtype)
        return functional.lora_linear(x, weight, lora_A, lora_B, scale, bias, dropout_p=dropout_p, impl=impl)
    validation.check_features(x, lora_A.shape[1])
    validation.check_dtypes(x, x, lora_A, lora_B, bias)
    scale = validation.check_scale(scale)
    drops = dropout_threshold(dropout_p) > 0
    impl = functional.choose(impl, x, lora_A, lora_B, x.dtype, drops, trains=True)
    seed = functional.new_seed(x.device, 0) if drops else None
    return _OverQuantized.apply(
        x, lora_A, lora_B, bias, scale, seed, dropout_p, impl, packed.recipe, *packed.tensors
    )[0]  # fmt: skip


def _dequantize_again(packed: Packed, dtype: torch.dtype) -> Tensor:
    """For a compiler, which finds one product of W in both passes, and would keep it: told that W is not to be kept."""
    return checkpoint(dequantize, packed, dtype, use_reentrant=False, preserve_rng_state=False)


def takes(dtype: torch.dtype) -> bool:
    """Whether products over a quantized weight are made in it."""
    return dtype in _DTYPES


class _OverQuantized(torch.autograd.Function):
    """(y, h), as ``functional._LoRALinear`` has them."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scale: float,
        seed: Tensor | None, dropout_p: float, impl: str, recipe: tuple[Any, ...], *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        weight = dequantize(Packed(recipe, tensors), x.dtype)
        y, h = ops.lora_matmul(x, weight.t(), lora_A.t(), lora_B.t(), bias, scale, seed, dropout_p, False, impl)
        needs_x, needs_A, needs_B, needs_bias = ctx.needs_input_grad[:4]
        ctx.needs = needs_x, False, needs_A, needs_B, needs_bias
        ctx.call = scale, dropout_p, impl, None, x.shape
        ctx.recipe, ctx.dtype = recipe, x.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if needs_A else None, lora_A, lora_B, h if needs_B else None, seed, *tensors)
        return y, h

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        given = dy if dy is not None else dh
        x, lora_A, lora_B, h, seed, *tensors = ctx.saved_tensors
        none = (None,) * (5 + len(tensors))
        if given is None:
            return (None,) * 4 + none
        weight = dequantize(Packed(ctx.recipe, tuple(tensors)), ctx.dtype)
        with torch.autocast(given.device.type, enabled=False):
            saved = x, weight, lora_A, lora_B, h, seed
            dx, _, dA, dB, dbias, *_ = functional.gradients(dy, dh, saved, ctx.call, ctx.needs)
        return dx, dA, dB, dbias, *none
