"""bitsandbytes' weights of four bits: what is kept, and what it stands for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class FourBits(NamedTuple):
    """A weight of four bits.

    q: bytes of any dtype, two elements in each, the first in the upper half.  code: the 16 values, float32.
    absmax: for each block of ``blocksize`` elements a float32 number; with double quantization a byte, which absmax2
    (one for ``blocksize2`` of them), code2 (256 values) and offset (a scalar), all float32, make a number.
    """

    q: Tensor
    code: Tensor
    absmax: Tensor
    blocksize: int
    absmax2: Tensor | None = None
    code2: Tensor | None = None
    offset: Tensor | None = None
    blocksize2: int = 0


# from bitsandbytes' documentation: NF4's quantiles; FP4's values in the order of their bits, over the largest
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in _FP4)
CODES = {"nf4": NF4, "fp4": FP4}


def plain(bits: FourBits, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """What bits stand for, in plain PyTorch: every step rounded to float32, the last to dtype; all of it in float64 for
    that dtype."""
    wide, numel = torch.float64 if dtype == torch.float64 else torch.float32, shape[0] * shape[1]
    q = bits.q.view(torch.uint8).flatten()
    places = torch.stack((q >> 4, q & 15), dim=1).flatten()[:numel]
    absmax = bits.absmax
    if bits.absmax2 is not None:
        assert bits.code2 is not None
        assert bits.offset is not None
        absmax2 = bits.absmax2.to(wide).repeat_interleave(bits.blocksize2)[: absmax.numel()]
        absmax = bits.code2.to(wide)[absmax.long()] * absmax2
        absmax = absmax + bits.offset.to(wide)
    absmax = absmax.to(wide).repeat_interleave(bits.blocksize)[:numel]
    return (bits.code.to(wide)[places.long()] * absmax).to(dtype).view(shape)


def random(
    shape: tuple[int, int], device: torch.device, code: str = "nf4", double: bool = True, blocksize: int = 64,
    blocksize2: int = 256,
) -> FourBits:  # fmt: skip
    """Any bits, from seed 0, with scales like a trained weight's."""
    generator = torch.Generator(device).manual_seed(0)
    numel = shape[0] * shape[1]
    blocks = -(-numel // blocksize)
    q = _bytes((-(-numel // 2), 1), generator)
    table = torch.tensor(CODES[code], device=device)
    if not double:
        absmax = torch.rand(blocks, generator=generator, device=device) * 0.1 + 0.01
        return FourBits(q, table, absmax, blocksize)
    absmax2 = torch.rand(-(-blocks // blocksize2), generator=generator, device=device) * 0.05
    code2, offset = torch.linspace(-1, 1, 256, device=device).pow(3), torch.tensor(0.0731, device=device)
    return FourBits(q, table, _bytes((blocks,), generator), blocksize, absmax2, code2, offset, blocksize2)


def _bytes(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, shape, generator=generator, device=generator.device, dtype=torch.uint8)
