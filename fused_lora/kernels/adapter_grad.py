"""The adapter gradients in one launch, two thin reductions over M: ``dA = scale · gᵀ D(x)``, ``dB = scale · dyᵀ h``."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import dot, keep_mask, round_to


@triton.jit(do_not_specialize=["M", "tiles_A"])
def _adapter_grad_kernel(
    x_ptr, g_ptr, dy_ptr, h_ptr, seed_ptr, dA_ptr, dB_ptr,
    M, K, N, R, tiles_A,
    stride_xm, stride_xk, stride_gm, stride_gr, stride_dym, stride_dyn, stride_hm, stride_hr,
    scale, keep_scale, threshold,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The first tiles_A programs reduce a block of x's columns each, the others one of dy's; fixed order, same bits."""
    pid = tl.program_id(0)
    offs_r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    if pid < tiles_A:
        offs_c = pid.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
        acc = _reduce(
            x_ptr, g_ptr, seed_ptr, offs_c, offs_r, M, K, R, stride_xm, stride_xk, stride_gm, stride_gr,
            threshold, DROPOUT, PRECISION, BLOCK_M, BLOCK_C, BLOCK_R,
        )  # fmt: skip
        out_ptrs = dA_ptr + offs_r[None, :] * K + offs_c[:, None]
        acc *= scale * keep_scale
        tl.store(out_ptrs, round_to(acc, dA_ptr.dtype.element_ty), mask=(offs_c < K)[:, None] & (offs_r < R)[None, :])
    else:
        offs_c = (pid - tiles_A).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
        acc = _reduce(
            dy_ptr, h_ptr, seed_ptr, offs_c, offs_r, M, N, R, stride_dym, stride_dyn, stride_hm, stride_hr,
            threshold, False, PRECISION, BLOCK_M, BLOCK_C, BLOCK_R,
        )  # fmt: skip
        out_ptrs = dB_ptr + offs_c[:, None] * R + offs_r[None, :]
        acc *= scale
        tl.store(out_ptrs, round_to(acc, dB_ptr.dtype.element_ty), mask=(offs_c < N)[:, None] & (offs_r < R)[None, :])


@triton.jit
def _reduce(
    wide_ptr, thin_ptr, seed_ptr, offs_c, offs_r, M, C, R, stride_wm, stride_wc, stride_tm, stride_tr, threshold,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``Σ_m wide[m, c] · thin[m, r]`` as (BLOCK_C, BLOCK_R): the rank is the narrow side of the product."""
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    wide_ptrs = wide_ptr + offs_m[:, None] * stride_wm + (offs_c % C)[None, :] * stride_wc
    thin_ptrs = thin_ptr + offs_m[:, None] * stride_tm + offs_r[None, :] * stride_tr
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for m in range(0, tl.maximum(M, BLOCK_M), BLOCK_M):
        mask_m = offs_m < M - m
        wide = tl.load(wide_ptrs, mask=mask_m[:, None], other=0.0)
        thin = tl.load(thin_ptrs, mask=mask_m[:, None] & (offs_r < R)[None, :], other=0.0)
        if DROPOUT:
            wide = tl.where(keep_mask(seed, offs_m + m, offs_c, C, threshold), wide, 0.0)
        acc = dot(tl.trans(wide), thin, acc, PRECISION)
        wide_ptrs += BLOCK_M * stride_wm
        thin_ptrs += BLOCK_M * stride_tm
    return acc
