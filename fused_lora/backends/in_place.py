"""Plans for "eager" on a GPU: in-place addmm, three products forward and five backward, each of them one of PyTorch's.

These are the operations of the baseline of that name (``bench.baselines.AddmmLoRA``) but for one product: ``h`` is kept
for the backward, where the baseline computes it again. ``eager.py`` is the same arithmetic, tuned for CPUs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..plans import Forward, Gradients
from ..torch_internals import unsafe_view
from .eager import rows


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
    """``adapter_grad`` of operands like these."""

    def gradients(
        x: Tensor | None, g: Tensor | None, dy: Tensor | None, h: Tensor | None, scale: float, seed: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        dA = None if x is None or g is None else _in(dtype_A, _product(g.t(), rows(x), scale))
        dB = None if dy is None or h is None else _in(dtype_B, _product(rows(dy).t(), h, scale))
        return dA, dB

    return gradients


def _forward(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scale: float,
    seed: Tensor | None, keeps_h: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x2, A, B = rows(x), _in(x.dtype, lora_A), _in(x.dtype, lora_B)
    y, h = F.linear(x2, weight, bias), F.linear(x2, A)
    return _shaped(y.addmm_(h, B.t(), alpha=scale), x), h


def _input_gradient(
    dy: Tensor, weight: Tensor, lora_B: Tensor, lora_A: Tensor, bias: Tensor | None, scale: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dy2, A, B = rows(dy), _in(dy.dtype, lora_A), _in(dy.dtype, lora_B)
    dx, g = dy2.mm(weight), dy2.mm(B)
    return _shaped(dx.addmm_(g, A, alpha=scale), dy), g


def _in(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    # to ask for what it is anyway takes the host longer than to look
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    # beta=0: what is added is never read
    return a.new_empty(()).addmm(a, b, beta=0, alpha=scale)


def _shaped(out: Tensor, like: Tensor) -> Tensor:
    """out (M, C) with the leading sizes of ``like``, and no view: autograd refuses to change one in place."""
    return out if like.dim() == 2 else unsafe_view(out, (*like.shape[:-1], out.shape[1]))
