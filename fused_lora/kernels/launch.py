"""Host side of the kernels: allocate, strides, grid. Same contracts as the operators in ``reference.py``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from ..reference import dropout_threshold, keep_scale
from .adapter_grad import _adapter_grad_kernel
from .configs import (
    DECODE_ROWS,
    INTERPRETER_DECODE,
    INTERPRETER_REDUCTION,
    INTERPRETER_TILE,
    DecodeConfig,
    Device,
    Problem,
    ReductionConfig,
    TileConfig,
    default_config,
    default_decode,
    default_reduction,
    takes_decode,
)
from .decode import _decode_kernel
from .lora_matmul import _lora_matmul_kernel
from .workspace import counters


@dataclasses.dataclass(frozen=True)
class Call:
    """One launch, ready to be made, or to be compiled for another GPU (``codegen.py``)."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    flags: dict[str, Any]
    config: TileConfig | DecodeConfig | ReductionConfig

    def launch(self, device: torch.device) -> None:
        # Triton launches on the current device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[self.grid](*self.args, **self.flags, **_as_dict(self.config))


def lora_matmul(
    a: Tensor,
    w: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    seed: Tensor | None,
    dropout_p: float,
    dropout_on_output: bool,
    config: TileConfig | DecodeConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """One launch, ``decode.py``'s for few tokens. config: the kernel and the tile sizes to take, not the default's."""
    rows = math.prod(a.shape[:-1])
    out = a.new_empty((*a.shape[:-1], w.shape[1]))
    thin = a.new_empty((rows, u.shape[1]))
    if out.numel() > 0:
        exact = a.dtype == torch.float32 and _precision() == "ieee"
        sizes = (rows, w.shape[1], a.shape[-1], u.shape[1], a.dtype.itemsize, u.dtype.itemsize)
        problem = Problem(*sizes, dropout=seed is not None, tensor_cores=not exact)
        decode = config if isinstance(config, DecodeConfig) else None
        if config is None and takes_decode(problem):
            decode = _decode_config(problem, a.device)
        zeros = None if decode is None else counters(a.device, decode_counters(problem.P, problem.R, decode))
        if decode is not None and zeros is not None:
            call = decode_call(a, w, u, v, bias, scale, out, thin, zeros, decode)
        else:
            tile = config if isinstance(config, TileConfig) else _tile_config(problem, a.device)
            call = lora_matmul_call(a, w, u, v, bias, scale, seed, dropout_p, dropout_on_output, out, thin, tile)
        call.launch(a.device)
    return out, thin


def lora_matmul_call(
    a: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, scale: float,
    seed: Tensor | None, dropout_p: float, dropout_on_output: bool, out: Tensor, thin: Tensor, config: TileConfig,
) -> Call:  # fmt: skip
    """The launch that fills out (..., P) and thin (M, R)."""
    a2 = _rows(a)
    (M, Q), P, R = a2.shape, w.shape[1], u.shape[1]
    return Call(
        kernel=_lora_matmul_kernel,
        grid=(_cdiv(M, config.BLOCK_M) * _cdiv(P, config.BLOCK_P),),
        args=(
            a2, w, u, v, bias, seed, out, thin, M, P, Q, R, *a2.stride(), *w.stride(), *u.stride(), *v.stride(),
            float(scale), keep_scale(dropout_p), dropout_threshold(dropout_p),
        ),
        flags={
            "HAS_BIAS": bias is not None,
            "DROP_INPUT": seed is not None and not dropout_on_output,
            "DROP_OUTPUT": seed is not None and dropout_on_output,
            "EVEN_Q": Q > 0 and Q % config.BLOCK_Q == 0,
            "MANY_RANKS": config.BLOCK_R < R,
            "PRECISION": _precision(),
        },
        config=config,
    )  # fmt: skip


def decode_call(
    a: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, scale: float,
    out: Tensor, thin: Tensor, zeros: Tensor, config: DecodeConfig,
) -> Call:  # fmt: skip
    """The launch that fills out (..., P) and thin (M, R), M at most DECODE_ROWS.

    zeros: int32 counters, as many as ``decode_counters`` says, that no other launch uses meanwhile.
    """
    a2 = _rows(a)
    (M, Q), P, R = a2.shape, w.shape[1], u.shape[1]
    assert 0 < M <= DECODE_ROWS
    steps = _cdiv(Q, config.BLOCK_Q)
    if steps < max(config.SPLIT, config.SPLIT_THIN):
        # no part is empty
        config = dataclasses.replace(config, SPLIT=min(config.SPLIT, steps), SPLIT_THIN=min(config.SPLIT_THIN, steps))
    tiles, thin_tiles = _cdiv(P, config.BLOCK_P), _cdiv(R, config.BLOCK_R)
    parts, thin_parts = tiles * config.SPLIT, thin_tiles * config.SPLIT_THIN
    columns = parts * config.BLOCK_P + thin_parts * config.BLOCK_R
    slots = a2.new_empty((columns, DECODE_ROWS), dtype=torch.float32)
    return Call(
        kernel=_decode_kernel,
        grid=(parts + thin_parts,),
        args=(
            a2, w, u, v, bias, out, thin, slots, zeros, M, P, Q, R,
            *a2.stride(), *w.stride(), *u.stride(), *v.stride(), float(scale),
        ),
        flags={"HAS_BIAS": bias is not None, "EVEN_Q": Q % config.BLOCK_Q == 0, "PRECISION": _precision()},
        config=config,
    )  # fmt: skip


def decode_counters(P: int, R: int, config: DecodeConfig) -> int:
    """How many counters a launch of ``decode.py`` needs: three, and one for every tile."""
    return 3 + _cdiv(P, config.BLOCK_P) + _cdiv(R, config.BLOCK_R)


def adapter_grad(
    x: Tensor | None,
    g: Tensor | None,
    dy: Tensor | None,
    h: Tensor | None,
    scale: float,
    seed: Tensor | None,
    dropout_p: float,
    dtype_A: torch.dtype,
    dtype_B: torch.dtype,
    config: ReductionConfig | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """One launch for both gradients; what is not given costs nothing."""
    pairs = [(_rows(wide), thin) for wide, thin in ((x, g), (dy, h)) if wide is not None and thin is not None]
    if not pairs:
        return None, None
    # an absent pair has no columns to reduce, and borrows the pointers of the other
    (x2, g2), (dy2, h2) = pairs[0], pairs[-1]
    rank = g2.shape[1]
    dA = x2.new_empty((rank, x2.shape[1]), dtype=dtype_A) if x is not None and g is not None else None
    dB = dy2.new_empty((dy2.shape[1], rank), dtype=dtype_B) if dy is not None and h is not None else None
    if config is None:
        config = _reduction_config(rank, x2.dtype.itemsize, x2.device)
    call = adapter_grad_call(x2, g2, dy2, h2, scale, seed, dropout_p, dA, dB, config)
    if call.grid[0] > 0:
        call.launch(x2.device)
    return dA, dB


def adapter_grad_call(
    x: Tensor, g: Tensor, dy: Tensor, h: Tensor, scale: float, seed: Tensor | None, dropout_p: float,
    dA: Tensor | None, dB: Tensor | None, config: ReductionConfig,
) -> Call:  # fmt: skip
    """The launch that fills dA (R, K) and dB (N, R), those of the two that are there. x, g, dy, h: 2-D."""
    M, R = g.shape
    K, N = (0 if dA is None else x.shape[1]), (0 if dB is None else dy.shape[1])
    tiles_A, tiles_B = _cdiv(K, config.BLOCK_C), _cdiv(N, config.BLOCK_C)
    return Call(
        kernel=_adapter_grad_kernel,
        grid=(tiles_A + tiles_B, _cdiv(R, config.BLOCK_R)),
        args=(
            x, g, dy, h, seed, dB if dA is None else dA, dA if dB is None else dB, M, K, N, R, tiles_A,
            *x.stride(), *g.stride(), *dy.stride(), *h.stride(),
            float(scale), keep_scale(dropout_p), dropout_threshold(dropout_p),
        ),
        flags={"DROPOUT": seed is not None, "PRECISION": _precision()},
        config=config,
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _precision() -> str:
    """float32 products as PyTorch is told to make them."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@functools.cache
def _as_dict(config: TileConfig | DecodeConfig | ReductionConfig) -> dict[str, int]:
    return dataclasses.asdict(config)


@functools.cache
def _device(device: torch.device) -> Device:
    limits = driver.active.utils.get_device_properties(device.index)
    capability = torch.cuda.get_device_capability(device)
    return Device(capability, limits["max_shared_mem"], limits["multiprocessor_count"])


@functools.lru_cache(maxsize=4096)
def _tile_config(problem: Problem, device: torch.device) -> TileConfig:
    return default_config(problem, _device(device)) if device.type == "cuda" else INTERPRETER_TILE


@functools.lru_cache(maxsize=4096)
def _decode_config(problem: Problem, device: torch.device) -> DecodeConfig:
    return default_decode(problem, _device(device)) if device.type == "cuda" else INTERPRETER_DECODE


@functools.cache
def _reduction_config(rank: int, itemsize: int, device: torch.device) -> ReductionConfig:
    if device.type != "cuda":
        return INTERPRETER_REDUCTION
    return default_reduction(rank, itemsize, _device(device))
