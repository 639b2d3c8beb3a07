"""The operators in plain PyTorch: in place, with no temporary of the output's size and dtype.

Plans of calls without dropout are the functions that compute a first call: one arithmetic from the first to the last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dropout import keep_scale, mask_blocks
from ..plans import Forward, Gradients
from ..torch_internals import dispatch_modes, unsafe_view
from . import environment


def why_not(device: torch.device, dtype: torch.dtype) -> None:
    """It runs everywhere."""


def lora_matmul(
    a: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, scale: float,
    seed: Tensor | None, dropout_p: float, dropout_on_output: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``Backend``. seed: also a :func:`fused_lora.dropout.whole_mask`, made once for several calls."""
    if dropout_on_output:
        return _input_gradient(a, w, u, v, bias, scale, seed, dropout_p=dropout_p)
    return _forward(a, w.t(), u.t(), v.t(), bias, scale, seed, dropout_p=dropout_p)


def adapter_grad(
    x: Tensor | None, g: Tensor | None, dy: Tensor | None, h: Tensor | None, scale: float,
    seed: Tensor | None, dropout_p: float, dtype_A: torch.dtype, dtype_B: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """See ``Backend``."""
    dA = dB = None
    if x is not None and g is not None:
        dA = _in(dtype_A, _gradient_A(g, rows(x), scale, seed, dropout_p))
    if dy is not None and h is not None:
        dB = _in(dtype_B, _gradient_B(rows(dy), h, scale))
    return dA, dB


def plan(
    a: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None,
    seed: Tensor | None, dropout_p: float, is_input_gradient: bool,
) -> Forward:  # fmt: skip
    """``lora_matmul`` of operands like these: see ``plans.Planner``. Without dropout."""
    return _input_gradient if is_input_gradient else _forward


def adapter_grad_plan(
    x: Tensor | None, g: Tensor | None, dy: Tensor | None, h: Tensor | None,
    seed: Tensor | None, dropout_p: float, dtype_A: torch.dtype, dtype_B: torch.dtype,
) -> Gradients:  # fmt: skip
    """``adapter_grad`` of operands like these, without dropout."""

    def gradients(
        x: Tensor | None, g: Tensor | None, dy: Tensor | None, h: Tensor | None, scale: float, seed: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        return adapter_grad(x, g, dy, h, scale, None, 0.0, dtype_A, dtype_B)

    return gradients


def _forward(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scale: float,
    seed: Tensor | None, keeps_h: bool = True, *, dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    A, B = _in(x.dtype, lora_A), _in(x.dtype, lora_B)
    # nn.Linear's own product, whatever it does with x's shape and strides: a fresh adapter changes no bit of it
    y = F.linear(x, weight, bias)
    if seed is None:
        h = F.linear(x, A)
    else:
        x2 = rows(x)
        h = x.new_empty((x2.shape[0], A.shape[0]))
        for block, keep in mask_blocks(seed, dropout_p, *x2.shape):
            torch.mm(x2[block] * keep, A.t(), out=h[block])
        h.mul_(keep_scale(dropout_p))
    if x.dim() == 2:
        return _add_product(y, h, B.t(), scale), h
    M = _count_rows(x)
    h = h.reshape(M, A.shape[0])
    return _like(x, _add_product(y.reshape(M, B.shape[0]), h, B.t(), scale)), h


def _input_gradient(
    dy: Tensor, weight: Tensor, lora_B: Tensor, lora_A: Tensor, bias: Tensor | None, scale: float,
    seed: Tensor | None, keeps_g: bool = True, *, dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dy2, A, B = rows(dy), _in(dy.dtype, lora_A), _in(dy.dtype, lora_B)
    dx = _base_gradient(dy2, weight) if bias is None else torch.addmm(bias, dy2, weight)
    g = torch.mm(dy2, B)
    if seed is None:
        return _like(dy, _add_product(dx, g, A, scale)), g
    for block, keep in mask_blocks(seed, dropout_p, *dx.shape):
        dx[block].add_(torch.mm(g[block], A).mul_(keep), alpha=scale * keep_scale(dropout_p))
    return _like(dy, dx), g


def _base_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """``dy W`` by the faster library: nothing else is promised to have its bits."""
    if (
        dy.dtype == torch.float32
        and type(dy) is Tensor
        and dispatch_modes() == 0
        and environment.onednn_is_faster()
        and dy.is_cpu
    ):
        return torch.ops.mkldnn._linear_pointwise(dy, weight.t(), None, "none", [], "")
    return torch.mm(dy, weight)


def _add_product(out: Tensor, low: Tensor, v: Tensor, scale: float) -> Tensor:
    """``out + scale · low v`` of matrices, in place: out is nobody else's."""
    if dispatch_modes() == 0:
        return out.addmm_(low, v, alpha=scale)
    # a mode that watches operators may keep their results, as selective checkpointing does, and counts this one
    return torch.addmm(out, low, v, alpha=scale)


def _gradient_A(g: Tensor, x: Tensor, scale: float, seed: Tensor | None, dropout_p: float) -> Tensor:
    """``scale · gᵀ D(x)``. Blocks of 16-bit rows are summed in float32."""
    if seed is None:
        return _scaled_product(g.t(), x, scale)
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(g.shape[1], x.shape[1], dtype=dtype, device=x.device)
    for block, keep in mask_blocks(seed, dropout_p, *x.shape):
        total += torch.mm(g[block].t(), x[block] * keep)
    return total.mul_(scale * keep_scale(dropout_p))


def _gradient_B(dy: Tensor, h: Tensor, scale: float) -> Tensor:
    """``scale · dyᵀ h``."""
    if _on_gpu(dy):
        return _scaled_product(dy.t(), h, scale)
    # on a CPU the narrow matrix on the left is the faster product
    return _scaled_product(h.t(), dy, scale).t().contiguous()


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    if _on_gpu(a):
        # one launch. beta=0: what is added is never read
        return a.new_empty(()).addmm(a, b, beta=0, alpha=scale)
    product = torch.mm(a, b)
    return product if scale == 1.0 else product.mul_(scale)


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _in(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    # to ask for what it is anyway takes the host longer than to look
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def rows(x: Tensor) -> Tensor:
    """(..., C) as (M, C): a view wherever the strides allow it."""
    return x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x


def _count_rows(x: Tensor) -> int:
    count = 1
    for size in x.shape[:-1]:
        count = count * size
    return count


def _like(x: Tensor, out: Tensor) -> Tensor:
    """out (M, C) with the leading sizes of x, and no view: autograd refuses to change one in place."""
    return out if x.dim() == 2 else unsafe_view(out, (*x.shape[:-1], out.shape[1]))
