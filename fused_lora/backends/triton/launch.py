"""The operators on the host, ``Backend``'s contracts: what a layout of operands needs is worked out once, in a plan.

A plan is kept for operands of its very shapes, strides and dtypes, on its device and at its precision. A call of one
allocates the results and starts the kernel: what the choice, the grid, the strides and the flags were found from can't
have changed. Pointers and scale are those of the call.
"""

from __future__ import annotations

import math
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from ...plans import CALLS, Cache
from ...torch_internals import raw_stream
from . import choice
from .configs import DecodeConfig, Problem, ReductionConfig, ReductionProblem, Schedule, ScheduleConfig, TileConfig
from .entries import Tiled
from .prepare import (
    adapter_grad_launch,
    aligned,
    counters_of,
    decode_launch,
    lora_matmul_launch,
    precision,
    reduction_tiles,
    rows_of,
    scratch_of,
    whole_parts,
)
from .straight import Kept, keep
from .workspace import counters, scratch, stream_of

# of each kind; M varies, and every M has a plan of its own
MOST_PLANS = 4096


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
    schedule: ScheduleConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """One launch, ``decode.py``'s for small M. config, schedule: the kernel, tiles and schedule to take instead."""
    if config is None and schedule is None:
        plan = matmul_plan(a, w, u, v, bias, seed, dropout_p, dropout_on_output)
    else:
        plan = MatmulPlan(a, w, u, v, bias, seed, dropout_p, dropout_on_output, config, schedule)
    return plan(a, w, u, v, bias, scale, seed)  # type: ignore[return-value]


def matmul_plan(
    a: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None,
    seed: Tensor | None, dropout_p: float, dropout_on_output: bool,
) -> MatmulPlan:  # fmt: skip
    """The plan of operands like these, made where there is none yet."""
    key = (
        a.shape, a.stride(), a.dtype, w.shape, w.stride(), u.shape, u.stride(), u.dtype, v.stride(), v.dtype,
        None if bias is None else bias.stride(), seed is None, dropout_p, dropout_on_output, a.device,
        precision(a.dtype), (a.data_ptr() | w.data_ptr()) % 16 == 0,
    )  # fmt: skip
    return _matmul_plans.get(key) or _matmul_plans.put(
        key, MatmulPlan(a, w, u, v, bias, seed, dropout_p, dropout_on_output)
    )  # fmt: skip


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
    given = (x, g, dy, h, seed, dropout_p, dtype_A, dtype_B)
    plan = adapter_grad_plan(*given) if config is None and parts is None else AdapterGradPlan(*given, config, parts)
    return plan(x, g, dy, h, scale, seed)


def adapter_grad_plan(
    x: Tensor | None, g: Tensor | None, dy: Tensor | None, h: Tensor | None,
    seed: Tensor | None, dropout_p: float, dtype_A: torch.dtype, dtype_B: torch.dtype,
) -> AdapterGradPlan:  # fmt: skip
    """The plan of operands like these, made where there is none yet."""
    like = x if x is not None else dy
    key = (
        None if x is None else (x.shape, x.stride()), None if g is None else (g.shape, g.stride()),
        None if dy is None else (dy.shape, dy.stride()), None if h is None else (h.shape, h.stride()),
        seed is None, dropout_p, dtype_A, dtype_B,
        like is not None and (like.dtype, like.device, precision(like.dtype)),
    )  # fmt: skip
    return _adapter_grad_plans.get(key) or _adapter_grad_plans.put(
        key, AdapterGradPlan(x, g, dy, h, seed, dropout_p, dtype_A, dtype_B)
    )  # fmt: skip


_matmul_plans: Cache[MatmulPlan] = Cache(MOST_PLANS)
_adapter_grad_plans: Cache[AdapterGradPlan] = Cache(MOST_PLANS)


def forget_plans() -> None:
    """For who changes what choices are made from: a file of tuned choices, a device's rules."""
    _matmul_plans.clear()
    _adapter_grad_plans.clear()
    CALLS.clear()
    choice.choice.cache_clear()
    choice.reduction_choice.cache_clear()


# a stream, the addresses of its counters, of its scratch, and of where h goes that nobody wants; then what holds them
_Memory = tuple[int, int, int, int, tuple[Tensor | None, Tensor]]


def _remember(
    memory: dict[int, _Memory], device: torch.device, stream: int, counters: Tensor | None, size: int, h_size: int
) -> None:  # fmt: skip
    """Note what a plan's launches on this stream use beside their results, unless it may not be allocated now.

    size, h_size: bytes of scratch, and of h.
    """
    h_offset = -(-size // 16) * 16
    space = scratch(device, h_offset + h_size, stream)
    if space is not None:
        sync, address = 0 if counters is None else counters.data_ptr(), space.data_ptr()
        memory[stream] = stream, sync, address if size else 0, address + h_offset, (counters, space)


class MatmulPlan:
    """``lora_matmul`` of operands of one layout: called with operands of that layout, it returns (out, h).

    Of w, u and v it reads the pointers alone, so their transposes do as well.
    """

    def __init__(
        self, a: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None,
        seed: Tensor | None, dropout_p: float, dropout_on_output: bool,
        config: TileConfig | DecodeConfig | None = None, schedule: ScheduleConfig | None = None,
    ) -> None:  # fmt: skip
        self._device, self._dropout = a.device, (dropout_p, dropout_on_output)
        self._index, self._on_gpu = a.device.index, a.device.type == "cuda"
        rows, (Q, P), R = math.prod(a.shape[:-1]), w.shape, u.shape[1]
        self._out_shape, self._h_shape = (*a.shape[:-1], P), (rows, R)
        self._layouts = [(tensor.shape, tensor.stride()) for tensor in (w, u, v)]
        self._kept: Kept | None = None
        # float32 numbers beside the results, and how many counters
        self._scratch, self._counters = 0, 0
        self._memory: dict[int, _Memory] = {}
        self._alone: MatmulPlan | None = None
        if not rows * P:
            return
        a2 = rows_of(a)
        # rows that no strides describe are copied, and a bias with gaps
        self._copies = a2.data_ptr() != a.data_ptr() or not (bias is None or bias.is_contiguous())
        exact = a.dtype == torch.float32 and precision(a.dtype) == "ieee"
        sizes = (rows, P, Q, R, a.itemsize, u.itemsize)
        self._problem = Problem(*sizes, seed is not None, not exact, aligned(a2, w), along_p=w.stride(0) != 1)
        self._chosen = self._choose(config, schedule)
        chosen = self._chosen
        self._descriptors = isinstance(chosen, Tiled) and chosen.schedule.descriptors
        produces, hands_over = True, True
        if isinstance(chosen, Tiled):
            produces, hands_over = chosen.schedule.kind == Schedule.PRODUCE, chosen.schedule.kind > Schedule.RECOMPUTE
        if hands_over:
            self._counters = counters_of(self._problem, chosen)
        if produces:
            self._scratch = math.prod(scratch_of(self._problem, chosen))

    def _choose(
        self, config: TileConfig | DecodeConfig | None, schedule: ScheduleConfig | None
    ) -> Tiled | DecodeConfig:
        chosen: Tiled | DecodeConfig
        if config is None and schedule is None:
            chosen = choice.choice(self._problem, self._device)
        elif isinstance(config, DecodeConfig):
            chosen = config
        else:
            chosen = choice.tiled_rule(self._problem, self._device, config)
            chosen = chosen if schedule is None else Tiled(chosen.tile, schedule)
        return whole_parts(chosen, self._problem.Q) if isinstance(chosen, DecodeConfig) else chosen

    def __call__(
        self, a: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, scale: float, seed: Tensor | None,
        keeps_h: bool = True,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """keeps_h: whether h is wanted; without it (out, None) is returned."""
        kept = self._kept
        memory = self._memory.get(raw_stream(self._index) if self._on_gpu else get_ident())
        if kept is None or memory is None:
            return self._through_jit(a, w, u, v, bias, scale, seed)
        pa, pw, pu, pv = a.data_ptr(), w.data_ptr(), u.data_ptr(), v.data_ptr()
        pb, ps = 0 if bias is None else bias.data_ptr(), 0 if seed is None else seed.data_ptr()
        if not kept.usable(pa | pw | pu | pv | pb | ps):
            return self._through_jit(a, w, u, v, bias, scale, seed)
        stream, sync, parts, ph, _ = memory
        out, h = a.new_empty(self._out_shape), None
        if keeps_h:
            h = a.new_empty(self._h_shape)
            ph = h.data_ptr()
        last = (scale,) if seed is None else (scale, ps)
        if self._descriptors:
            reads = kept.described((a, w), (pa, pw))
            kept.launch(stream, *reads, pu, pv, pb, out.data_ptr(), ph, parts, sync, *last)
        else:
            kept.launch(stream, pa, pw, pu, pv, pb, out.data_ptr(), ph, parts, sync, *last)
        return out, h

    def _through_jit(
        self, a: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, scale: float, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        stream = stream_of(self._device)
        sync = counters(self._device, self._counters, stream) if self._counters else None
        if self._counters and sync is None:
            return self._without_counters(a, w, u, v, bias, scale, seed)
        out, h = a.new_empty(self._out_shape), a.new_empty(self._h_shape)
        if not out.numel():
            return out, h
        a, w, u, v = self._views(a, w, u, v)
        bias = None if bias is None else bias.contiguous()
        if self._descriptors and (a.data_ptr() | w.data_ptr()) % 16:
            return lora_matmul(a, w, u, v, bias, scale, seed, *self._dropout)
        parts = None
        if self._scratch:
            parts = a.new_empty(scratch_of(self._problem, self._chosen), dtype=torch.float32)
        if isinstance(self._chosen, DecodeConfig):
            assert parts is not None
            assert sync is not None
            launch = decode_launch(a, w, u, v, bias, scale, out, h, parts, sync, self._chosen)
        else:
            tile, schedule = self._chosen.tile, self._chosen.schedule
            device = choice.known_device(self._device)
            launch = lora_matmul_launch(
                a, w, u, v, bias, scale, seed, *self._dropout, out, h, tile, schedule, device, parts, sync
            )  # fmt: skip
        compiled = launch.through_jit(self._device)
        if self._kept is None and not self._copies:
            self._kept = keep(launch, compiled, self._device)
        if self._kept is not None:
            _remember(self._memory, self._device, stream, sync, 4 * self._scratch, h.nbytes)
        return out, h

    def _without_counters(self, *operands: Any) -> tuple[Tensor, Tensor]:
        """For a graph that is captured on a stream that had no counters: every tile computes its own rows of h."""
        if self._alone is None:
            a, w, u, v, bias, _, seed = operands
            a, w, u, v = self._views(a, w, u, v)
            tile = choice.tiled_rule(self._problem, self._device).tile
            self._alone = MatmulPlan(a, w, u, v, bias, seed, *self._dropout, tile, ScheduleConfig(Schedule.RECOMPUTE))
        return self._alone(*operands)  # type: ignore[return-value]

    def _views(self, a: Tensor, w: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Operands, or transposes of them, as this plan has them."""
        return a, *(t.as_strided(*layout) for t, layout in zip((w, u, v), self._layouts, strict=True))


class AdapterGradPlan:
    """``adapter_grad`` of operands of one layout: called with operands of that layout, it returns (dA, dB)."""

    def __init__(
        self, x: Tensor | None, g: Tensor | None, dy: Tensor | None, h: Tensor | None,
        seed: Tensor | None, dropout_p: float, dtype_A: torch.dtype, dtype_B: torch.dtype,
        config: ReductionConfig | None = None, parts: int | None = None,
    ) -> None:  # fmt: skip
        self._dropout_p, self._dtypes = dropout_p, (dtype_A, dtype_B)
        self._kept: Kept | None = None
        self._memory: dict[int, _Memory] = {}
        pairs = [(rows_of(wide), low) for wide, low in ((x, g), (dy, h)) if wide is not None and low is not None]
        self._none = not pairs
        if not pairs:
            return
        wide, low = pairs[0]
        M, R = low.shape
        self._device, itemsize = wide.device, wide.dtype.itemsize
        self._index, self._on_gpu = wide.device.index, wide.device.type == "cuda"
        self._A = (R, wide.shape[1]) if x is not None and g is not None else None
        self._B = (pairs[-1][0].shape[1], R) if dy is not None and h is not None else None
        K, N = 0 if self._A is None else self._A[1], 0 if self._B is None else self._B[0]
        if config is None and parts is None:
            exact = wide.dtype == torch.float32 and precision(wide.dtype) == "ieee"
            problem = ReductionProblem(M, K + N, R, itemsize, seed is not None, not exact)
            tuned = choice.reduction_choice(problem, self._device)
            config, parts = (None, None) if tuned is None else (tuned.config, tuned.parts)
        self._config = config or choice.reduction_rule(R, itemsize, self._device)
        self._tiles = reduction_tiles(K, N, R, self._config)
        self._parts = parts or choice.parts_rule(self._config, M, self._tiles, itemsize, self._device)
        self._partials = (self._parts, self._tiles, self._config.BLOCK_C, self._config.BLOCK_R)

    def __call__(
        self, x: Tensor | None, g: Tensor | None, dy: Tensor | None, h: Tensor | None, scale: float, seed: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        if self._none:
            return None, None
        # an absent pair has no columns to reduce, and borrows the pointers of the other
        first: tuple[Any, Any] = (dy, h) if self._A is None else (x, g)
        second: tuple[Any, Any] = (x, g) if self._B is None else (dy, h)
        return self._launch(*first, *second, scale, seed)

    def _launch(
        self, x: Tensor, g: Tensor, dy: Tensor, h: Tensor, scale: float, seed: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        kept = self._kept
        memory = self._memory.get(raw_stream(self._index) if self._on_gpu else get_ident())
        if kept is None or memory is None:
            return self._through_jit(x, g, dy, h, scale, seed)
        px, pg, pdy, ph = x.data_ptr(), g.data_ptr(), dy.data_ptr(), h.data_ptr()
        ps = 0 if seed is None else seed.data_ptr()
        if not kept.usable(px | pg | pdy | ph | ps):
            return self._through_jit(x, g, dy, h, scale, seed)
        stream, arrived, partials, *_ = memory
        dA = None if self._A is None else x.new_empty(self._A, dtype=self._dtypes[0])
        dB = None if self._B is None else dy.new_empty(self._B, dtype=self._dtypes[1])
        pdA, pdB = 0 if dA is None else dA.data_ptr(), 0 if dB is None else dB.data_ptr()
        varying = (px, pg, pdy, ph, pdA or pdB, pdB or pdA, partials, arrived, scale)
        kept.launch(stream, *varying) if seed is None else kept.launch(stream, *varying, ps)
        return dA, dB

    def _through_jit(
        self, x: Tensor, g: Tensor, dy: Tensor, h: Tensor, scale: float, seed: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        dA = None if self._A is None else x.new_empty(self._A, dtype=self._dtypes[0])
        dB = None if self._B is None else dy.new_empty(self._B, dtype=self._dtypes[1])
        if not self._tiles:
            return dA, dB
        stream, partials = stream_of(self._device), None
        arrived = counters(self._device, self._tiles, stream) if self._parts > 1 else None
        if arrived is not None:
            partials = x.new_empty(self._partials, dtype=torch.float32)
        rows = rows_of(x), rows_of(dy)
        given = (rows[0], g, rows[1], h, scale, seed, self._dropout_p, dA, dB, self._config)
        launch = adapter_grad_launch(*given, choice.known_device(self._device), partials, arrived)
        compiled = launch.through_jit(self._device)
        copied = any(row.data_ptr() != tensor.data_ptr() for row, tensor in zip(rows, (x, dy), strict=True))
        if arrived is not None or self._parts == 1:
            if self._kept is None and not copied:
                self._kept = keep(launch, compiled, self._device)
            if self._kept is not None:
                size = 4 * math.prod(self._partials) if self._parts > 1 else 0
                _remember(self._memory, self._device, stream, arrived, size, 0)
        return dA, dB
