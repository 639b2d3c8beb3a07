"""The mathematics of a LoRA linear layer, in plain PyTorch. Everything else in this project is checked against this.

Symbols: M tokens, K in_features, N out_features, R rank. ``x (M,K)``, ``weight (N,K)``, ``lora_A (R,K)``,
``lora_B (N,R)``, ``h (M,R)``, ``y (M,N)``; gradients ``dy dx dlora_A dlora_B``; ``scale`` is alpha / R
(alpha / sqrt(R) for rsLoRA).

    forward      h  = D(x) Aᵀ              y  = x Wᵀ + scale · h Bᵀ + bias
    backward     g  = dy B                 dx = dy W + D'(scale · g A)
                 dA = scale · gᵀ D(x)      dB = scale · dyᵀ h           dbias = Σ_m dy
    never        dW, while W is frozen

``D(x) = x ⊙ mask / (1 - p)`` is LoRA dropout, the identity without it; ``D'`` multiplies by the same mask.

Forward and input gradient are one computation, :func:`lora_matmul`, told other operands:

    out[M,P] = a[M,Q] w[Q,P] + scale · (a[M,Q] u[Q,R]) v[R,P] + bias
    forward: a = x,  w = Wᵀ, u = Aᵀ, v = Bᵀ        input gradient: a = dy, w = W, u = B, v = A

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685.  rsLoRA: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .dropout import keep_scale

# --------------------------------------------------------------------------------------------------
# The reference that every result is compared with: W + scale · B A, formed whole
# --------------------------------------------------------------------------------------------------


class LoRAParametrization(nn.Module):
    """``W ↦ W + scale · B A``, to be registered on a linear layer's weight.

    Args:
        in_features, out_features: K and N of the layer.
        rank: R ≥ 1.
        alpha: scale is ``alpha / rank``.

    A is drawn from N(0, 1), B is zero, so a fresh parametrization changes nothing.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 1,
        alpha: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))
        nn.init.normal_(self.lora_A)
        self.scale = alpha / rank
        self.enabled = True

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled:
            return weight
        return weight + (self.lora_B @ self.lora_A).view(weight.shape) * self.scale


def parametrize_linear(linear: nn.Linear, rank: int = 1, alpha: float = 1.0) -> LoRAParametrization:
    """Freeze ``linear`` and register a :class:`LoRAParametrization` on its weight; returns it."""
    lora = LoRAParametrization(
        linear.in_features, linear.out_features, rank, alpha, linear.weight.device, linear.weight.dtype
    )
    linear.requires_grad_(False)
    parametrize.register_parametrization(linear, "weight", lora)
    return lora


def eager_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """The forward as frameworks write it: five kernels, ordinary autograd.

    mask: (M, K) as :func:`fused_lora.dropout.dropout_mask` makes it, or None for no dropout.
    """
    dropped = _drop(x, mask, dropout_p)
    return F.linear(x, weight, bias) + F.linear(F.linear(dropped, lora_A), lora_B) * scale


def _drop(x: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    return x if mask is None else x * mask.view(x.shape) * keep_scale(dropout_p)


def eager_backward(
    dy: Tensor | None,
    dh: Tensor | None,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    h: Tensor | None,
    scale: float,
    mask: Tensor | None,
    dropout_p: float,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dx, dW, dA, dB, dbias) from those of y and h, made of differentiable operations alone.

    dy: (..., N) or None.  dh: (M, R) or None, the gradient that reaches h from elsewhere: a second derivative does.
    needs: which of the five are wanted; W's is only formed for a weight that is not frozen.
    """
    needs_x, needs_W, needs_A, needs_B, needs_bias = needs
    dtype = weight.dtype
    A, B = lora_A.to(dtype), lora_B.to(dtype)
    dx = dW = dA = dB = dbias = None
    total_dh = dh
    if dy is not None:
        dy2 = _matrix(dy)
        g = dy2 @ B * scale
        total_dh = g if dh is None else g + dh
        if needs_x:
            dx = dy2 @ weight
        if needs_W and x is not None:
            dW = dy2.t() @ _matrix(x)
        if needs_B and h is not None:
            dB = (dy2.t() @ h * scale).to(lora_B.dtype)
        if needs_bias:
            dbias = dy2.sum(0)
    assert total_dh is not None
    if needs_x:
        lora_dx = _drop(total_dh @ A, mask, dropout_p)
        dx = lora_dx if dx is None else dx + lora_dx
    if needs_A and x is not None:
        dA = (total_dh.t() @ _drop(_matrix(x), mask, dropout_p)).to(lora_A.dtype)
    return dx, dW, dA, dB, dbias


def _matrix(x: Tensor) -> Tensor:
    """(..., C) as (M, C): a view wherever the strides allow it."""
    return x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
