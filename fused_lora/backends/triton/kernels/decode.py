"""Decode and other few rows (``decode_configs.takes_decode``): reading w takes all the time, so the whole GPU reads it.

One launch. ROWS rows are one tile tall, all tokens of a step of decoding; w's columns are tiles, and Q is cut into
parts, so that there are more programs than SMs. A program takes a ticket: the lowest make the parts of ``h = a u``, the
others parts of ``a w``, each in a float32 slot of its own, and the last to arrive at a tile sums its slots, in their
order. Whoever waits for h has a higher ticket, so what it waits for is running or done, whatever order programs start
in.

Where all tokens are one tile tall, no bit of a token's results hangs on how many others share the tile: the rule cuts Q
by ROWS and by the sizes of w and u alone.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .tiles import dot, multiple_of, round_to


class Variant(NamedTuple):
    """What one compiled variant of the kernel is for: the kernel's only constexpr.

    DIVISORS: of P, Q, R and the strides of a, w, u and v (``tiles.multiple_of``).
    """

    DIVISORS: tuple[int, ...]
    HAS_BIAS: bool
    EVEN_Q: bool
    PRECISION: str
    BLOCK_P: int
    BLOCK_Q: int
    BLOCK_R: int
    SPLIT: int
    SPLIT_H: int
    ROWS: int


@triton.jit(do_not_specialize=["M"])
def _decode_kernel(
    a_ptr, w_ptr, u_ptr, v_ptr, bias_ptr, out_ptr, h_ptr, slots_ptr, counters_ptr, scale,
    M, P, Q, R,
    stride_am, stride_aq, stride_wq, stride_wp, stride_uq, stride_ur, stride_vr, stride_vp,
    V: tl.constexpr,
):  # fmt: skip
    """A part of ``h = a u`` or of ``out = a w + scale · h v + bias``, and the sum of a tile's parts.

    out (M, P) and h (M, R) are contiguous, in a's dtype. slots: float32, those of h's tiles first.
    counters: tickets taken, tiles of out stored, tiles of h stored, then parts arrived at each tile, h's first.
    All are zero before and after.
    """
    BLOCK_P: tl.constexpr = V.BLOCK_P
    BLOCK_R: tl.constexpr = V.BLOCK_R
    ROWS: tl.constexpr = V.ROWS
    PRECISION: tl.constexpr = V.PRECISION
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    # of the loop over ranks at a tile's end; float32 spills if it is as deep as the main loop, in Triton 3.6
    RANK_STAGES: tl.constexpr = 2 if dtype == tl.float32 else None
    # loaded one by one, 128 rows of v or h leave no registers
    D: tl.constexpr = V.DIVISORS
    P, Q, R = multiple_of(P, D[0]), multiple_of(Q, D[1]), multiple_of(R, D[2])
    stride_am, stride_aq = multiple_of(stride_am, D[3]), multiple_of(stride_aq, D[4])
    stride_wq, stride_wp = multiple_of(stride_wq, D[5]), multiple_of(stride_wp, D[6])
    stride_uq, stride_ur = multiple_of(stride_uq, D[7]), multiple_of(stride_ur, D[8])
    stride_vr, stride_vp = multiple_of(stride_vr, D[9]), multiple_of(stride_vp, D[10])
    tiles_m = tl.cdiv(M, ROWS)
    tiles, h_tiles = tiles_m * tl.cdiv(P, BLOCK_P), tiles_m * tl.cdiv(R, BLOCK_R)
    stored_ptr, h_stored_ptr, arrived_ptr = counters_ptr + 1, counters_ptr + 2, counters_ptr + 3
    h_parts = h_tiles * V.SPLIT_H
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    if ticket < h_parts:
        tile, part = ticket // V.SPLIT_H, ticket % V.SPLIT_H
        offs_m = (tile % tiles_m).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        offs_r = (tile // tiles_m).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        h = _part_of_product(
            a_ptr, u_ptr, offs_r, offs_m, part, R, M, Q, stride_am, stride_aq, stride_uq, stride_ur,
            dtype, V, BLOCK_R, V.SPLIT_H,
        )  # fmt: skip
        tile_ptr = slots_ptr + tile * (V.SPLIT_H * BLOCK_R * ROWS)
        if _arrives_last(h, tile_ptr, part, arrived_ptr + tile, BLOCK_R, V.SPLIT_H, ROWS):
            h = _sum_of_parts(h, tile_ptr, BLOCK_R, V.SPLIT_H, ROWS)
            h_ptrs = h_ptr + offs_r[:, None] + offs_m[None, :] * R
            tl.store(h_ptrs, round_to(h, dtype), mask=(offs_r < R)[:, None] & (offs_m < M)[None, :])
            tl.debug_barrier()
            tl.atomic_add(h_stored_ptr, 1, sem="release")
    else:
        tile, part = (ticket - h_parts) // V.SPLIT, (ticket - h_parts) % V.SPLIT
        # blocks of rows are neighbours: what one reads of w, the next finds in L2
        offs_m = (tile % tiles_m).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        offs_p = (tile // tiles_m).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
        mask_m, mask_p = offs_m < M, offs_p < P
        acc = _part_of_product(
            a_ptr, w_ptr, offs_p, offs_m, part, P, M, Q, stride_am, stride_aq, stride_wq, stride_wp,
            dtype, V, BLOCK_P, V.SPLIT,
        )  # fmt: skip
        tile_ptr = slots_ptr + h_parts * (BLOCK_R * ROWS) + tile.to(tl.int64) * (V.SPLIT * BLOCK_P * ROWS)
        if _arrives_last(acc, tile_ptr, part, arrived_ptr + h_tiles + tile, BLOCK_P, V.SPLIT, ROWS):
            acc = _sum_of_parts(acc, tile_ptr, BLOCK_P, V.SPLIT, ROWS)
            while tl.atomic_add(h_stored_ptr, 0, sem="acquire") < h_tiles:
                pass
            tl.debug_barrier()
            for r in tl.range(0, R, BLOCK_R, num_stages=RANK_STAGES):
                offs_r = r + tl.arange(0, BLOCK_R).to(tl.int64)
                mask_r = offs_r < R
                h_ptrs = h_ptr + offs_r[:, None] + offs_m[None, :] * R
                h = tl.load(h_ptrs, mask=mask_r[:, None] & mask_m[None, :], other=0.0)
                v_ptrs = v_ptr + offs_p[:, None] * stride_vp + offs_r[None, :] * stride_vr
                v = tl.load(v_ptrs, mask=mask_p[:, None] & mask_r[None, :], other=0.0)
                # scale goes onto v, as in lora_matmul.py
                v = round_to(v.to(tl.float32) * scale, dtype)
                lora = dot(v, h, tl.zeros((BLOCK_P, ROWS), tl.float32), PRECISION)
                # what is done with it here waits for the product, so that v's registers don't take the next ranks
                # before it has read them, as ptxas before 13.3 lets them (sass.py)
                acc += tl.where(mask_p[:, None], lora, 0.0)
            if V.HAS_BIAS:
                acc += tl.load(bias_ptr + offs_p, mask=mask_p, other=0.0).to(tl.float32)[:, None]
            out_ptrs = out_ptr + offs_p[:, None] + offs_m[None, :] * P
            tl.store(out_ptrs, round_to(acc, dtype), mask=mask_p[:, None] & mask_m[None, :])
            # every ticket is taken and every wait is over once the last tile is here
            if tl.atomic_add(stored_ptr, 1, sem="acq_rel") == tiles - 1:
                tl.store(counters_ptr, 0)
                tl.store(stored_ptr, 0)
                tl.store(h_stored_ptr, 0)


@triton.jit
def _part_of_product(
    a_ptr, w_ptr, offs_c, offs_m, part, C, M, Q, stride_am, stride_aq, stride_wq, stride_wc,
    dtype: tl.constexpr, V: tl.constexpr, BLOCK_C: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """``(a w)ᵀ`` at columns offs_c and rows offs_m, over one of PARTS parts of Q, none empty.

    (BLOCK_C, ROWS) of float32.

    Transposed, so that w is the side of a matrix instruction that is 64 wide, and the tokens the narrow one.
    """
    BLOCK_Q: tl.constexpr = V.BLOCK_Q
    ROWS: tl.constexpr = V.ROWS
    PRECISION: tl.constexpr = V.PRECISION
    steps = tl.cdiv(Q, BLOCK_Q)
    first = steps * part // PARTS
    last = steps * (part + 1) // PARTS
    mask_m = offs_m < M
    offs_q = first.to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    a_ptrs = a_ptr + offs_q[:, None] * stride_aq + offs_m[None, :] * stride_am
    # columns past the end wrap around: what they give is never stored
    w_ptrs = w_ptr + (offs_c % C)[:, None] * stride_wc + offs_q[None, :] * stride_wq
    acc = tl.zeros((BLOCK_C, ROWS), tl.float32)
    step = tl.full((), BLOCK_Q, tl.int64)
    # at least one trip, stated, as in lora_matmul.py
    for _ in range(first, tl.maximum(last, first + 1)):
        if V.EVEN_Q:
            a = tl.load(a_ptrs, mask=mask_m[None, :], other=0.0)
            w = tl.load(w_ptrs, eviction_policy="evict_first")
        else:
            mask_q = offs_q < Q
            a = tl.load(a_ptrs, mask=mask_q[:, None] & mask_m[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_q[None, :], other=0.0, eviction_policy="evict_first")
            offs_q += BLOCK_Q
        acc = dot(round_to(w, dtype), a, acc, PRECISION)
        a_ptrs += step * stride_aq
        w_ptrs += step * stride_wq
    return acc


@triton.jit
def _slot_ptrs(tile_ptr, part, BLOCK_C: tl.constexpr, ROWS: tl.constexpr):
    return tile_ptr + part * (BLOCK_C * ROWS) + tl.arange(0, BLOCK_C)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]


@triton.jit
def _arrives_last(acc, tile_ptr, part, arrived_ptr, BLOCK_C: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr):
    """Put acc into its slot; whether all other parts of the tile are in theirs. Then the counter is zero again.

    An only part needs no slot.
    """
    last = tl.full((), 1, tl.int1)
    if PARTS > 1:
        tl.store(_slot_ptrs(tile_ptr, part, BLOCK_C, ROWS), acc)
        tl.debug_barrier()
        last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == PARTS - 1
        if last:
            tl.store(arrived_ptr, 0)
        tl.debug_barrier()
    return last


@triton.jit
def _sum_of_parts(acc, tile_ptr, BLOCK_C: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr):
    """acc is this program's part: all there is, or in a slot too."""
    if PARTS > 1:
        acc = tl.load(_slot_ptrs(tile_ptr, 0, BLOCK_C, ROWS))
        if ROWS < 128:
            for part in tl.static_range(1, PARTS):
                acc += tl.load(_slot_ptrs(tile_ptr, part, BLOCK_C, ROWS))
        else:
            # one after the other: all on their way at once would leave no registers
            for part in range(1, PARTS):
                acc += tl.load(_slot_ptrs(tile_ptr, part, BLOCK_C, ROWS))
    return acc
