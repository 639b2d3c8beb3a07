"""Calls of ``lora_linear`` like one before: a lookup stands for all that was checked and chosen then.

What a check or a choice looks at is in the key, exactly: kinds, shapes, strides, dtypes and devices of all operands,
dropout, ``impl``, autocast's dtype and the precision of float32 products. Values of tensors are in none, nor is scale.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from .autocast import autocast_dtype
from .cache import Cache
from .torch_internals import dispatch_modes, in_forward_ad, in_functorch, is_tracing

_PLAIN = (Tensor, nn.Parameter)
_FLOAT32 = torch.float32


# of (x, weight, lora_A, lora_B, bias, scale, seed), which returns (y, h)
Forward = Callable[..., tuple[Tensor, Tensor]]


class CallPlan:
    """impl: the backend that computes.  drops: whether there is a dropout mask to draw.

    forward: the backend's own plan of the forward; None before there is one, and where it makes none.
    """

    __slots__ = ("drops", "forward", "impl")

    def __init__(self, impl: str, drops: bool) -> None:
        self.impl, self.drops = impl, drops
        self.forward: Forward | None = None


CALLS: Cache[CallPlan] = Cache(4096)


def watched() -> bool:
    """Whether somebody sees or changes what is done with tensors now: a mode, a transform, a tracer."""
    return dispatch_modes() > 0 or in_functorch() or in_forward_ad() or is_tracing()


def key_of(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None,
    scale: float, dropout_p: float, training: bool, impl: str,
) -> Hashable | None:  # fmt: skip
    """None for a call that always takes the long way."""
    if (
        type(x) not in _PLAIN or type(weight) not in _PLAIN or type(lora_A) not in _PLAIN or type(lora_B) not in _PLAIN
        or (bias is not None and type(bias) not in _PLAIN)
        or type(scale) is not float or scale - scale != 0.0 or type(dropout_p) is not float
        # kernels read what is in memory, and of these it is the negative
        or x.is_neg() or weight.is_neg() or lora_A.is_neg() or lora_B.is_neg()
    ):  # fmt: skip
        return None
    dtype, device = x.dtype, x.device
    try:
        return (
            x.shape, x.stride(), x.layout, dtype, device,
            weight.shape, weight.stride(), weight.layout, weight.dtype, weight.device,
            lora_A.shape, lora_A.stride(), lora_A.layout, lora_A.dtype, lora_A.device,
            lora_B.shape, lora_B.stride(), lora_B.layout, lora_B.dtype, lora_B.device,
            None if bias is None else (bias.shape, bias.stride(), bias.layout, bias.dtype, bias.device),
            dropout_p, training, impl,
            autocast_dtype(device),
            torch.get_float32_matmul_precision() if dtype is _FLOAT32 else None,
        )  # fmt: skip
    except (RuntimeError, TypeError):
        # tensors of some kinds have no strides, some kinds of device have no autocast, and an impl may be anything
        return None
