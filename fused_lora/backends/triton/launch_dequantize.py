"""Four-bit weights into a buffer, on the host: a launch laid out as one before goes straight to the kernel."""

from __future__ import annotations

from torch import Tensor

from ...plans import Cache
from ...torch_internals import raw_stream
from ..four_bits import FourBits
from .prepare import dequantize_launch, reads_words
from .straight import Kept, keep

# a model's weights have few sizes
_MOST_KEPT = 256
_kept: Cache[Kept] = Cache(_MOST_KEPT)


def dequantize_4bit(bits: FourBits, out: Tensor) -> Tensor:
    """Fill out, contiguous, in one launch; returns it. The bits are those of bitsandbytes' ``dequantize_4bit``."""
    if not out.numel():
        return out
    key = (
        out.numel(), out.dtype, out.device, bits.blocksize, bits.blocksize2, bits.absmax.dtype, reads_words(bits, out)
    )  # fmt: skip
    kept = _kept.get(key)
    if kept is not None:
        tensors = (bits.q, bits.code, bits.absmax, bits.code2, bits.absmax2, bits.offset, out)
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        together = 0
        for pointer in pointers:
            together |= pointer
        if kept.usable(together):
            kept.launch(raw_stream(out.device.index), *pointers)
            return out
    launch = dequantize_launch(bits, out)
    compiled = launch.through_jit(out.device)
    kept = keep(launch, compiled, out.device)
    if kept is not None:
        _kept.put(key, kept)
    return out
