"""Device helpers that the kernels share: order of programs, matrix product, dropout bits."""

from __future__ import annotations

import triton
import triton.language as tl

from ....backends.environment import interpreting

INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def grouped_order(pid, tiles_m, tiles_p, GROUP_M: tl.constexpr):
    """Tile (pid_m, pid_p): GROUP_M row blocks at a time, so that neighbours share operands in L2."""
    per_group = GROUP_M * tiles_p
    first_m = pid // per_group * GROUP_M
    rows = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + pid % per_group % rows, pid % per_group // rows


@triton.jit
def multiple_of(size, N: tl.constexpr):
    """size, of which the compiler is told that N divides it: how wide loads and stores may be hangs on that."""
    if N > 1:
        size = size // N * N
    return size


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a b`` in float32. The interpreter multiplies raw bits of bfloat16, so there both are widened first."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """x in dtype, to nearest. The interpreter cuts off the bits that bfloat16 lacks, so there it is rounded first."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def _mix(bits):
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def keep_mask(seed, rows, cols, row_length, threshold):
    """``dropout.dropout_mask`` at rows x cols, both int64 vectors, of a matrix with row_length columns."""
    element = rows[:, None] * row_length + cols[None, :]
    word = element >> 1
    bits = _mix(word.to(tl.uint32) ^ seed.to(tl.uint32)) ^ (seed >> 32).to(tl.uint32)
    bits = _mix(bits ^ (word >> 32).to(tl.uint32))
    lane = (bits >> ((element & 1) * 16).to(tl.uint32)) & 0xFFFF
    return lane.to(tl.uint16).to(tl.int16, bitcast=True) >= threshold - 32768
