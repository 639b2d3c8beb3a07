"""The one kernel: forward and input gradient, which differ only in operands and strides (``reference.py``).

Every tile of ``out = a w + scale · (a u) v + bias`` needs its rows of ``thin = a u``. Who computes them is the form:

    RECOMPUTE  every tile, for itself, in its main loop. Nobody waits; every tile pays for u.
    PUBLISH    the tiles of the first column, in their main loops, which store them and raise a flag; the others run a
               plain GEMM and wait in their epilogue. One tile in P / BLOCK_P pays.
    PRODUCE    programs that do nothing else, SPLIT to a row of tiles, each for a part of Q. For launches so small that
               there are processors to spare.
    PLAIN      nobody: ``a w + bias``, the floor that codegen/ holds the main loop to.

Work is handed out by ticket, and whoever is waited for holds a lower ticket than all who wait: it is running or done,
whatever order programs start in, so waiting ends. The last program to leave resets the counters for the next launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .configs import Form
from .tiles import dot, grouped_order, keep_mask, round_to

PLAIN, RECOMPUTE, PUBLISH, PRODUCE = (tl.constexpr(int(form)) for form in Form)

# sync: tickets handed out, programs that have left, then a flag for each row of tiles
HEADER = tl.constexpr(2)


@triton.jit(do_not_specialize=["M"])
def _lora_matmul_kernel(
    a_ptr, w_ptr, u_ptr, v_ptr, bias_ptr, seed_ptr, out_ptr, thin_ptr, parts_ptr, sync_ptr,
    M, P, Q, R,
    stride_am, stride_aq, stride_wq, stride_wp, stride_uq, stride_ur, stride_vr, stride_vp,
    scale, keep_scale, threshold,
    FORM: tl.constexpr, SPLIT: tl.constexpr, U_MULTIPLE: tl.constexpr, V_MULTIPLE: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROP_INPUT: tl.constexpr, DROP_OUTPUT: tl.constexpr,
    EVEN_Q: tl.constexpr, FAR: tl.constexpr, DESCRIPTORS: tl.constexpr, W_ALONG_Q: tl.constexpr,
    MANY_RANKS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out (M, P) and thin (M, R) are contiguous, in a's dtype. MANY_RANKS: R is greater than BLOCK_R.
    U_MULTIPLE, V_MULTIPLE: a power of two that divides R and the other stride of u or v, where its ranks are adjacent.
    DESCRIPTORS: a_ptr and w_ptr are tensor descriptors, of blocks (BLOCK_M, BLOCK_Q) and (BLOCK_Q, BLOCK_P), the latter
    of wᵀ if W_ALONG_Q: contiguous dimensions come last.
    FAR: offsets within a tile's rows of a, within w or within u may not fit int32.
    parts: (SPLIT, M, R) of float32, for PRODUCE.  sync: HEADER + rows of tiles, of int32, all zero, for PUBLISH and
    PRODUCE.  SPLIT is 1 for the other forms, and at most the number of BLOCK_Q in Q.
    """
    # for the compiler: how wide a load of u or v may be whose ranks are adjacent
    if U_MULTIPLE > 1:
        R, stride_uq = R // U_MULTIPLE * U_MULTIPLE, stride_uq // U_MULTIPLE * U_MULTIPLE
    if V_MULTIPLE > 1:
        R, stride_vp = R // V_MULTIPLE * V_MULTIPLE, stride_vp // V_MULTIPLE * V_MULTIPLE
    HANDS_OVER: tl.constexpr = FORM == PUBLISH or FORM == PRODUCE
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    seed = tl.full((), 0, tl.int64)
    if DROP_INPUT or DROP_OUTPUT:
        seed = tl.load(seed_ptr)
    thin_scale = keep_scale if DROP_INPUT else 1.0
    # the rest of the ranks are walked in a loop only where there are any
    end_r = R if MANY_RANKS else BLOCK_R
    tiles_m, tiles_p = tl.cdiv(M, BLOCK_M), tl.cdiv(P, BLOCK_P)
    producers = tiles_m * SPLIT if FORM == PRODUCE else 0

    ticket = tl.program_id(0)
    if HANDS_OVER:
        ticket = tl.atomic_add(sync_ptr, 1, sem="relaxed")
    if FORM == PRODUCE:
        if ticket < producers:
            pid_m, part = ticket // SPLIT, ticket % SPLIT
            blocks = tl.cdiv(Q, BLOCK_Q)
            first_q = part * blocks // SPLIT * BLOCK_Q
            last_q = tl.minimum((part + 1) * blocks // SPLIT * BLOCK_Q, Q)
            for first_r in range(0, end_r, BLOCK_R):
                _, thin = _products(
                    a_ptr, w_ptr, u_ptr, seed, pid_m, 0, first_r, first_q, last_q, M, P, Q, R,
                    stride_am, stride_aq, stride_wq, stride_wp, stride_uq, stride_ur, threshold, dtype,
                    False, True, DROP_INPUT,
                    EVEN_Q, FAR, DESCRIPTORS, W_ALONG_Q, PRECISION, BLOCK_M, BLOCK_P, BLOCK_Q, BLOCK_R,
                )  # fmt: skip
                _store_thin(parts_ptr + part.to(tl.int64) * M * R, thin, pid_m, first_r, M, R, BLOCK_M, BLOCK_R)
            _raise_flag(sync_ptr + HEADER + pid_m)
    if ticket >= producers:
        pid_m, pid_p = _tile(ticket - producers, tiles_m, tiles_p, FORM == PUBLISH, GROUP_M)
        if FORM == PUBLISH:
            if pid_p == 0:
                acc, thin = _products(
                    a_ptr, w_ptr, u_ptr, seed, pid_m, 0, 0, 0, Q, M, P, Q, R,
                    stride_am, stride_aq, stride_wq, stride_wp, stride_uq, stride_ur, threshold, dtype,
                    True, True, DROP_INPUT,
                    EVEN_Q, FAR, DESCRIPTORS, W_ALONG_Q, PRECISION, BLOCK_M, BLOCK_P, BLOCK_Q, BLOCK_R,
                )  # fmt: skip
                _store_thin(thin_ptr, round_to(thin * thin_scale, dtype), pid_m, 0, M, R, BLOCK_M, BLOCK_R)
                for first_r in range(BLOCK_R, end_r, BLOCK_R):
                    _, thin = _products(
                        a_ptr, w_ptr, u_ptr, seed, pid_m, 0, first_r, 0, Q, M, P, Q, R,
                        stride_am, stride_aq, stride_wq, stride_wp, stride_uq, stride_ur, threshold, dtype,
                        False, True, DROP_INPUT,
                        EVEN_Q, FAR, DESCRIPTORS, W_ALONG_Q, PRECISION, BLOCK_M, BLOCK_P, BLOCK_Q, BLOCK_R,
                    )  # fmt: skip
                    _store_thin(thin_ptr, round_to(thin * thin_scale, dtype), pid_m, first_r, M, R, BLOCK_M, BLOCK_R)
                _raise_flag(sync_ptr + HEADER + pid_m)
            else:
                acc, _ = _products(
                    a_ptr, w_ptr, u_ptr, seed, pid_m, pid_p, 0, 0, Q, M, P, Q, R,
                    stride_am, stride_aq, stride_wq, stride_wp, stride_uq, stride_ur, threshold, dtype,
                    True, False, DROP_INPUT,
                    EVEN_Q, FAR, DESCRIPTORS, W_ALONG_Q, PRECISION, BLOCK_M, BLOCK_P, BLOCK_Q, BLOCK_R,
                )  # fmt: skip
        else:
            acc, thin = _products(
                a_ptr, w_ptr, u_ptr, seed, pid_m, pid_p, 0, 0, Q, M, P, Q, R,
                stride_am, stride_aq, stride_wq, stride_wp, stride_uq, stride_ur, threshold, dtype,
                True, FORM == RECOMPUTE, DROP_INPUT,
                EVEN_Q, FAR, DESCRIPTORS, W_ALONG_Q, PRECISION, BLOCK_M, BLOCK_P, BLOCK_Q, BLOCK_R,
            )  # fmt: skip
        if HANDS_OVER:
            _await_flag(sync_ptr + HEADER + pid_m, SPLIT)

        offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_p = pid_p.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
        mask_p = offs_p < P
        lora = tl.zeros((BLOCK_M, BLOCK_P), tl.float32) if DROP_OUTPUT else acc
        if FORM != PLAIN:
            for first_r in range(0, end_r, BLOCK_R):
                if FORM == PUBLISH:
                    rounded = _load_thin(thin_ptr, pid_m, first_r, M, R, BLOCK_M, BLOCK_R)
                else:
                    if FORM == PRODUCE:
                        thin = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
                        for part in range(SPLIT):
                            part_ptr = parts_ptr + part * tl.cast(M, tl.int64) * R
                            thin += _load_thin(part_ptr, pid_m, first_r, M, R, BLOCK_M, BLOCK_R)
                    elif MANY_RANKS:
                        if first_r > 0:
                            _, thin = _products(
                                a_ptr, w_ptr, u_ptr, seed, pid_m, 0, first_r, 0, Q, M, P, Q, R,
                                stride_am, stride_aq, stride_wq, stride_wp, stride_uq, stride_ur, threshold, dtype,
                                False, True, DROP_INPUT,
                                EVEN_Q, FAR, DESCRIPTORS, W_ALONG_Q, PRECISION, BLOCK_M, BLOCK_P, BLOCK_Q, BLOCK_R,
                            )  # fmt: skip
                    # round h here: reference.py rounds at the same point
                    rounded = round_to(thin * thin_scale, dtype)
                    if pid_p == 0:
                        _store_thin(thin_ptr, rounded, pid_m, first_r, M, R, BLOCK_M, BLOCK_R)
                # scale goes onto v, which is small, so float16 does not overflow
                offs_r = tl.arange(0, BLOCK_R).to(tl.int64) + first_r
                v_ptrs = v_ptr + offs_r[:, None] * stride_vr + offs_p[None, :] * stride_vp
                v = tl.load(v_ptrs, mask=(offs_r < R)[:, None] & mask_p[None, :], other=0.0)
                lora = dot(rounded, round_to(v.to(tl.float32) * scale, dtype), lora, PRECISION)
        if DROP_OUTPUT:
            lora = acc + tl.where(keep_mask(seed, offs_m, offs_p, P, threshold), lora * keep_scale, 0.0)
        if HAS_BIAS:
            lora += tl.load(bias_ptr + offs_p, mask=mask_p, other=0.0).to(tl.float32)[None, :]
        out_ptrs = out_ptr + offs_m[:, None] * P + offs_p[None, :]
        tl.store(out_ptrs, round_to(lora, dtype), mask=(offs_m < M)[:, None] & mask_p[None, :])
    if HANDS_OVER:
        _leave(sync_ptr, tiles_m + HEADER)


@triton.jit
def _products(
    a_ptr, w_ptr, u_ptr, seed, pid_m, pid_p, first_r, first_q, last_q, M, P, Q, R,
    stride_am, stride_aq, stride_wq, stride_wp, stride_uq, stride_ur, threshold, dtype: tl.constexpr,
    WITH_BASE: tl.constexpr, WITH_THIN: tl.constexpr, DROP_INPUT: tl.constexpr, EVEN_Q: tl.constexpr,
    FAR: tl.constexpr, DESCRIPTORS: tl.constexpr, W_ALONG_Q: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``(a w, a u)`` of a tile, over a's columns from first_q to last_q: one pass over a; zero where not asked for."""
    # one 64-bit base and offsets of 32 bits where they suffice: half the registers and address arithmetic of pointers
    index: tl.constexpr = tl.int64 if FAR else tl.int32
    first_m = pid_m.to(tl.int64) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M).to(index)
    offs_p = tl.arange(0, BLOCK_P).to(index) + pid_p * BLOCK_P
    offs_q = tl.arange(0, BLOCK_Q).to(index) + first_q
    offs_r = tl.arange(0, BLOCK_R).to(index) + first_r
    mask_r = offs_r < R
    # rows past the end repeat the last, columns wrap around: what they give is never stored, and no load needs a mask
    rows = tl.minimum(offs_m, (M - 1 - first_m).to(index))
    if not DESCRIPTORS:
        a_tile_ptr = a_ptr + first_m * stride_am
    a_offs = rows[:, None] * stride_am + offs_q[None, :] * stride_aq
    w_offs = offs_q[:, None] * stride_wq + (offs_p % P)[None, :] * stride_wp
    u_offs = offs_q[:, None] * stride_uq + offs_r[None, :] * stride_ur
    step = tl.full((), BLOCK_Q, index)
    acc = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    thin = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    # at least one trip, stated: otherwise ptxas serialises every wgmma (C7515)
    for q in range(first_q, tl.maximum(last_q, first_q + BLOCK_Q), BLOCK_Q):
        mask_q = tl.arange(0, BLOCK_Q) < Q - q
        if DESCRIPTORS:
            a = a_ptr.load([pid_m * BLOCK_M, q])
        elif EVEN_Q:
            a = tl.load(a_tile_ptr + a_offs)
        else:
            a = tl.load(a_tile_ptr + a_offs, mask=mask_q[None, :], other=0.0)
        # u is in its final dtype before the first product, so that its tile and w's lie apart in shared memory: where
        # they take turns in one place, ptxas 12.8 multiplies by addresses that nothing has computed (sass.py)
        if WITH_THIN:
            if EVEN_Q:
                u = tl.load(u_ptr + u_offs, mask=mask_r[None, :], other=0.0)
            else:
                u = tl.load(u_ptr + u_offs, mask=mask_q[:, None] & mask_r[None, :], other=0.0)
            u = round_to(u, dtype)
            u_offs += step * stride_uq
        if WITH_BASE:
            if DESCRIPTORS:
                w = w_ptr.load([pid_p * BLOCK_P, q]).T if W_ALONG_Q else w_ptr.load([q, pid_p * BLOCK_P])
            elif EVEN_Q:
                w = tl.load(w_ptr + w_offs)
            else:
                w = tl.load(w_ptr + w_offs, mask=mask_q[:, None], other=0.0)
            acc = dot(a, w, acc, PRECISION)
            w_offs += step * stride_wq
        if WITH_THIN:
            if DROP_INPUT:
                columns = tl.arange(0, BLOCK_Q).to(tl.int64) + q
                a = tl.where(keep_mask(seed, first_m + offs_m, columns, Q, threshold), a, 0.0)
            thin = dot(a, u, thin, PRECISION)
            if DROP_INPUT:
                # what is done with it here waits for the product, so that the next step's mask can't be computed into
                # registers that this step's product has yet to read, as ptxas before 13.3 does (sass.py)
                thin = tl.where(mask_r[None, :], thin, 0.0)
        a_offs += step * stride_aq
    return acc, thin


@triton.jit
def _tile(index, tiles_m, tiles_p, PUBLISHERS_FIRST: tl.constexpr, GROUP_M: tl.constexpr):
    """Tile (pid_m, pid_p) of a place in line: the first column first where its tiles publish for the others."""
    if PUBLISHERS_FIRST:
        rest = tl.maximum(index - tiles_m, 0)
        pid_m, pid_p = grouped_order(rest, tiles_m, tl.maximum(tiles_p - 1, 1), GROUP_M)
        publishes = index < tiles_m
        return tl.where(publishes, index, pid_m), tl.where(publishes, 0, pid_p + 1)
    else:
        return grouped_order(index, tiles_m, tiles_p, GROUP_M)


@triton.jit
def _store_thin(thin_ptr, thin, pid_m, first_r, M, R, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R) + first_r
    tl.store(thin_ptr + offs_m[:, None] * R + offs_r[None, :], thin, mask=(offs_m < M)[:, None] & (offs_r < R)[None, :])


@triton.jit
def _load_thin(thin_ptr, pid_m, first_r, M, R, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R) + first_r
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    return tl.load(thin_ptr + offs_m[:, None] * R + offs_r[None, :], mask=mask, other=0.0)


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
