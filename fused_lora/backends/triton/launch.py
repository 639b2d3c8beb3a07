"""The operators on the host, ``Backend``'s contracts: what a layout of operands needs is worked out once, in a plan.

A plan is kept for operands of its very shapes, strides and dtypes, on its device and at its precision. A call of one
allocates the results and starts the kernel: what the choice, the grid, the strides and the flags were found from can't
have changed. Pointers and scale are those of the call.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...torch_internals import raw_stream
from . import choice
from .configs import DecodeConfig, Form, Problem, ReductionConfig, ReductionProblem, Schedule, TileConfig
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
from .workspace import counters

# of each kind; M varies, and every M has a plan of its own
MOST_PLANS = 4096

Plan = TypeVar("Plan", "MatmulPlan", "AdapterGradPlan")


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
    """One launch, ``decode.py``'s for small M. config, schedule: the kernel, tiles and schedule to take instead."""
    if config is None and schedule is None:
        plan = matmul_plan(a, w, u, v, bias, seed, dropout_p, dropout_on_output)
    else:
        plan = MatmulPlan(a, w, u, v, bias, seed, dropout_p, dropout_on_output, config, schedule)
    return plan(a, w, u, v, bias, scale, seed)


def matmul_plan(
    a: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None,
    seed: Tensor | None, dropout_p: float, dropout_on_output: bool,
) -> MatmulPlan:  # fmt: skip
    """The plan of operands like these, made where there is none yet."""
    key = (
        a.shape, a.stride(), a.dtype, w.shape, w.stride(), u.shape, u.stride(), u.dtype, v.stride(), v.dtype,
        None if bias is None else bias.stride(), seed is None, dropout_p, dropout_on_output, a.device,
        a.dtype == torch.float32 and precision(), (a.data_ptr() | w.data_ptr()) % 16 == 0,
    )  # fmt: skip
    return _matmul_plans.get(key) or _put(
        _matmul_plans, key, MatmulPlan(a, w, u, v, bias, seed, dropout_p, dropout_on_output)
    )


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
        like is not None and (like.dtype, like.device, like.dtype == torch.float32 and precision()),
    )  # fmt: skip
    return _adapter_grad_plans.get(key) or _put(
        _adapter_grad_plans, key, AdapterGradPlan(x, g, dy, h, seed, dropout_p, dtype_A, dtype_B)
    )


_matmul_plans: dict[Hashable, MatmulPlan] = {}
_adapter_grad_plans: dict[Hashable, AdapterGradPlan] = {}
_lock = threading.Lock()


def _put(plans: dict[Hashable, Plan], key: Hashable, plan: Plan) -> Plan:
    with _lock:
        if len(plans) >= MOST_PLANS:
            # the oldest: who meets so many is not coming back to it soon
            del plans[next(iter(plans))]
        # of two threads that made one, both take the first
        return plans.setdefault(key, plan)


def forget_plans() -> None:
    """For who changes what choices are made from: a file of tuned choices, a device's rules."""
    with _lock:
        _matmul_plans.clear()
        _adapter_grad_plans.clear()
    choice.choice.cache_clear()
    choice.reduction_choice.cache_clear()


class MatmulPlan:
    """``lora_matmul`` of operands of one layout: called with operands of that layout, it returns (out, h).

    Of w, u and v it reads the pointers alone, so their transposes do as well.
    """

    def __init__(
        self, a: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None,
        seed: Tensor | None, dropout_p: float, dropout_on_output: bool,
        config: TileConfig | DecodeConfig | None = None, schedule: Schedule | None = None,
    ) -> None:  # fmt: skip
        self._device, self._on_gpu, self._dropout = a.device, a.device.type == "cuda", (dropout_p, dropout_on_output)
        rows = math.prod(a.shape[:-1])
        self._out_shape, self._h_shape = (*a.shape[:-1], w.shape[1]), (rows, u.shape[1])
        self._counters = 0
        self._scratch: tuple[int, ...] | None = None
        self._kept: Kept | None = None
        self._alone: MatmulPlan | None = None
        self._empty = math.prod(self._out_shape) == 0
        if self._empty:
            return
        a2 = rows_of(a)
        # rows that no strides describe are copied
        self._copies = a2.data_ptr() != a.data_ptr()
        self._copies_bias = bias is not None and not bias.is_contiguous()
        self._layouts = [(tensor.shape, tensor.stride()) for tensor in (a, w, u, v)]
        exact = a.dtype == torch.float32 and precision() == "ieee"
        sizes = (rows, w.shape[1], a.shape[-1], u.shape[1], a.dtype.itemsize, u.dtype.itemsize)
        problem = Problem(*sizes, seed is not None, not exact, aligned(a2, w), along_p=w.stride(0) != 1)
        self._problem = problem
        self._choose(problem, config, schedule)

    def _choose(
        self, problem: Problem, config: TileConfig | DecodeConfig | None, schedule: Schedule | None
    ) -> None:  # fmt: skip
        chosen: Tiled | DecodeConfig
        if config is None and schedule is None:
            chosen = choice.choice(problem, self._device)
        elif isinstance(config, DecodeConfig):
            chosen = config
        else:
            ruled = choice.tiled_rule(problem, self._device, config)
            chosen = ruled if schedule is None else Tiled(ruled.tile, schedule)
        M, P, R = problem.M, problem.P, problem.R
        self._descriptors = False
        self._chosen: Tiled | DecodeConfig = chosen
        if isinstance(chosen, DecodeConfig):
            self._chosen = chosen = whole_parts(chosen, problem.Q)
            self._counters, self._scratch = counters_of(M, P, R, chosen), scratch_of(M, P, R, chosen)
            return
        self._descriptors = chosen.schedule.descriptors
        if chosen.schedule.form in (Form.PUBLISH, Form.PRODUCE):
            self._counters = counters_of(M, P, R, chosen.tile)
        if chosen.schedule.form == Form.PRODUCE:
            self._scratch = scratch_of(M, P, R, chosen.tile, chosen.schedule.split)

    def __call__(
        self, a: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, scale: float, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        sync = scratch = None
        stream = raw_stream(self._device.index) if self._on_gpu else threading.get_ident()
        if self._counters:
            sync = counters(self._device, self._counters, stream)
            if sync is None:
                return self._without_counters(a, w, u, v, bias, scale, seed)
            if self._scratch is not None:
                scratch = a.new_empty(self._scratch, dtype=torch.float32)
        out, h = a.new_empty(self._out_shape), a.new_empty(self._h_shape)
        if self._empty:
            return out, h
        if self._copies:
            a = rows_of(a)
        if self._copies_bias and bias is not None:
            bias = bias.contiguous()
        pa, pw, pu, pv = a.data_ptr(), w.data_ptr(), u.data_ptr(), v.data_ptr()
        pb, ps = 0 if bias is None else bias.data_ptr(), 0 if seed is None else seed.data_ptr()
        kept = self._kept
        if kept is not None and kept.usable(pa | pw | pu | pv | pb | ps):
            kept.launch(
                stream, *(kept.described((a, w), (pa, pw)) if self._descriptors else (pa, pw)), pu, pv, pb,
                out.data_ptr(), h.data_ptr(), 0 if scratch is None else scratch.data_ptr(),
                0 if sync is None else sync.data_ptr(), scale, *(() if seed is None else (ps,)),
            )  # fmt: skip
            return out, h
        a, w, u, v = self._views(a, w, u, v)
        if self._descriptors and (pa | pw) % 16:
            out, h = lora_matmul(a, w, u, v, bias, scale, seed, *self._dropout)
            return out.view(self._out_shape), h
        results = (out, h)
        if isinstance(self._chosen, DecodeConfig):
            assert scratch is not None
            assert sync is not None
            launch = decode_launch(a, w, u, v, bias, scale, *results, scratch, sync, self._chosen)
        else:
            tiled = self._chosen
            launch = lora_matmul_launch(
                a, w, u, v, bias, scale, seed, *self._dropout, *results, tiled.tile, tiled.schedule, scratch, sync
            )  # fmt: skip
        compiled = launch.through_jit(self._device)
        if kept is None:
            self._kept = keep(launch, compiled, self._device)
        return results

    def _without_counters(self, *operands: Any) -> tuple[Tensor, Tensor]:
        """For a graph that is captured on a stream that had no counters: every tile computes its own rows of h."""
        if self._alone is None:
            a, w, u, v, bias, _, seed = operands
            a, w, u, v = self._views(a, w, u, v)
            tile = choice.tiled_rule(self._problem, self._device).tile
            self._alone = MatmulPlan(a, w, u, v, bias, seed, *self._dropout, tile, Schedule(Form.RECOMPUTE))
        return self._alone(*operands)

    def _views(self, a: Tensor, w: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Operands, or transposes of them, as this plan has them."""
        given = (a, w, u, v)
        layouts = (a.shape, a.stride()), *self._layouts[1:]
        return tuple(t.as_strided(*layout) for t, layout in zip(given, layouts, strict=True))


class AdapterGradPlan:
    """``adapter_grad`` of operands of one layout: called with operands of that layout, it returns (dA, dB)."""

    def __init__(
        self, x: Tensor | None, g: Tensor | None, dy: Tensor | None, h: Tensor | None,
        seed: Tensor | None, dropout_p: float, dtype_A: torch.dtype, dtype_B: torch.dtype,
        config: ReductionConfig | None = None, parts: int | None = None,
    ) -> None:  # fmt: skip
        self._dropout_p, self._dtypes = dropout_p, (dtype_A, dtype_B)
        self._kept: Kept | None = None
        pairs = [(rows_of(wide), low) for wide, low in ((x, g), (dy, h)) if wide is not None and low is not None]
        self._none = not pairs
        if not pairs:
            return
        wide, low = pairs[0]
        M, R = low.shape
        self._device, self._on_gpu, itemsize = wide.device, wide.device.type == "cuda", wide.dtype.itemsize
        self._A = (R, wide.shape[1]) if x is not None and g is not None else None
        self._B = (pairs[-1][0].shape[1], R) if dy is not None and h is not None else None
        K, N = 0 if self._A is None else self._A[1], 0 if self._B is None else self._B[0]
        if config is None and parts is None:
            exact = wide.dtype == torch.float32 and precision() == "ieee"
            problem = ReductionProblem(M, K + N, R, itemsize, seed is not None, not exact)
            tuned = choice.reduction_choice(problem, self._device)
            config, parts = (None, None) if tuned is None else (tuned.config, tuned.parts)
        self._config = config or choice.reduction_rule(R, itemsize, self._device)
        self._tiles = reduction_tiles(K, N, R, self._config)
        self._parts = parts or choice.parts_rule(self._config, M, self._tiles, itemsize, self._device)

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
        dA = None if self._A is None else x.new_empty(self._A, dtype=self._dtypes[0])
        dB = None if self._B is None else dy.new_empty(self._B, dtype=self._dtypes[1])
        if not self._tiles:
            return dA, dB
        x, dy = rows_of(x), rows_of(dy)
        stream = raw_stream(self._device.index) if self._on_gpu else threading.get_ident()
        partials = None
        arrived = counters(self._device, self._tiles, stream) if self._parts > 1 else None
        if arrived is not None:
            blocks = (self._parts, self._tiles, self._config.BLOCK_C, self._config.BLOCK_R)
            partials = x.new_empty(blocks, dtype=torch.float32)
        kept = self._kept
        if kept is not None and (arrived is None) == (self._parts == 1):
            pointers = [t.data_ptr() for t in (x, g, dy, h)]
            ps = 0 if seed is None else seed.data_ptr()
            if kept.usable(pointers[0] | pointers[1] | pointers[2] | pointers[3] | ps):
                to = [grad.data_ptr() for grad in (dA, dB) if grad is not None]
                kept.launch(
                    stream, *pointers, to[0], to[-1],
                    0 if partials is None else partials.data_ptr(), 0 if arrived is None else arrived.data_ptr(),
                    scale, *(() if seed is None else (ps,)),
                )  # fmt: skip
                return dA, dB
        launch = adapter_grad_launch(
            x, g, dy, h, scale, seed, self._dropout_p, dA, dB, self._config, partials, arrived
        )  # fmt: skip
        compiled = launch.through_jit(self._device)
        if kept is None and (arrived is None) == (self._parts == 1):
            self._kept = keep(launch, compiled, self._device)
        return dA, dB
