"""The launches that a layer makes, as they would be made on a GPU that is not here: what codegen compiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import launch
from .codegen import DEVICES, Resources, compile_call
from .configs import Form, Problem, Schedule, default_config, default_reduction, default_schedule


@dataclass(frozen=True)
class Case:
    """A layer of M tokens, K in_features, N out_features on compute capability arch; dtypes of base and adapters."""

    arch: int
    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    dropout: bool = False


@dataclass(frozen=True)
class Found:
    """plain: the same tile's bare GEMM, where there is one to compare with."""

    case: Case
    work: str
    tile: tuple[int, ...]
    form: str
    resources: Resources
    plain: Resources | None

    @property
    def loop(self) -> int | None:
        """Instructions in the main loop of the tiles that wait: a publisher's is longer, a producer's shorter."""
        loops = self.resources.loops
        return None if not loops else loops[-1] if self.form == "PRODUCE" else loops[0]


def compile_case(case: Case) -> Iterator[Found]:
    """Forward, input gradient and adapter gradients of a case, one by one: each takes seconds."""
    device = DEVICES[case.arch]
    x, dy, weight = _meta(case, case.M, case.K), _meta(case, case.M, case.N), _meta(case, case.N, case.K)
    h = _meta(case, case.M, case.R)
    A = _meta(case, case.R, case.K, dtype=case.adapter_dtype)
    B = _meta(case, case.N, case.R, dtype=case.adapter_dtype)
    seed = _meta(case, 1, dtype=torch.int64) if case.dropout else None
    sync = _meta(case, 1 << 14, dtype=torch.int32)

    exact = case.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    forward = (x, weight.t(), A.t(), B.t(), _meta(case, case.N), 1.5, seed, 0.1, False, _meta(case, case.M, case.N), h)
    backward = (dy, weight, B, A, None, 1.5, seed, 0.1, True, _meta(case, case.M, case.K), h)
    operands: tuple[Any, ...]
    for work, operands, P, Q in (("forward", forward, case.N, case.K), ("input gradient", backward, case.K, case.N)):
        problem = Problem(
            case.M, P, Q, case.R, case.dtype.itemsize, case.adapter_dtype.itemsize, case.dropout, not exact
        )
        config = default_config(problem, device)
        schedule = default_schedule(problem, config, device)
        calls = [
            launch.lora_matmul_call(*operands, config, s, None if s.form <= Form.RECOMPUTE else sync)  # type: ignore[call-arg]
            for s in (schedule, Schedule(Form.PLAIN))
        ]
        calls[1] = replace(calls[1], flags=calls[1].flags | {"DROP_INPUT": False, "DROP_OUTPUT": False})
        ours, plain = (compile_call(call, case.arch) for call in calls)
        tile = (config.BLOCK_M, config.BLOCK_P, config.BLOCK_Q, config.num_warps, config.num_stages)
        yield Found(case, work, tile, schedule.form.name, ours, plain)
    reduction = default_reduction(case.R, case.dtype.itemsize, device)
    parts = _meta(case, 4, 128, 64, reduction.BLOCK_R, dtype=torch.float32)
    call = launch.adapter_grad_call(x, h, dy, h, 1.5, seed, 0.1, A, B, reduction, parts, sync)
    tile = (reduction.BLOCK_M, reduction.BLOCK_C, reduction.BLOCK_R, reduction.num_warps, reduction.num_stages)
    yield Found(case, "adapter gradients", tile, "in parts", compile_call(call, case.arch), None)


def _meta(case: Case, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(*shape, dtype=dtype or case.dtype, device="meta")
