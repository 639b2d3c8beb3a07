"""One launch from its operands: grid, sizes, strides and what the kernel is compiled for. Tensors may be meta's."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...dropout import dropout_threshold, keep_scale
from ...torch_internals import allows_tf32
from ..four_bits import FourBits
from .configs import DecodeConfig, Device, Problem, ReductionConfig, Schedule, ScheduleConfig, TileConfig
from .entries import Tiled
from .kernels import adapter_grad, decode, dequantize, lora_matmul
from .straight import Launch


def lora_matmul_launch(
    a: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, scale: float,
    seed: Tensor | None, dropout_p: float, dropout_on_output: bool, out: Tensor, h: Tensor,
    config: TileConfig, schedule: ScheduleConfig, device: Device,
    parts: Tensor | None = None, sync: Tensor | None = None,
) -> Launch:  # fmt: skip
    """The launch of ``lora_matmul.py`` that fills out (..., P) and h (M, R).

    parts, sync: of the shapes that :func:`scratch_of` and :func:`counters_of` give, where they give any.
    """
    a2 = rows_of(a)
    (M, Q), P, R = a2.shape, w.shape[1], u.shape[1]
    tiles_m, tiles_p = cdiv(M, config.BLOCK_M), cdiv(P, config.BLOCK_P)
    produces = schedule.kind == Schedule.PRODUCE
    assert not produces or schedule.split <= cdiv(Q, config.BLOCK_Q), "every producer must have a part of Q"
    a_read, w_read = _descriptors(a2, w, config) if schedule.descriptors else (a2, w)
    tile = dataclasses.asdict(config)
    num_warps, num_stages = tile.pop("num_warps"), tile.pop("num_stages")
    return Launch(
        kernel=lora_matmul._lora_matmul_kernel,
        grid=(tiles_m * tiles_p + (tiles_m * schedule.split if produces else 0), 1),
        args=(
            a_read, w_read, u, v, bias, out, h, parts, sync, float(scale), seed, M, P, Q, R,
            *a2.stride(), *w.stride(), *u.stride(), *v.stride(),
            keep_scale(dropout_p), dropout_threshold(dropout_p),
        ),
        varying=10 if seed is None else 11,
        variant=lora_matmul.Variant(
            RECOMPUTE=schedule.kind == Schedule.RECOMPUTE,
            PUBLISH=schedule.kind == Schedule.PUBLISH,
            PRODUCE=produces,
            SPLIT=schedule.split,
            HAS_BIAS=bias is not None,
            DROP_INPUT=seed is not None and not dropout_on_output,
            DROP_OUTPUT=seed is not None and dropout_on_output,
            EVEN_Q=Q > 0 and Q % config.BLOCK_Q == 0,
            FAR=_far(a2, w, u, config),
            DESCRIPTORS=schedule.descriptors,
            W_ALONG_Q=w.stride(0) == 1,
            MANY_RANKS=config.BLOCK_R < R,
            WGMMA=device.capability[0] == 9,
            DIVISORS=_divisors(P, Q, R, a2, w, u, v),
            PRECISION=precision(a.dtype),
            **tile,
        ),
        num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip


def decode_launch(
    a: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, scale: float,
    out: Tensor, h: Tensor, slots: Tensor, sync: Tensor, config: DecodeConfig,
) -> Launch:  # fmt: skip
    """The launch of ``decode.py`` that fills out (..., P) and h (M, R).

    config: as :func:`whole_parts` gives it.  slots, sync: of the shapes that :func:`scratch_of` and
    :func:`counters_of` give.
    """
    a2 = rows_of(a)
    (M, Q), P, R = a2.shape, w.shape[1], u.shape[1]
    tiles, h_tiles = _decode_tiles(M, P, R, config)
    return Launch(
        kernel=decode._decode_kernel,
        grid=(tiles * config.SPLIT + h_tiles * config.SPLIT_H, 1),
        args=(
            a2, w, u, v, bias, out, h, slots, sync, float(scale), M, P, Q, R,
            *a2.stride(), *w.stride(), *u.stride(), *v.stride(),
        ),
        varying=10,
        variant=decode.Variant(
            _divisors(P, Q, R, a2, w, u, v), bias is not None, Q % config.BLOCK_Q == 0, precision(a.dtype),
            config.BLOCK_P, config.BLOCK_Q, config.BLOCK_R, config.SPLIT, config.SPLIT_H, config.ROWS,
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip


def _divisors(C0: int, C1: int, R: int, *operands: Tensor) -> tuple[int, ...]:
    """Of three sizes and of every stride: the power of two up to 8 that the compiler is told of.

    1 for multiples of 16, which it finds by itself.
    """
    common = (math.gcd(16, n) for n in (C0, C1, R, *(n for tensor in operands for n in tensor.stride())))
    return tuple(1 if n == 16 else n for n in common)


def adapter_grad_launch(
    x: Tensor, g: Tensor, dy: Tensor, h: Tensor, scale: float, seed: Tensor | None, dropout_p: float,
    dA: Tensor | None, dB: Tensor | None, config: ReductionConfig, device: Device,
    partials: Tensor | None = None, arrived: Tensor | None = None,
) -> Launch:  # fmt: skip
    """The launch that fills dA (R, K) and dB (N, R), those of the two that are there. x, g, dy, h: 2-D.

    partials: (parts, tiles, BLOCK_C, BLOCK_R) of float32, and arrived: a zero for each tile; None not to split M.
    """
    M, R = g.shape
    K, N = (0 if dA is None else x.shape[1]), (0 if dB is None else dy.shape[1])
    return Launch(
        kernel=adapter_grad._adapter_grad_kernel,
        grid=(reduction_tiles(K, N, R, config), 1 if partials is None else partials.shape[0]),
        args=(
            x, g, dy, h, dB if dA is None else dA, dA if dB is None else dB, partials, arrived, float(scale), seed,
            M, K, N, R, cdiv(K, config.BLOCK_C),
            *x.stride(), *g.stride(), *dy.stride(), *h.stride(),
            keep_scale(dropout_p), dropout_threshold(dropout_p),
        ),
        varying=9 if seed is None else 10,
        variant=adapter_grad.Variant(
            seed is not None, partials is not None, device.capability[0] == 9,
            _divisors(K, N, R, x, g, dy, h), precision(x.dtype), config.BLOCK_M, config.BLOCK_C, config.BLOCK_R,
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip


# elements of a program, whole blocks of any size: 16 bytes of q for each of 128 threads
DEQUANTIZED_AT_ONCE, DEQUANTIZE_WARPS = 4096, 4


def dequantize_launch(bits: FourBits, out: Tensor) -> Launch:
    """The launch of ``dequantize.py`` that fills out, contiguous and of 16 or 32 bits."""
    numel, blocksize, nested = out.numel(), bits.blocksize, bits.offset is not None
    rows = DEQUANTIZED_AT_ONCE // blocksize
    assert out.is_contiguous()
    assert blocksize % 8 == DEQUANTIZED_AT_ONCE % blocksize == 0
    assert not nested or bits.blocksize2 % rows == 0, "the blocks of a program must share one absmax2"
    words = reads_words(bits, out)
    q = bits.q.view(torch.uint8).view(-1)
    return Launch(
        kernel=dequantize._dequantize_4bit_kernel,
        grid=(cdiv(numel, DEQUANTIZED_AT_ONCE), 1),
        args=(
            q.view(torch.int32) if words else q, bits.code, bits.absmax, bits.code2, bits.absmax2, bits.offset, out,
            numel, numel // 8, cdiv(numel, blocksize),
        ),
        varying=7,
        variant=dequantize.Variant(nested, words, blocksize, bits.blocksize2, DEQUANTIZED_AT_ONCE),
        num_warps=DEQUANTIZE_WARPS,
        num_stages=1,
    )  # fmt: skip


def reads_words(bits: FourBits, out: Tensor) -> bool:
    """Whether every eight elements are an aligned word."""
    return out.numel() % 8 == 0 and bits.q.data_ptr() % 4 == 0


def scratch_of(problem: Problem, chosen: Tiled | DecodeConfig) -> tuple[int, ...]:
    """The shape of the float32 scratch of a launch of ``decode``, or of ``lora_matmul`` where h is produced apart."""
    if isinstance(chosen, DecodeConfig):
        tiles, h_tiles = _decode_tiles(problem.M, problem.P, problem.R, chosen)
        # an only part has no slot
        columns = tiles * chosen.SPLIT * chosen.BLOCK_P if chosen.SPLIT > 1 else 0
        return columns + h_tiles * chosen.SPLIT_H * chosen.BLOCK_R, chosen.ROWS
    return chosen.schedule.split, problem.M, problem.R


def counters_of(problem: Problem, chosen: Tiled | DecodeConfig) -> int:
    """How many counters, all zero, a launch needs that hands the low-rank product over."""
    if isinstance(chosen, DecodeConfig):
        return 3 + sum(_decode_tiles(problem.M, problem.P, problem.R, chosen))
    return lora_matmul.SYNC_HEADER + cdiv(problem.M, chosen.tile.BLOCK_M)


def whole_parts(config: DecodeConfig, Q: int) -> DecodeConfig:
    """config with so few parts that none is empty."""
    steps = cdiv(Q, config.BLOCK_Q)
    if steps >= max(config.SPLIT, config.SPLIT_H):
        return config
    return dataclasses.replace(config, SPLIT=min(config.SPLIT, steps), SPLIT_H=min(config.SPLIT_H, steps))


def _decode_tiles(M: int, P: int, R: int, config: DecodeConfig) -> tuple[int, int]:
    """How many of out and of h."""
    rows = cdiv(M, config.ROWS)
    return rows * cdiv(P, config.BLOCK_P), rows * cdiv(R, config.BLOCK_R)


def reduction_tiles(K: int, N: int, R: int, config: ReductionConfig) -> int:
    """Blocks of columns times blocks of ranks; K or N is 0 where that gradient is not wanted."""
    return (cdiv(K, config.BLOCK_C) + cdiv(N, config.BLOCK_C)) * cdiv(R, config.BLOCK_R)


def aligned(a: Tensor, w: Tensor) -> bool:
    """Whether tensor descriptors can describe a (M, Q) and w (Q, P).

    16-bit elements, one dimension contiguous, of a the second, and bases and other strides multiples of 16 bytes.
    """
    if a.dtype.itemsize != 2 or a.stride(1) != 1 or 1 not in w.stride():
        return False
    row, column = a.stride(0), max(w.stride())
    # no dimension of stride 0, as expand makes
    apart = row >= a.shape[1] and column >= w.shape[0 if w.stride(0) == 1 else 1]
    return apart and row % 8 == column % 8 == 0 and a.data_ptr() % 16 == w.data_ptr() % 16 == 0


def _descriptors(a: Tensor, w: Tensor, config: TileConfig) -> tuple[TensorDescriptor, TensorDescriptor]:
    block = [config.BLOCK_Q, config.BLOCK_P]
    if w.stride(0) == 1:
        w, block = w.t(), block[::-1]
    return (
        TensorDescriptor(a, [*a.shape], [*a.stride()], [config.BLOCK_M, config.BLOCK_Q]),
        TensorDescriptor(w, [*w.shape], [*w.stride()], block),
    )


def _far(a: Tensor, w: Tensor, u: Tensor, config: TileConfig) -> bool:
    """Whether offsets within a tile's rows of a (M, Q), within w (Q, P) or u (Q, R), overflow int32."""
    columns = a.shape[1] + config.BLOCK_Q
    reaches = (
        config.BLOCK_M * a.stride(0) + columns * a.stride(1),
        columns * w.stride(0) + (w.shape[1] + config.BLOCK_P) * w.stride(1),
        columns * u.stride(0) + (u.shape[1] + config.BLOCK_R) * u.stride(1),
    )
    return max(reaches) >= 2**31


def rows_of(x: Tensor) -> Tensor:
    """(..., C) as (M, C)."""
    return x.reshape(-1, x.shape[-1])


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def precision(dtype: torch.dtype) -> str:
    """float32 products as PyTorch is told to make them; those of 16 bits know one way."""
    return "tf32" if dtype == torch.float32 and allows_tf32() else "ieee"
