"""The one kernel: forward and input gradient, which differ only in operands and strides (``reference.py``)."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import dot, grouped_order, keep_mask, round_to


@triton.jit(do_not_specialize=["M"])
def _lora_matmul_kernel(
    a_ptr, w_ptr, u_ptr, v_ptr, bias_ptr, seed_ptr, out_ptr, thin_ptr,
    M, P, Q, R,
    stride_am, stride_aq, stride_wq, stride_wp, stride_uq, stride_ur, stride_vr, stride_vp,
    scale, keep_scale, threshold,
    HAS_BIAS: tl.constexpr, DROP_INPUT: tl.constexpr, DROP_OUTPUT: tl.constexpr,
    EVEN_Q: tl.constexpr, MANY_RANKS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """A tile of ``out = a w + scale · (a u) v + bias``; the tiles of the first column also store ``thin = a u``.

    out (M, P) and thin (M, R) are contiguous, in a's dtype. MANY_RANKS: R is greater than BLOCK_R.
    """
    pid_m, pid_p = grouped_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(P, BLOCK_P), GROUP_M)
    dtype = out_ptr.dtype.element_ty
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_p = pid_p.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_q = tl.arange(0, BLOCK_Q).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m = offs_m < M
    mask_p = offs_p < P
    mask_r = offs_r < R
    # rows and columns past the end wrap around: their results are never stored, and the loads need no mask
    a_ptrs = a_ptr + (offs_m % M)[:, None] * stride_am + offs_q[None, :] * stride_aq
    w_ptrs = w_ptr + offs_q[:, None] * stride_wq + (offs_p % P)[None, :] * stride_wp
    u_ptrs = u_ptr + offs_q[:, None] * stride_uq + offs_r[None, :] * stride_ur
    if DROP_INPUT or DROP_OUTPUT:
        seed = tl.load(seed_ptr)

    acc = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    thin = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    # at least one trip, stated: otherwise ptxas serialises every wgmma (C7515)
    for q in range(0, tl.maximum(Q, BLOCK_Q), BLOCK_Q):
        if EVEN_Q:
            a = tl.load(a_ptrs)
            w = tl.load(w_ptrs)
            u = tl.load(u_ptrs, mask=mask_r[None, :], other=0.0)
        else:
            mask_q = offs_q < Q - q
            a = tl.load(a_ptrs, mask=mask_q[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_q[:, None], other=0.0)
            u = tl.load(u_ptrs, mask=mask_q[:, None] & mask_r[None, :], other=0.0)
        acc = dot(a, w, acc, PRECISION)
        if DROP_INPUT:
            a = tl.where(keep_mask(seed, offs_m, offs_q + q, Q, threshold), a, 0.0)
        thin = dot(a, round_to(u, dtype), thin, PRECISION)
        a_ptrs += BLOCK_Q * stride_aq
        w_ptrs += BLOCK_Q * stride_wq
        u_ptrs += BLOCK_Q * stride_uq

    lora = tl.zeros((BLOCK_M, BLOCK_P), tl.float32) if DROP_OUTPUT else acc
    lora = _add_rank_block(
        lora, thin, offs_r, offs_m, offs_p, v_ptr, thin_ptr, P, R, stride_vr, stride_vp,
        scale, keep_scale if DROP_INPUT else 1.0, mask_m & (pid_p == 0), dtype, PRECISION,
    )  # fmt: skip
    if MANY_RANKS:
        for _ in range(BLOCK_R, R, BLOCK_R):
            offs_r += BLOCK_R
            thin = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            a_ptrs = a_ptr + (offs_m % M)[:, None] * stride_am + offs_q[None, :] * stride_aq
            u_ptrs = u_ptr + offs_q[:, None] * stride_uq + offs_r[None, :] * stride_ur
            for q in range(0, Q, BLOCK_Q):
                mask_q = offs_q < Q - q
                a = tl.load(a_ptrs, mask=mask_q[None, :], other=0.0)
                u = tl.load(u_ptrs, mask=mask_q[:, None] & (offs_r < R)[None, :], other=0.0)
                if DROP_INPUT:
                    a = tl.where(keep_mask(seed, offs_m, offs_q + q, Q, threshold), a, 0.0)
                thin = dot(a, round_to(u, dtype), thin, PRECISION)
                a_ptrs += BLOCK_Q * stride_aq
                u_ptrs += BLOCK_Q * stride_uq
            lora = _add_rank_block(
                lora, thin, offs_r, offs_m, offs_p, v_ptr, thin_ptr, P, R, stride_vr, stride_vp,
                scale, keep_scale if DROP_INPUT else 1.0, mask_m & (pid_p == 0), dtype, PRECISION,
            )  # fmt: skip
    if DROP_OUTPUT:
        lora = acc + tl.where(keep_mask(seed, offs_m, offs_p, P, threshold), lora * keep_scale, 0.0)
    if HAS_BIAS:
        lora += tl.load(bias_ptr + offs_p, mask=mask_p, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + offs_m[:, None] * P + offs_p[None, :]
    tl.store(out_ptrs, round_to(lora, dtype), mask=mask_m[:, None] & mask_p[None, :])


@triton.jit
def _add_rank_block(
    lora, thin, offs_r, offs_m, offs_p, v_ptr, thin_ptr, P, R, stride_vr, stride_vp,
    scale, thin_scale, store_m, dtype: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``lora + thin (scale · v)`` over BLOCK_R ranks; stores thin where store_m says so.

    thin is rounded here, as reference.py rounds h. scale goes onto v, which is small, so float16 does not overflow.
    """
    thin = round_to(thin * thin_scale, dtype)
    mask_r = offs_r < R
    tl.store(thin_ptr + offs_m[:, None] * R + offs_r[None, :], thin, mask=store_m[:, None] & mask_r[None, :])
    v_ptrs = v_ptr + offs_r[:, None] * stride_vr + offs_p[None, :] * stride_vp
    v = tl.load(v_ptrs, mask=mask_r[:, None] & (offs_p < P)[None, :], other=0.0)
    return dot(thin, round_to(v.to(tl.float32) * scale, dtype), lora, PRECISION)
