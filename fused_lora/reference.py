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

import functools
import pathlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

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

    mask: (M, K) as :func:`dropout_mask` makes it, or None for no dropout.
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
        dy2 = _rows(dy)
        g = dy2 @ B * scale
        total_dh = g if dh is None else g + dh
        if needs_x:
            dx = dy2 @ weight
        if needs_W and x is not None:
            dW = dy2.t() @ _rows(x)
        if needs_B and h is not None:
            dB = (dy2.t() @ h * scale).to(lora_B.dtype)
        if needs_bias:
            dbias = dy2.sum(0)
    assert total_dh is not None
    if needs_x:
        lora_dx = _drop(total_dh @ A, mask, dropout_p)
        dx = lora_dx if dx is None else dx + lora_dx
    if needs_A and x is not None:
        dA = (total_dh.t() @ _drop(_rows(x), mask, dropout_p)).to(lora_A.dtype)
    return dx, dW, dA, dB, dbias


# --------------------------------------------------------------------------------------------------
# Dropout: the mask is a function of (seed, position), so nothing but the seed is ever kept
# --------------------------------------------------------------------------------------------------

_MIX_1, _MIX_2 = 0x7FEB352D, 0x846CA68B - (1 << 32)  # the second as a signed int32
_LANES = 1 << 16
# rows x columns that a block of the mask may hold: small enough to stay in a core's cache
_BLOCK_ELEMENTS = 1 << 18


def dropout_threshold(p: float) -> int:
    """p in units of 1/65536, the resolution of the mask; at least one value in 65536 is kept."""
    return min(round(p * _LANES), _LANES - 1)


def keep_scale(p: float) -> float:
    """1 / (1 - p) for the p that the mask really has."""
    return _LANES / (_LANES - dropout_threshold(p))


def dropout_mask(seed: Tensor, rows: int, cols: int, p: float, first_row: int = 0) -> Tensor:
    """True where an element is kept: (rows, cols) of bool, on the seed's device, without a host sync.

    seed: (1,) of int64.  Element e = row · cols + col takes the 16-bit lane ``e & 1`` of a 32-bit hash of ``e >> 1``:
    two rounds of the "lowbias32" mixer (https://nullprogram.com/blog/2018/07/31/), one for each half of the seed.
    The Triton kernels compute the same bits (``kernels/tiles.py``).
    """
    return (_lanes(seed, rows, cols, first_row) >= dropout_threshold(p) - _LANES // 2).view(rows, cols)


def whole_mask(seed: Tensor, rows: int, cols: int, p: float) -> Tensor:
    """The mask of a whole (rows, cols) tensor, as numbers: what the operators below also take for a seed."""
    if torch.compiler.is_compiling():
        # blocks are for caches, and a graph of blocks would be one number of rows'
        return _keep(seed, rows, cols, p, 0)
    blocks = [keep for _, keep in _mask_blocks(seed, p, rows, cols)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _mask_blocks(seed: Tensor, p: float, rows: int, cols: int) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of a (rows, cols) tensor, each with its part of the mask, as numbers."""
    step = max(1, _BLOCK_ELEMENTS // max(cols, 1))
    for first in range(0, rows, step):
        block = slice(first, min(first + step, rows))
        yield block, seed[block] if seed.dim() == 2 else _keep(seed, block.stop - first, cols, p, first)


def _keep(seed: Tensor, rows: int, cols: int, p: float, first_row: int) -> Tensor:
    """:func:`dropout_mask` as ones and zeros of int16, which are made and multiplied in vectors; bools are not."""
    least_kept = dropout_threshold(p) - _LANES // 2
    return _lanes(seed, rows, cols, first_row).clamp_(least_kept - 1, least_kept).sub_(least_kept - 1).view(rows, cols)


def _lanes(seed: Tensor, rows: int, cols: int, first_row: int) -> Tensor:
    """Hash of each position, int16: what is below the threshold in 1/65536, from -32768 on, is dropped."""
    first = first_row * cols
    words = (first + rows * cols + 1) // 2 - first // 2
    if first // 2 + words < 1 << 31:
        low = torch.arange(first // 2, first // 2 + words, dtype=torch.int32, device=seed.device)
        high = None
    else:
        index = torch.arange(first // 2, first // 2 + words, dtype=torch.int64, device=seed.device)
        low, high = index.to(torch.int32), (index >> 32).to(torch.int32)
    key_low, key_high = seed.to(torch.int32), (seed >> 32).to(torch.int32)
    # not in place: under torch.func.vmap a seed for each call is wider than the positions
    bits = _mix(low ^ key_low).bitwise_xor_(key_high)
    bits = _mix(bits if high is None else bits.bitwise_xor_(high))
    return bits.view(torch.int16)[first % 2 : first % 2 + rows * cols]


def _mix(bits: Tensor) -> Tensor:
    """lowbias32, in place. int32 shifts drag the sign along: mask it off."""
    bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(_MIX_1)
    bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).mul_(_MIX_2)
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))


# --------------------------------------------------------------------------------------------------
# The operators of ops.py, eagerly: the same results, in place, with no temporary of the output's size and dtype
# --------------------------------------------------------------------------------------------------


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
    """``out = a w + scale · (a u) v + bias`` and the thin product ``a u``.

    a: (..., Q).  w: (Q, P).  u: (Q, R).  v: (R, P).  bias: (P,) or None.  u and v are rounded to a's dtype.
    seed: (1,) of int64, or a :func:`whole_mask`, for dropout, else None: on a's elements inside ``a u``, or on those of
        ``(a u) v``.
    Returns out (..., P) and thin (M, R), both in a's dtype.
    """
    a2 = _rows(a)
    # whoever watches operators may keep their results (selective checkpointing does): those are not changed in place
    if a.dim() == 2 and torch._C._len_torch_dispatch_stack() == 0:
        out = out2 = _base_product(a, w, bias, dropout_on_output)
    else:
        # a view of a fresh tensor would not do: autograd minds who changes its outputs in place
        out = a.new_empty((*a.shape[:-1], w.shape[1]))
        out2 = out.view(a2.shape[0], w.shape[1])
        if bias is None:
            torch.mm(a2, w, out=out2)
        else:
            torch.addmm(bias, a2, w, out=out2)
    if u.dtype != a.dtype or v.dtype != a.dtype:
        u, v = u.to(a.dtype), v.to(a.dtype)
    if seed is None:
        thin = torch.mm(a2, u)
        out2.addmm_(thin, v, alpha=scale)
    elif dropout_on_output:
        thin = torch.mm(a2, u)
        for block, keep in _mask_blocks(seed, dropout_p, *out2.shape):
            out2[block].add_(torch.mm(thin[block], v).mul_(keep), alpha=scale * keep_scale(dropout_p))
    else:
        thin = a.new_empty((a2.shape[0], u.shape[1]))
        for block, keep in _mask_blocks(seed, dropout_p, *a2.shape):
            torch.mm(a2[block] * keep, u, out=thin[block])
        thin.mul_(keep_scale(dropout_p))
        out2.addmm_(thin, v, alpha=scale)
    return out, thin


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
    """``dA = scale · gᵀ D(x)`` in dtype_A where x and g are given, ``dB = scale · dyᵀ h`` in dtype_B likewise."""
    dA = dB = None
    if x is not None and g is not None:
        dA = _thin_product(g, _rows(x), scale, seed, dropout_p).to(dtype_A)
    if dy is not None and h is not None:
        # hᵀ dy, not dyᵀ h: the narrow matrix on the left is the faster product on a CPU
        dB = _thin_product(h, _rows(dy), scale, None, 0.0).t().to(dtype_B).contiguous()
    return dA, dB


def _thin_product(thin: Tensor, wide: Tensor, scale: float, seed: Tensor | None, dropout_p: float) -> Tensor:
    """``scale · thinᵀ D(wide)``: (R, C). Blocks of 16-bit rows are summed in float32."""
    if seed is None:
        product = torch.mm(thin.t(), wide)
        return product if scale == 1.0 else product.mul_(scale)
    dtype = torch.promote_types(wide.dtype, torch.float32)
    total = torch.zeros(thin.shape[1], wide.shape[1], dtype=dtype, device=wide.device)
    for block, keep in _mask_blocks(seed, dropout_p, *wide.shape):
        total += torch.mm(thin[block].t(), wide[block] * keep)
    return total.mul_(scale * keep_scale(dropout_p))


def _base_product(a: Tensor, w: Tensor, bias: Tensor | None, is_input_gradient: bool) -> Tensor:
    """``a w + bias`` of matrices. The forward is the product that ``nn.Linear`` makes, so that a fresh adapter changes
    no bit of it; the input gradient is free to take the faster library."""
    if bias is not None:
        return torch.addmm(bias, a, w)
    if is_input_gradient and a.dtype == torch.float32 and type(a) is Tensor and _onednn_is_faster() and a.is_cpu:
        return torch.ops.mkldnn._linear_pointwise(a, w.t(), None, "none", [], "")
    return torch.mm(a, w)


@functools.cache
def _onednn_is_faster() -> bool:
    """Whether float32 products should be oneDNN's: PyTorch's own come from MKL, which is at its best on Intel alone."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _rows(x: Tensor) -> Tensor:
    """(..., C) as (M, C): a view wherever the strides allow it."""
    return x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
