"""LoRA dropout: the mask is a function of (seed, position), so nothing but the seed is ever kept."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

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
    The Triton kernels compute the same bits (``backends/triton/kernels/tiles.py``).
    """
    return (_lanes(seed, rows, cols, first_row) >= dropout_threshold(p) - _LANES // 2).view(rows, cols)


def whole_mask(seed: Tensor, rows: int, cols: int, p: float) -> Tensor:
    """The mask of a whole (rows, cols) tensor, as numbers: what the eager operators also take for a seed."""
    if torch.compiler.is_compiling() or rows == 0:
        # blocks are for caches, and a graph of blocks would be one number of rows'; no rows have no block
        return _keep(seed, rows, cols, p, 0)
    blocks = [keep for _, keep in mask_blocks(seed, p, rows, cols)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def mask_blocks(seed: Tensor, p: float, rows: int, cols: int) -> Iterator[tuple[slice, Tensor]]:
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
