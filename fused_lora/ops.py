"""The operators as PyTorch sees them: schemas, shapes of results, and how they reach a backend. Imports torch alone.

``backends.Backend`` says what they compute. They carry no autograd of their own: ``functional.py`` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import flops
from .backends import BACKENDS
from .plans import watched

LIBRARY = torch.library.Library("fused_lora", "DEF")

LIBRARY.define(
    "lora_matmul(Tensor a, Tensor w, Tensor u, Tensor v, Tensor? bias, float scale, "
    "Tensor? seed, float dropout_p, bool dropout_on_output, str impl) -> (Tensor out, Tensor h)"
)
LIBRARY.define(
    "adapter_grad(Tensor? x, Tensor? g, Tensor? dy, Tensor? h, float scale, "
    "Tensor? seed, float dropout_p, ScalarType dtype_A, ScalarType dtype_B, str impl) -> (Tensor dA, Tensor dB)"
)


def _lora_matmul(
    a: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, scale: float,
    seed: Tensor | None, dropout_p: float, dropout_on_output: bool, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return BACKENDS[impl].lora_matmul(a, w, u, v, bias, scale, seed, dropout_p, dropout_on_output)


def _adapter_grad(
    x: Tensor | None, g: Tensor | None, dy: Tensor | None, h: Tensor | None, scale: float,
    seed: Tensor | None, dropout_p: float, dtype_A: torch.dtype, dtype_B: torch.dtype, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dA, dB = BACKENDS[impl].adapter_grad(x, g, dy, h, scale, seed, dropout_p, dtype_A, dtype_B)
    # an operator must return tensors: an empty one stands for a gradient that was not asked for
    like = x if x is not None else dy
    assert like is not None
    return (like.new_empty(0) if dA is None else dA), (like.new_empty(0) if dB is None else dB)


def _lora_matmul_shapes(
    a: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, scale: float,
    seed: Tensor | None, dropout_p: float, dropout_on_output: bool, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = 1
    for size in a.shape[:-1]:
        rows = rows * size
    return a.new_empty((*a.shape[:-1], w.shape[1])), a.new_empty((rows, u.shape[1]))


def _adapter_grad_shapes(
    x: Tensor | None, g: Tensor | None, dy: Tensor | None, h: Tensor | None, scale: float,
    seed: Tensor | None, dropout_p: float, dtype_A: torch.dtype, dtype_B: torch.dtype, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    like = x if x is not None else dy
    assert like is not None
    dA = like.new_empty(0) if x is None or g is None else x.new_empty((g.shape[1], x.shape[-1]), dtype=dtype_A)
    dB = like.new_empty(0) if dy is None or h is None else dy.new_empty((dy.shape[-1], h.shape[1]), dtype=dtype_B)
    return dA, dB


LIBRARY.impl("lora_matmul", _lora_matmul, "CompositeExplicitAutograd")
LIBRARY.impl("adapter_grad", _adapter_grad, "CompositeExplicitAutograd")
torch.library.register_fake("fused_lora::lora_matmul", _lora_matmul_shapes, lib=LIBRARY)
torch.library.register_fake("fused_lora::adapter_grad", _adapter_grad_shapes, lib=LIBRARY)


def lora_matmul(
    a: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, scale: float,
    seed: Tensor | None, dropout_p: float, dropout_on_output: bool, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator, or its backend itself where nobody sees the difference: the boundary costs the host more than the
    call of a kernel. What eager does, modes see one by one."""
    if not torch.compiler.is_compiling():
        if impl == "eager" or not watched():
            return BACKENDS[impl].lora_matmul(a, w, u, v, bias, scale, seed, dropout_p, dropout_on_output)
        flops.register()
    return torch.ops.fused_lora.lora_matmul.default(a, w, u, v, bias, scale, seed, dropout_p, dropout_on_output, impl)


def adapter_grad(
    x: Tensor | None, g: Tensor | None, dy: Tensor | None, h: Tensor | None, scale: float,
    seed: Tensor | None, dropout_p: float, dtype_A: torch.dtype, dtype_B: torch.dtype, impl: str,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """As :func:`lora_matmul`. A gradient that was not asked for is None or empty."""
    if not torch.compiler.is_compiling():
        if impl == "eager" or not watched():
            return BACKENDS[impl].adapter_grad(x, g, dy, h, scale, seed, dropout_p, dtype_A, dtype_B)
        flops.register()
    return torch.ops.fused_lora.adapter_grad.default(x, g, dy, h, scale, seed, dropout_p, dtype_A, dtype_B, impl)
