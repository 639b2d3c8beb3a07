"""The operators in plain PyTorch: in place, with no temporary of the output's size and dtype. Tuned for CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dropout import keep_scale, mask_blocks
from ..torch_internals import dispatch_modes
from . import environment


def why_not(device: torch.device, dtype: torch.dtype) -> None:
    """It runs everywhere."""


def lora_matmul(
    a: Tensor,
    w: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    seed: Tensor | None,
    dropout_p: float,
    dropout_on_output: bool,
) -> tuple[Tensor, Tensor]:
    """See ``Backend``. seed: also a :func:`fused_lora.dropout.whole_mask`, made once for several calls."""
    a2 = rows(a)
    # a mode that watches operators may keep their results, as selective checkpointing does: do not change them in place
    if a.dim() == 2 and dispatch_modes() == 0:
        out = out2 = _base_product(a, w, bias, dropout_on_output)
    else:
        # autograd refuses an output that is a view and is changed in place, so out is a tensor of its own
        out = a.new_empty((*a.shape[:-1], w.shape[1]))
        out2 = out.view(a2.shape[0], w.shape[1])
        if bias is None:
            torch.mm(a2, w, out=out2)
        else:
            torch.addmm(bias, a2, w, out=out2)
    if u.dtype != a.dtype or v.dtype != a.dtype:
        u, v = u.to(a.dtype), v.to(a.dtype)
    if seed is None:
        h = torch.mm(a2, u)
        out2.addmm_(h, v, alpha=scale)
    elif dropout_on_output:
        h = torch.mm(a2, u)
        for block, keep in mask_blocks(seed, dropout_p, *out2.shape):
            out2[block].add_(torch.mm(h[block], v).mul_(keep), alpha=scale * keep_scale(dropout_p))
    else:
        h = a.new_empty((a2.shape[0], u.shape[1]))
        for block, keep in mask_blocks(seed, dropout_p, *a2.shape):
            torch.mm(a2[block] * keep, u, out=h[block])
        h.mul_(keep_scale(dropout_p))
        out2.addmm_(h, v, alpha=scale)
    return out, h


def adapter_grad(
    x: Tensor | None,
    g: Tensor | None,
    dy: Tensor | None,
    h: Tensor | None,
    scale: float,
    seed: Tensor | None,
    dropout_p: float,
    dtype_A: torch.dtype,
    dtype_B: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """See ``Backend``."""
    dA = dB = None
    if x is not None and g is not None:
        dA = _gradient(g, rows(x), scale, seed, dropout_p).to(dtype_A)
    if dy is not None and h is not None:
        # hᵀ dy, not dyᵀ h: the narrow matrix on the left is the faster product on a CPU
        dB = _gradient(h, rows(dy), scale, None, 0.0).t().to(dtype_B).contiguous()
    return dA, dB


def _gradient(low: Tensor, wide: Tensor, scale: float, seed: Tensor | None, dropout_p: float) -> Tensor:
    """``scale · lowᵀ D(wide)``: (R, C). Blocks of 16-bit rows are summed in float32."""
    if seed is None:
        product = torch.mm(low.t(), wide)
        return product if scale == 1.0 else product.mul_(scale)
    dtype = torch.promote_types(wide.dtype, torch.float32)
    total = torch.zeros(low.shape[1], wide.shape[1], dtype=dtype, device=wide.device)
    for block, keep in mask_blocks(seed, dropout_p, *wide.shape):
        total += torch.mm(low[block].t(), wide[block] * keep)
    return total.mul_(scale * keep_scale(dropout_p))


def _base_product(a: Tensor, w: Tensor, bias: Tensor | None, is_input_gradient: bool) -> Tensor:
    """``a w + bias`` of matrices. The forward is the product that ``nn.Linear`` makes, so that a fresh adapter changes
    no bit of it; the input gradient is free to take the faster library."""
    if bias is not None:
        return torch.addmm(bias, a, w)
    if (
        is_input_gradient
        and a.dtype == torch.float32
        and type(a) is Tensor
        and environment.onednn_is_faster()
        and a.is_cpu
    ):
        return torch.ops.mkldnn._linear_pointwise(a, w.t(), None, "none", [], "")
    return torch.mm(a, w)


def rows(x: Tensor) -> Tensor:
    """(..., C) as (M, C): a view wherever the strides allow it."""
    return x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
