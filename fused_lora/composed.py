"""The layer composed of PyTorch's own differentiable operations, which every transform, tracer and exporter knows.

For whoever looks into a call or records it: transforms of ``torch.func``, forward-mode derivatives, ``torch.export``,
``torch.jit.trace``, ``torch.onnx.export``. A recorded program then runs where this package is not installed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import dropout_mask, keep_scale


def lora_linear(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None,
    scale: float, seed: Tensor | None, dropout_p: float,
) -> Tensor:  # fmt: skip
    """As :func:`fused_lora.lora_linear`.  seed: (1,) of int64 for the dropout mask; None takes ``nn.Dropout``'s."""
    A, B = lora_A.to(weight.dtype), lora_B.to(weight.dtype)
    if dropout_p == 0.0:
        dropped = x
    elif seed is None:
        dropped = F.dropout(x, dropout_p)
    else:
        mask = dropout_mask(seed, x.numel() // max(x.shape[-1], 1), x.shape[-1], dropout_p)
        dropped = x * mask.view(x.shape) * keep_scale(dropout_p)
    y, h = F.linear(x, weight, bias), F.linear(dropped, A)
    if x.dim() == 2:
        # one product less to add, and the bits of eager.py
        return torch.addmm(y, h, B.t(), alpha=scale)
    return y + F.linear(h, B) * scale


def plus_adapter(y: Tensor, x: Tensor, adapter: tuple[Tensor, Tensor, float], dropout_p: float) -> Tensor:
    """``y + scale · (D(x) Aᵀ) Bᵀ``, with the mask of ``nn.Dropout`` in training.

    y: (..., N).  x: (..., K).  adapter: (lora_A (R, K), lora_B (N, R), scale).  For what is beside a fused call.
    """
    lora_A, lora_B, scale = adapter
    h = F.linear(F.dropout(x, dropout_p), lora_A.to(x.dtype))
    return y + (F.linear(h, lora_B.to(h.dtype)) * scale).to(y.dtype)
