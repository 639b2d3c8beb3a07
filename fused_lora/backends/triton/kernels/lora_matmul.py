"""The one kernel: forward and input gradient, which differ only in operands and strides (``reference.py``).

Every tile of ``out = a w + scale · (a u) v + bias`` needs its rows of the low-rank product ``h = a u``. The schedule
says who computes them:

    RECOMPUTE  every tile, for itself, in its main loop. Nobody waits; every tile pays for u.
    PUBLISH    the tiles of the first column, in their main loops, which store them and raise a flag; the others run a
               plain GEMM and wait in their epilogue. One tile in P / BLOCK_P pays.
    PRODUCE    programs that do nothing else, SPLIT to a row of tiles, each for a part of Q. For launches so small that
               there are SMs to spare.
    PLAIN      nobody: ``a w + bias``, the bare GEMM that codegen/ holds the main loop to.

Work is handed out by ticket, and whoever is waited for holds a lower ticket than all who wait: it is running or done,
whatever order programs start in, so waiting ends. The last program to leave resets the counters for the next launch.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .tiles import dot, grouped_order, keep_mask, multiple_of, round_to

# sync: tickets handed out, programs that have left, then a flag for each row of tiles
SYNC_HEADER = 2


class Variant(NamedTuple):
    """What one compiled variant of the kernel is for: the kernel's only constexpr.

    RECOMPUTE, PUBLISH, PRODUCE: the schedule; none of them is PLAIN.  SPLIT: 1 but for PRODUCE, and at most the number
    of BLOCK_Q in Q.
    FAR: offsets within a tile's rows of a, within w or within u may not fit int32.
    DESCRIPTORS: a_ptr and w_ptr are tensor descriptors, of blocks (BLOCK_M, BLOCK_Q) and (BLOCK_Q, BLOCK_P), the latter
    of wᵀ if W_ALONG_Q: contiguous dimensions come last.
    MANY_RANKS: R is greater than BLOCK_R.
    DIVISORS: of P, Q, R and the strides of a, w, u and v (``tiles.multiple_of``).
    WGMMA: matrix instructions read the masked a out of registers, and the program does not wait for them.
    """

    RECOMPUTE: bool
    PUBLISH: bool
    PRODUCE: bool
    SPLIT: int
    HAS_BIAS: bool
    DROP_INPUT: bool
    DROP_OUTPUT: bool
    EVEN_Q: bool
    FAR: bool
    DESCRIPTORS: bool
    W_ALONG_Q: bool
    MANY_RANKS: bool
    WGMMA: bool
    DIVISORS: tuple[int, ...]
    PRECISION: str
    BLOCK_M: int
    BLOCK_P: int
    BLOCK_Q: int
    BLOCK_R: int
    GROUP_M: int
    SYNC_HEADER: int = SYNC_HEADER


class Operands(NamedTuple):
    """What a main loop reads."""

    a: tl.tensor
    w: tl.tensor
    u: tl.tensor
    seed: tl.tensor
    M: tl.tensor
    P: tl.tensor
    Q: tl.tensor
    R: tl.tensor
    stride_am: tl.tensor
    stride_aq: tl.tensor
    stride_wq: tl.tensor
    stride_wp: tl.tensor
    stride_uq: tl.tensor
    stride_ur: tl.tensor
    threshold: tl.tensor


@triton.jit(do_not_specialize=["M"])
def _lora_matmul_kernel(
    a_ptr, w_ptr, u_ptr, v_ptr, bias_ptr, out_ptr, h_ptr, parts_ptr, sync_ptr, scale, seed_ptr,
    M, P, Q, R,
    stride_am, stride_aq, stride_wq, stride_wp, stride_uq, stride_ur, stride_vr, stride_vp,
    keep_scale, threshold,
    V: tl.constexpr,
):  # fmt: skip
    """out (M, P) and h (M, R) are contiguous, in a's dtype.

    parts: (SPLIT, M, R) of float32, for PRODUCE.  sync: SYNC_HEADER + rows of tiles, of int32, all zero, for PUBLISH
    and PRODUCE.
    """
    BLOCK_M: tl.constexpr = V.BLOCK_M
    BLOCK_P: tl.constexpr = V.BLOCK_P
    BLOCK_R: tl.constexpr = V.BLOCK_R
    PRECISION: tl.constexpr = V.PRECISION
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    D: tl.constexpr = V.DIVISORS
    P, Q, R = multiple_of(P, D[0]), multiple_of(Q, D[1]), multiple_of(R, D[2])
    stride_am, stride_aq = multiple_of(stride_am, D[3]), multiple_of(stride_aq, D[4])
    stride_wq, stride_wp = multiple_of(stride_wq, D[5]), multiple_of(stride_wp, D[6])
    stride_uq, stride_ur = multiple_of(stride_uq, D[7]), multiple_of(stride_ur, D[8])
    stride_vr, stride_vp = multiple_of(stride_vr, D[9]), multiple_of(stride_vp, D[10])
    seed = tl.full((), 0, tl.int64)
    if V.DROP_INPUT or V.DROP_OUTPUT:
        seed = tl.load(seed_ptr)
    operands = Operands(
        a_ptr, w_ptr, u_ptr, seed, M, P, Q, R,
        stride_am, stride_aq, stride_wq, stride_wp, stride_uq, stride_ur, threshold,
    )  # fmt: skip
    h_scale = keep_scale if V.DROP_INPUT else 1.0
    # the rest of the ranks are walked in a loop only where there are any
    end_r = R if V.MANY_RANKS else BLOCK_R
    tiles_m, tiles_p = tl.cdiv(M, BLOCK_M), tl.cdiv(P, BLOCK_P)
    producers = tiles_m * V.SPLIT if V.PRODUCE else 0
    flags_ptr = sync_ptr + V.SYNC_HEADER if V.PUBLISH or V.PRODUCE else sync_ptr

    ticket = tl.program_id(0)
    if V.PUBLISH or V.PRODUCE:
        ticket = tl.atomic_add(sync_ptr, 1, sem="relaxed")
    if V.PRODUCE:
        if ticket < producers:
            pid_m, part = ticket // V.SPLIT, ticket % V.SPLIT
            blocks = tl.cdiv(Q, V.BLOCK_Q)
            first_q = part * blocks // V.SPLIT * V.BLOCK_Q
            last_q = tl.minimum((part + 1) * blocks // V.SPLIT * V.BLOCK_Q, Q)
            for first_r in range(0, end_r, BLOCK_R):
                _, h = _products(operands, pid_m, 0, first_r, first_q, last_q, dtype, V, WITH_BASE=False, WITH_H=True)
                _store_h(parts_ptr + part.to(tl.int64) * M * R, h, pid_m, first_r, M, R, V)
            _raise_flag(flags_ptr + pid_m)
    if ticket >= producers:
        pid_m, pid_p = _tile(ticket - producers, tiles_m, tiles_p, V)
        if V.PUBLISH:
            if pid_p == 0:
                acc, h = _products(operands, pid_m, 0, 0, 0, Q, dtype, V, WITH_BASE=True, WITH_H=True)
                _store_h(h_ptr, round_to(h * h_scale, dtype), pid_m, 0, M, R, V)
                for first_r in range(BLOCK_R, end_r, BLOCK_R):
                    _, h = _products(operands, pid_m, 0, first_r, 0, Q, dtype, V, WITH_BASE=False, WITH_H=True)
                    _store_h(h_ptr, round_to(h * h_scale, dtype), pid_m, first_r, M, R, V)
                _raise_flag(flags_ptr + pid_m)
            else:
                acc, _ = _products(operands, pid_m, pid_p, 0, 0, Q, dtype, V, WITH_BASE=True, WITH_H=False)
        else:
            acc, h = _products(operands, pid_m, pid_p, 0, 0, Q, dtype, V, WITH_BASE=True, WITH_H=V.RECOMPUTE)
        if V.PUBLISH or V.PRODUCE:
            _await_flag(flags_ptr + pid_m, V.SPLIT)

        offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_p = pid_p.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
        mask_p = offs_p < P
        lora = tl.zeros((BLOCK_M, BLOCK_P), tl.float32) if V.DROP_OUTPUT else acc
        if V.RECOMPUTE or V.PUBLISH or V.PRODUCE:
            for first_r in range(0, end_r, BLOCK_R):
                if V.PUBLISH:
                    rounded = _load_h(h_ptr, pid_m, first_r, M, R, V)
                else:
                    if V.PRODUCE:
                        h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
                        for part in range(V.SPLIT):
                            h += _load_h(parts_ptr + part * tl.cast(M, tl.int64) * R, pid_m, first_r, M, R, V)
                    elif V.MANY_RANKS:
                        if first_r > 0:
                            _, h = _products(operands, pid_m, 0, first_r, 0, Q, dtype, V, WITH_BASE=False, WITH_H=True)
                    # round h here: reference.py rounds at the same point
                    rounded = round_to(h * h_scale, dtype)
                    if pid_p == 0:
                        _store_h(h_ptr, rounded, pid_m, first_r, M, R, V)
                # scale goes onto v, which is small, so float16 does not overflow
                offs_r = tl.arange(0, BLOCK_R).to(tl.int64) + first_r
                v_ptrs = v_ptr + offs_r[:, None] * stride_vr + offs_p[None, :] * stride_vp
                v = tl.load(v_ptrs, mask=(offs_r < R)[:, None] & mask_p[None, :], other=0.0)
                lora = dot(rounded, round_to(v.to(tl.float32) * scale, dtype), lora, PRECISION)
        if V.DROP_OUTPUT:
            lora = acc + tl.where(keep_mask(seed, offs_m, offs_p, P, threshold), lora * keep_scale, 0.0)
        if V.HAS_BIAS:
            lora += tl.load(bias_ptr + offs_p, mask=mask_p, other=0.0).to(tl.float32)[None, :]
        out_ptrs = out_ptr + offs_m[:, None] * P + offs_p[None, :]
        tl.store(out_ptrs, round_to(lora, dtype), mask=(offs_m < M)[:, None] & mask_p[None, :])
    if V.PUBLISH or V.PRODUCE:
        _leave(sync_ptr, tiles_m + V.SYNC_HEADER)


@triton.jit
def _products(
    o, pid_m, pid_p, first_r, first_q, last_q, dtype: tl.constexpr, V: tl.constexpr,
    WITH_BASE: tl.constexpr, WITH_H: tl.constexpr,
):  # fmt: skip
    """``(a w, a u)`` of a tile, over a's columns from first_q to last_q: one pass over a; zero where not asked for."""
    BLOCK_M: tl.constexpr = V.BLOCK_M
    BLOCK_P: tl.constexpr = V.BLOCK_P
    BLOCK_Q: tl.constexpr = V.BLOCK_Q
    BLOCK_R: tl.constexpr = V.BLOCK_R
    PRECISION: tl.constexpr = V.PRECISION
    # one 64-bit base and offsets of 32 bits where they suffice: half the registers and address arithmetic of pointers
    index: tl.constexpr = tl.int64 if V.FAR else tl.int32
    first_m = pid_m.to(tl.int64) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M).to(index)
    offs_p = tl.arange(0, BLOCK_P).to(index) + pid_p * BLOCK_P
    offs_q = tl.arange(0, BLOCK_Q).to(index) + first_q
    offs_r = tl.arange(0, BLOCK_R).to(index) + first_r
    mask_r = offs_r < o.R
    # rows past the end repeat the last, columns wrap around: what they give is never stored, and no load needs a mask
    rows = tl.minimum(offs_m, (o.M - 1 - first_m).to(index))
    if not V.DESCRIPTORS:
        a_tile_ptr = o.a + first_m * o.stride_am
    a_offs = rows[:, None] * o.stride_am + offs_q[None, :] * o.stride_aq
    w_offs = offs_q[:, None] * o.stride_wq + (offs_p % o.P)[None, :] * o.stride_wp
    u_offs = offs_q[:, None] * o.stride_uq + offs_r[None, :] * o.stride_ur
    step = tl.full((), BLOCK_Q, index)
    acc = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    # at least one trip, stated: otherwise ptxas serialises every wgmma (C7515)
    for q in range(first_q, tl.maximum(last_q, first_q + BLOCK_Q), BLOCK_Q):
        mask_q = tl.arange(0, BLOCK_Q) < o.Q - q
        if V.DESCRIPTORS:
            a = o.a.load([pid_m * BLOCK_M, q])
        elif V.EVEN_Q:
            a = tl.load(a_tile_ptr + a_offs)
        else:
            a = tl.load(a_tile_ptr + a_offs, mask=mask_q[None, :], other=0.0)
        # u is in its final dtype before the first product, so that its tile and w's lie apart in shared memory: where
        # they take turns in one place, ptxas 12.8 multiplies by addresses that nothing has computed (sass.py)
        if WITH_H:
            if V.EVEN_Q:
                u = tl.load(o.u + u_offs, mask=mask_r[None, :], other=0.0)
            else:
                u = tl.load(o.u + u_offs, mask=mask_q[:, None] & mask_r[None, :], other=0.0)
            u = round_to(u, dtype)
            u_offs += step * o.stride_uq
        if WITH_BASE:
            if V.DESCRIPTORS:
                w = o.w.load([pid_p * BLOCK_P, q]).T if V.W_ALONG_Q else o.w.load([q, pid_p * BLOCK_P])
            elif V.EVEN_Q:
                w = tl.load(o.w + w_offs)
            else:
                w = tl.load(o.w + w_offs, mask=mask_q[:, None], other=0.0)
            acc = dot(a, w, acc, PRECISION)
            w_offs += step * o.stride_wq
        if WITH_H:
            if V.DROP_INPUT:
                columns = tl.arange(0, BLOCK_Q).to(tl.int64) + q
                a = tl.where(keep_mask(o.seed, first_m + offs_m, columns, o.Q, o.threshold), a, 0.0)
            h = dot(a, u, h, PRECISION)
            if V.DROP_INPUT and V.WGMMA:
                # what is done with it here waits for the product, so that the next step's mask can't be computed into
                # registers that this step's product has yet to read, as ptxas before 13.3 does (sass.py). For tcgen05,
                # which accumulates elsewhere, Triton 3.7 can't compile it
                h = tl.where(mask_r[None, :], h, 0.0)
        a_offs += step * o.stride_aq
    return acc, h


@triton.jit
def _tile(index, tiles_m, tiles_p, V: tl.constexpr):
    """Tile (pid_m, pid_p) of a place in line: the first column first where its tiles publish for the others."""
    if V.PUBLISH:
        rest = tl.maximum(index - tiles_m, 0)
        pid_m, pid_p = grouped_order(rest, tiles_m, tl.maximum(tiles_p - 1, 1), V.GROUP_M)
        publishes = index < tiles_m
        return tl.where(publishes, index, pid_m), tl.where(publishes, 0, pid_p + 1)
    else:
        return grouped_order(index, tiles_m, tiles_p, V.GROUP_M)


@triton.jit
def _h_ptrs_and_mask(h_ptr, pid_m, first_r, M, R, V: tl.constexpr):
    BLOCK_M: tl.constexpr = V.BLOCK_M
    BLOCK_R: tl.constexpr = V.BLOCK_R
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R) + first_r
    return h_ptr + offs_m[:, None] * R + offs_r[None, :], (offs_m < M)[:, None] & (offs_r < R)[None, :]


@triton.jit
def _store_h(h_ptr, h, pid_m, first_r, M, R, V: tl.constexpr):
    ptrs, mask = _h_ptrs_and_mask(h_ptr, pid_m, first_r, M, R, V)
    tl.store(ptrs, h, mask=mask)


@triton.jit
def _load_h(h_ptr, pid_m, first_r, M, R, V: tl.constexpr):
    ptrs, mask = _h_ptrs_and_mask(h_ptr, pid_m, first_r, M, R, V)
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _raise_flag(flag_ptr):
    # every thread of the program has stored before one of them says so
    tl.debug_barrier()
    tl.atomic_add(flag_ptr, 1, sem="release")


@triton.jit
def _await_flag(flag_ptr, count):
    while tl.atomic_add(flag_ptr, 0, sem="acquire") < count:
        pass
    tl.debug_barrier()


@triton.jit
def _leave(sync_ptr, counters):
    """The last program to leave sets the counters back to zero: nobody reads them any more."""
    tl.debug_barrier()
    if tl.atomic_add(sync_ptr + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        # what one thread acquired, before every thread's stores
        tl.debug_barrier()
        for first in range(0, counters, 128):
            offsets = first + tl.arange(0, 128)
            tl.store(sync_ptr + offsets, 0, mask=offsets < counters)
