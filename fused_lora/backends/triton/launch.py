"""Host side of the kernels: allocate, strides, grid. Same contracts as ``Backend``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from ...dropout import dropout_threshold, keep_scale
from . import tuned
from .adapter_grad import _adapter_grad_kernel
from .configs import (
    DECODE_ROWS,
    INTERPRETER,
    INTERPRETER_DECODE,
    INTERPRETER_PARTS,
    INTERPRETER_REDUCTION,
    INTERPRETER_TILE,
    DecodeConfig,
    Device,
    Form,
    Problem,
    ReductionConfig,
    ReductionProblem,
    Schedule,
    TileConfig,
    default_config,
    default_decode,
    default_reduction,
    default_schedule,
    reduction_parts,
    takes_decode,
)
from .decode import _decode_kernel
from .entries import Reduced, Tiled
from .lora_matmul import HEADER, _lora_matmul_kernel
from .workspace import counters


@dataclasses.dataclass(frozen=True)
class Call:
    """One launch, ready to be made, or to be compiled for another GPU (``fused_lora/codegen/``)."""

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
    schedule: Schedule | None = None,
) -> tuple[Tensor, Tensor]:
    """One launch, ``decode.py``'s for few tokens. config, schedule: the kernel, tiles and form to take instead."""
    rows = math.prod(a.shape[:-1])
    out = a.new_empty((*a.shape[:-1], w.shape[1]))
    thin = a.new_empty((rows, u.shape[1]))
    if out.numel() > 0:
        exact = a.dtype == torch.float32 and _precision() == "ieee"
        sizes = (rows, w.shape[1], a.shape[-1], u.shape[1], a.dtype.itemsize, u.dtype.itemsize)
        problem = Problem(*sizes, seed is not None, not exact, aligned(_rows(a), w), along_p=w.stride(0) != 1)
        if config is None and schedule is None:
            config, schedule = _choice(problem, a.device)
        decode = config if isinstance(config, DecodeConfig) else None
        zeros = None if decode is None else counters(a.device, decode_counters(problem.P, problem.R, decode))
        if decode is not None and zeros is not None:
            decode_call(a, w, u, v, bias, scale, out, thin, zeros, decode).launch(a.device)
        else:
            tile = config if isinstance(config, TileConfig) else _tile_config(problem, a.device)
            schedule = schedule or default_schedule(problem, tile, known_device(a.device))
            sync = None
            if schedule.form in (Form.PUBLISH, Form.PRODUCE):
                sync = counters(a.device, HEADER.value + _cdiv(rows, tile.BLOCK_M))
                if sync is None:
                    schedule = Schedule(Form.RECOMPUTE)
            operands = (a, w, u, v, bias, scale, seed, dropout_p, dropout_on_output, out, thin)
            lora_matmul_call(*operands, tile, schedule, sync).launch(a.device)
    return out, thin


def lora_matmul_call(
    a: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, scale: float,
    seed: Tensor | None, dropout_p: float, dropout_on_output: bool, out: Tensor, thin: Tensor,
    config: TileConfig, schedule: Schedule, sync: Tensor | None,
) -> Call:  # fmt: skip
    """The launch that fills out (..., P) and thin (M, R). sync: counters, where the schedule's form hands over."""
    a2 = _rows(a)
    (M, Q), P, R = a2.shape, w.shape[1], u.shape[1]
    rows, columns = _cdiv(M, config.BLOCK_M), _cdiv(P, config.BLOCK_P)
    a_read, w_read = _descriptors(a2, w, config) if schedule.descriptors else (a2, w)
    parts = None
    if schedule.form == Form.PRODUCE:
        assert schedule.split <= _cdiv(Q, config.BLOCK_Q), "every producer must have a part of Q"
        parts = a.new_empty((schedule.split, M, R), dtype=torch.float32)
    return Call(
        kernel=_lora_matmul_kernel,
        grid=(rows * columns + (rows * schedule.split if schedule.form == Form.PRODUCE else 0),),
        args=(
            a_read, w_read, u, v, bias, seed, out, thin, parts, sync, M, P, Q, R,
            *a2.stride(), *w.stride(), *u.stride(), *v.stride(),
            float(scale), keep_scale(dropout_p), dropout_threshold(dropout_p),
        ),
        flags={
            "FORM": int(schedule.form),
            "SPLIT": schedule.split,
            "U_MULTIPLE": math.gcd(R, u.stride(0), 8) if u.stride(1) == 1 != u.stride(0) else 1,
            "V_MULTIPLE": math.gcd(R, v.stride(1), 8) if v.stride(0) == 1 != v.stride(1) else 1,
            "HAS_BIAS": bias is not None,
            "DROP_INPUT": seed is not None and not dropout_on_output,
            "DROP_OUTPUT": seed is not None and dropout_on_output,
            "EVEN_Q": Q > 0 and Q % config.BLOCK_Q == 0,
            "FAR": _far(a2, w, u, config),
            "DESCRIPTORS": schedule.descriptors,
            "W_ALONG_Q": w.stride(0) == 1,
            "MANY_RANKS": config.BLOCK_R < R,
            "PRECISION": _precision(),
        },
        config=config,
    )  # fmt: skip


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
    parts: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """One launch for both gradients; what is not given costs nothing.

    config, parts: tile sizes, and into how many parts M is split, other than the default's.
    """
    pairs = [(_rows(wide), thin) for wide, thin in ((x, g), (dy, h)) if wide is not None and thin is not None]
    if not pairs:
        return None, None
    # an absent pair has no columns to reduce, and borrows the pointers of the other
    (x2, g2), (dy2, h2) = pairs[0], pairs[-1]
    rank = g2.shape[1]
    dA = x2.new_empty((rank, x2.shape[1]), dtype=dtype_A) if x is not None and g is not None else None
    dB = dy2.new_empty((dy2.shape[1], rank), dtype=dtype_B) if dy is not None and h is not None else None
    if config is None and parts is None:
        columns = (0 if dA is None else dA.shape[1]) + (0 if dB is None else dB.shape[0])
        exact = x2.dtype == torch.float32 and _precision() == "ieee"
        problem = ReductionProblem(x2.shape[0], columns, rank, x2.dtype.itemsize, seed is not None, not exact)
        config, parts = _tuned_reduction(problem, x2.device)
    if config is None:
        config = _reduction_config(rank, x2.dtype.itemsize, x2.device)
    tiles = _reduction_tiles(dA, dB, config)
    if parts is None:
        parts = _reduction_parts(config, x2.shape[0], tiles, x2.dtype.itemsize, x2.device)
    partials = None
    arrived = counters(x2.device, tiles) if parts > 1 else None
    if arrived is not None:
        partials = x2.new_empty((parts, tiles, config.BLOCK_C, config.BLOCK_R), dtype=torch.float32)
    if tiles > 0:
        adapter_grad_call(x2, g2, dy2, h2, scale, seed, dropout_p, dA, dB, config, partials, arrived).launch(x2.device)
    return dA, dB


def adapter_grad_call(
    x: Tensor, g: Tensor, dy: Tensor, h: Tensor, scale: float, seed: Tensor | None, dropout_p: float,
    dA: Tensor | None, dB: Tensor | None, config: ReductionConfig,
    partials: Tensor | None = None, arrived: Tensor | None = None,
) -> Call:  # fmt: skip
    """The launch that fills dA (R, K) and dB (N, R), those of the two that are there. x, g, dy, h: 2-D.

    partials: (parts, tiles, BLOCK_C, BLOCK_R) of float32, and arrived: a zero for each tile; None not to split M.
    """
    M, R = g.shape
    K, N = (0 if dA is None else x.shape[1]), (0 if dB is None else dy.shape[1])
    return Call(
        kernel=_adapter_grad_kernel,
        grid=(_reduction_tiles(dA, dB, config), 1 if partials is None else partials.shape[0]),
        args=(
            x, g, dy, h, seed, dB if dA is None else dA, dA if dB is None else dB, partials, arrived,
            M, K, N, R, _cdiv(K, config.BLOCK_C),
            *x.stride(), *g.stride(), *dy.stride(), *h.stride(),
            float(scale), keep_scale(dropout_p), dropout_threshold(dropout_p),
        ),
        flags={"DROPOUT": seed is not None, "SPLIT": partials is not None, "PRECISION": _precision()},
        config=config,
    )  # fmt: skip


def _reduction_tiles(dA: Tensor | None, dB: Tensor | None, config: ReductionConfig) -> int:
    """Blocks of columns times blocks of ranks, of what is wanted of dA (R, K) and dB (N, R)."""
    shapes = [] if dA is None else [(dA.shape[1], dA.shape[0])]
    shapes += [] if dB is None else [(dB.shape[0], dB.shape[1])]
    return sum(_cdiv(columns, config.BLOCK_C) * _cdiv(rank, config.BLOCK_R) for columns, rank in shapes)


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
def known_device(device: torch.device) -> Device:
    """What the rules know of it."""
    if device.type != "cuda":
        return INTERPRETER
    limits = driver.active.utils.get_device_properties(device.index)
    capability = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    return Device(capability, limits["max_shared_mem"], limits["multiprocessor_count"], name)


@functools.lru_cache(maxsize=4096)
def _choice(problem: Problem, device: torch.device) -> tuple[TileConfig | DecodeConfig, Schedule | None]:
    """The tuned one, else the rules'."""
    choice = tuned.current().choice(problem, known_device(device)) or rule(problem, device)
    return (choice.tile, choice.schedule) if isinstance(choice, Tiled) else (choice, None)  # type: ignore[return-value]


def rule(problem: Problem, device: torch.device) -> Tiled | DecodeConfig:
    """What the rules of ``configs.py`` choose on this device, whatever is tuned."""
    if takes_decode(problem):
        return _decode_config(problem, device)
    tile = _tile_config(problem, device)
    return Tiled(tile, default_schedule(problem, tile, known_device(device)))


def rule_reduction(problem: ReductionProblem, device: torch.device) -> Reduced:
    config = _reduction_config(problem.R, problem.itemsize, device)
    tiles = _cdiv(problem.columns, config.BLOCK_C) * _cdiv(problem.R, config.BLOCK_R)
    return Reduced(config, _reduction_parts(config, problem.M, tiles, problem.itemsize, device))


@functools.lru_cache(maxsize=4096)
def _tuned_reduction(problem: ReductionProblem, device: torch.device) -> tuple[ReductionConfig | None, int | None]:
    """Neither, where none is tuned."""
    found = tuned.current().choice(problem, known_device(device))
    return (found.config, found.parts) if isinstance(found, Reduced) else (None, None)


@functools.lru_cache(maxsize=4096)
def _tile_config(problem: Problem, device: torch.device) -> TileConfig:
    return default_config(problem, known_device(device)) if device.type == "cuda" else INTERPRETER_TILE


@functools.lru_cache(maxsize=4096)
def _decode_config(problem: Problem, device: torch.device) -> DecodeConfig:
    return default_decode(problem, known_device(device)) if device.type == "cuda" else INTERPRETER_DECODE


@functools.cache
def _reduction_config(rank: int, itemsize: int, device: torch.device) -> ReductionConfig:
    if device.type != "cuda":
        return INTERPRETER_REDUCTION
    return default_reduction(rank, itemsize, known_device(device))


@functools.lru_cache(maxsize=4096)
def _reduction_parts(config: ReductionConfig, rows: int, tiles: int, itemsize: int, device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETER_PARTS
    return reduction_parts(config, rows, tiles, itemsize, known_device(device))
