"""Four-bit weights of bitsandbytes into a buffer, in one launch: ``out[i] = code[q[i]] · absmax[i // blocksize]``.

Elements lie two in a byte, the first in its upper half; code is one of the 16 values of NF4 or FP4. With double
quantization absmax is one of 256 values itself: ``code2[absmax[b]] · absmax2[b // blocksize2] + offset``. All of it is
float32, rounded once, at the end, to out's dtype: the bits are those of bitsandbytes.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .tiles import round_to


class Variant(NamedTuple):
    """What one compiled variant of the kernel is for: the kernel's only constexpr.

    BLOCKSIZE, BLOCKSIZE_2: elements of one absmax, absmaxes of one absmax2.  BLOCK: elements of one program, whole
    blocks, whose absmax share one absmax2.  WORDS: q is read eight elements at a time; otherwise byte by byte, as an
    end that fills no word must be.
    """

    NESTED: bool
    WORDS: bool
    BLOCKSIZE: int
    BLOCKSIZE_2: int
    BLOCK: int


@triton.jit(do_not_specialize=["blocks"])
def _dequantize_4bit_kernel(
    q_ptr, code_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, out_ptr,
    numel, words, blocks,
    V: tl.constexpr,
):  # fmt: skip
    """A program fills BLOCK elements: a row for each block of the quantization.

    numel, words, blocks: of all programs together. words is numel / 8, passed for what Triton learns of its multiples.
    """
    ROWS: tl.constexpr = V.BLOCK // V.BLOCKSIZE
    ROW_WORDS: tl.constexpr = V.BLOCKSIZE // 8
    pid = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, ROWS)
    scales = _scales(absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, pid * ROWS, rows, blocks, V)

    offs = rows[:, None] * ROW_WORDS + tl.arange(0, ROW_WORDS)[None, :]
    first_word = pid * (V.BLOCK // 8)
    if V.WORDS:
        mask = offs < tl.minimum(words - first_word, V.BLOCK // 8).to(tl.int32)
        q = tl.load(q_ptr + first_word + offs, mask=mask, other=0)
    else:
        # the four bytes of a word; the last one may hold one element
        places = tl.arange(0, 4)[None, None, :]
        offs_byte = offs[:, :, None] * 4 + places
        mask = offs_byte < tl.minimum((numel + 1) // 2 - first_word * 4, V.BLOCK // 2).to(tl.int32)
        q = tl.load(q_ptr + first_word * 4 + offs_byte, mask=mask, other=0).to(tl.int32)
        q = tl.sum(q << places * 8, axis=2)
    # a word's lowest byte comes first, and of a byte the upper half
    shifts = (tl.arange(0, 8) ^ 1) * 4
    places = (q[:, :, None] >> shifts[None, None, :]) & 15
    # from shared memory, where 16 values lie in 16 banks: no two threads ever collide
    code = tl.load(code_ptr + tl.arange(0, 16))
    values = tl.gather(code, places.reshape(V.BLOCK), 0).reshape(ROWS, ROW_WORDS, 8)
    values = round_to(values * scales[:, None, None], out_ptr.dtype.element_ty).reshape(ROWS, V.BLOCKSIZE)

    offs = rows[:, None] * V.BLOCKSIZE + tl.arange(0, V.BLOCKSIZE)[None, :]
    first = pid * V.BLOCK
    mask = offs < tl.minimum(numel - first, V.BLOCK).to(tl.int32)
    tl.store(out_ptr + first + offs, values, mask=mask)


@triton.jit
def _scales(absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, first, rows, blocks, V: tl.constexpr):
    """absmax of this program's rows of blocks, the first of which is block ``first``."""
    mask = rows < tl.minimum(blocks - first, V.BLOCK // V.BLOCKSIZE).to(tl.int32)
    absmax = tl.load(absmax_ptr + first + rows, mask=mask, other=0)
    if V.NESTED:
        # the same for all of a program's rows
        absmax2 = tl.load(absmax2_ptr + first // V.BLOCKSIZE_2)
        # the product is rounded before the sum, as bitsandbytes rounds it: a bare product would become one
        # multiply-add with the sum
        absmax = tl.fma(tl.load(code2_ptr + absmax.to(tl.int32)), absmax2, 0.0) + tl.load(offset_ptr)
    return absmax.to(tl.float32)
