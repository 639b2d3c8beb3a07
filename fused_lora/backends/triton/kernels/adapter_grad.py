"""The adapter gradients in one launch, two reductions over M: ``dA = scale · gᵀ D(x)``, ``dB = scale · dyᵀ h``."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .tiles import dot, keep_mask, multiple_of, round_to


class Variant(NamedTuple):
    """What one compiled variant of the kernel is for: the kernel's only constexpr.

    SPLIT: there are several parts of M, each with a slot in partials (parts, tiles, BLOCK_C, BLOCK_R); the last program
    of a tile to arrive sums the slots in their order, whoever came first, so the bits are the same every time.
    WGMMA: as in ``lora_matmul.py``.
    DIVISORS: of K, N, R and the strides of x, g, dy and h (``tiles.multiple_of``).
    """

    DROPOUT: bool
    SPLIT: bool
    WGMMA: bool
    DIVISORS: tuple[int, ...]
    PRECISION: str
    BLOCK_M: int
    BLOCK_C: int
    BLOCK_R: int


@triton.jit(do_not_specialize=["M", "tiles_A"])
def _adapter_grad_kernel(
    x_ptr, g_ptr, dy_ptr, h_ptr, dA_ptr, dB_ptr, partials_ptr, arrived_ptr, scale, seed_ptr,
    M, K, N, R, tiles_A,
    stride_xm, stride_xk, stride_gm, stride_gr, stride_dym, stride_dyn, stride_hm, stride_hr,
    keep_scale, threshold,
    V: tl.constexpr,
):  # fmt: skip
    """A program reduces one part of M for a block of columns and a block of ranks.

    Of the blocks of columns the first tiles_A are x's, the others dy's.
    """
    BLOCK_C: tl.constexpr = V.BLOCK_C
    BLOCK_R: tl.constexpr = V.BLOCK_R
    D: tl.constexpr = V.DIVISORS
    K, N, R = multiple_of(K, D[0]), multiple_of(N, D[1]), multiple_of(R, D[2])
    stride_xm, stride_xk = multiple_of(stride_xm, D[3]), multiple_of(stride_xk, D[4])
    stride_gm, stride_gr = multiple_of(stride_gm, D[5]), multiple_of(stride_gr, D[6])
    stride_dym, stride_dyn = multiple_of(stride_dym, D[7]), multiple_of(stride_dyn, D[8])
    stride_hm, stride_hr = multiple_of(stride_hm, D[9]), multiple_of(stride_hr, D[10])
    tile = tl.program_id(0)
    # neighbouring programs read the same columns: the second finds them in L2
    rank_blocks = tl.cdiv(R, BLOCK_R)
    pid_c = tile // rank_blocks
    offs_r = (tile % rank_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    if pid_c < tiles_A:
        offs_c = pid_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
        acc = _reduce(
            x_ptr, g_ptr, seed_ptr, offs_c, offs_r, M, K, R, stride_xm, stride_xk, stride_gm, stride_gr,
            threshold, V.DROPOUT, V,
        )  # fmt: skip
        # names of their own in each branch: dA and dB may differ in dtype
        dA_ptrs = dA_ptr + offs_r[None, :] * K + offs_c[:, None]
        mask = (offs_c < K)[:, None] & (offs_r < R)[None, :]
        _finish(acc, scale * keep_scale, dA_ptrs, mask, partials_ptr, arrived_ptr, V)
    else:
        offs_c = (pid_c - tiles_A).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
        acc = _reduce(
            dy_ptr, h_ptr, seed_ptr, offs_c, offs_r, M, N, R, stride_dym, stride_dyn, stride_hm, stride_hr,
            threshold, False, V,
        )  # fmt: skip
        dB_ptrs = dB_ptr + offs_c[:, None] * R + offs_r[None, :]
        mask = (offs_c < N)[:, None] & (offs_r < R)[None, :]
        _finish(acc, scale, dB_ptrs, mask, partials_ptr, arrived_ptr, V)


@triton.jit
def _reduce(
    x_ptr, h_ptr, seed_ptr, offs_c, offs_r, M, C, R, stride_xm, stride_xc, stride_hm, stride_hr, threshold,
    DROPOUT: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """``Σ_m x[m, c] · h[m, r]`` over this part's rows, as (BLOCK_C, BLOCK_R): the rank is the narrow side."""
    BLOCK_M: tl.constexpr = V.BLOCK_M
    BLOCK_C: tl.constexpr = V.BLOCK_C
    BLOCK_R: tl.constexpr = V.BLOCK_R
    PRECISION: tl.constexpr = V.PRECISION
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    if V.SPLIT:
        # whole blocks of rows, as evenly as they go; a part may be empty
        blocks, part, parts = tl.cdiv(M, BLOCK_M), tl.program_id(1), tl.num_programs(1)
        first = blocks * part // parts * BLOCK_M
        rows = tl.minimum(blocks * (part + 1) // parts * BLOCK_M, M) - first
        offs_m += first
    else:
        rows = M
    # loaded as the product takes it: a transpose in between would keep the copies to shared memory synchronous
    x_ptrs = x_ptr + offs_m[None, :] * stride_xm + (offs_c % C)[:, None] * stride_xc
    h_ptrs = h_ptr + offs_m[:, None] * stride_hm + offs_r[None, :] * stride_hr
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    step = tl.full((), BLOCK_M, tl.int64)
    for m in range(0, tl.maximum(rows, BLOCK_M), BLOCK_M):
        mask_m = tl.arange(0, BLOCK_M) < rows - m
        x = tl.load(x_ptrs, mask=mask_m[None, :], other=0.0)
        h = tl.load(h_ptrs, mask=mask_m[:, None] & (offs_r < R)[None, :], other=0.0)
        if DROPOUT:
            x = tl.where(tl.trans(keep_mask(seed, offs_m + m, offs_c, C, threshold)), x, 0.0)
        acc = dot(x, h, acc, PRECISION)
        if DROPOUT and V.WGMMA:
            # for the registers of the masked x, as there
            acc = tl.where((offs_c < C)[:, None], acc, 0.0)
        x_ptrs += step * stride_xm
        h_ptrs += step * stride_hm
    return acc


@triton.jit
def _finish(
    acc, factor, out_ptrs, mask, partials_ptr, arrived_ptr, V: tl.constexpr,
):  # fmt: skip
    """Store the sum of every part's acc, times factor: only the last program of the tile to come here does."""
    BLOCK_C: tl.constexpr = V.BLOCK_C
    BLOCK_R: tl.constexpr = V.BLOCK_R
    last = True
    if V.SPLIT:
        tile, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
        offs = tl.arange(0, BLOCK_C)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        slots = partials_ptr + tile.to(tl.int64) * (BLOCK_C * BLOCK_R) + offs
        stride = tl.num_programs(0).to(tl.int64) * (BLOCK_C * BLOCK_R)
        # past L1, which does not see the stores of other SMs
        tl.store(slots + part * stride, acc, cache_modifier=".cg")
        # every thread's store comes before the one thread's release
        tl.debug_barrier()
        last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == parts - 1
    if last:
        if V.SPLIT:
            # and the one thread's acquire before every thread's load
            tl.debug_barrier()
            acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
            # 16 KB of loads in flight, where that needs few registers
            for _ in tl.range(0, parts, loop_unroll_factor=4096 // (BLOCK_C * BLOCK_R) or 1):
                acc += tl.load(slots, cache_modifier=".cg")
                slots += stride
            tl.store(arrived_ptr + tile, 0)
        tl.store(out_ptrs, round_to(acc * factor, out_ptrs.dtype.element_ty), mask=mask)
