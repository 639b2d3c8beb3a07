"""What is tuned, and run under a sanitizer: one launch of one kernel over random operands, with its float64 truth.

A choice of None is the compiled extension's kernel, which chooses for itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import eager as eager_backend
from ..backends import native
from ..backends.triton import choice as rules
from ..backends.triton import launch
from ..backends.triton.configs import DecodeConfig, Problem, ReductionProblem
from ..backends.triton.entries import Choice, Reduced, Tiled
from ..backends.triton.prepare import aligned
from ..torch_internals import allows_tf32
from .baselines import Weights
from .check import allowance, error
from .workloads import parse_dtype

FORWARD, INPUT_GRADIENT, ADAPTER_GRADIENTS = PASSES = ("forward", "input gradient", "adapter gradients")


@dataclass(frozen=True)
class Job:
    """A launch of a layer: x (M, K), weight (N, K), rank R. dtype: as ``workloads.parse_dtype`` reads it."""

    pass_: str
    M: int
    K: int
    N: int
    R: int
    dtype: str
    dropout: bool = False

    def __str__(self) -> str:
        dropout = ", dropout" if self.dropout else ""
        return f"{self.pass_}  M={self.M} K={self.K} N={self.N} R={self.R}  {self.dtype}{dropout}"


class Subject(ABC):
    """rule: what ``configs.py`` chooses.  longest_sum: terms of the longest sum in the result."""

    problem: Problem | ReductionProblem
    rule: Choice
    longest_sum: int

    def __init__(self, job: Job, device: torch.device) -> None:
        self.device = device
        base, adapter = parse_dtype(job.dtype)
        generator = torch.Generator(device).manual_seed(0)
        self.weights = Weights.random(job.K, job.N, job.R, False, base, adapter, generator)
        self.x = torch.randn(job.M, job.K, generator=generator, device=device).to(base)
        self.dy = (torch.randn(job.M, job.N, generator=generator, device=device) * job.N**-0.5).to(base)
        self.seed = torch.tensor([1], device=device) if job.dropout else None
        self.dropout_p = 0.1 if job.dropout else 0.0
        self.tensor_cores = base != torch.float32 or allows_tf32()
        self._judged: list[tuple[Tensor, float]] | None = None

    @abstractmethod
    def call(self, choice: Choice | None) -> Sequence[Tensor]:
        """Launch it by this choice."""

    @abstractmethod
    def plain(self, dtype: torch.dtype) -> Sequence[Tensor]:
        """The same results by plain PyTorch in this dtype."""

    def verdict(self, choice: Choice | None) -> str | None:
        """None for right results, else how wrong they are. ``check.py`` derives how wrong they may be."""
        if self._judged is None:
            dtype = self.x.dtype
            pairs = zip(self.plain(dtype), self.plain(torch.float64), strict=True)
            self._judged = [(truth, allowance(plain, truth, dtype, self.longest_sum)) for plain, truth in pairs]
        for result, (truth, allowed) in zip(self.call(choice), self._judged, strict=True):
            off = error(result, truth)
            # not `off > allowed`, which NaN would pass
            if not off <= allowed:
                return f"off by {off:.3g}, and may be by {allowed:.3g}"
        return None


class MatmulSubject(Subject):
    """The forward or the input gradient: out (M, P) and the low-rank product (M, R)."""

    def __init__(self, job: Job, device: torch.device) -> None:
        super().__init__(job, device)
        w, self.backward = self.weights, job.pass_ == INPUT_GRADIENT
        weight, lora_A, lora_B = (tensor.detach() for tensor in (w.weight, w.lora_A, w.lora_B))
        self.operands = (self.x, weight.t(), lora_A.t(), lora_B.t())
        if self.backward:
            self.operands = (self.dy, weight, lora_B, lora_A)
        P, Q = (job.K, job.N) if self.backward else (job.N, job.K)
        sizes = (job.M, P, Q, job.R, weight.itemsize, lora_A.itemsize)
        self.problem = Problem(
            *sizes, job.dropout, self.tensor_cores, aligned(*self.operands[:2]), along_p=self.backward
        )
        self.rule = rules.rule(self.problem, device)
        self.longest_sum = Q

    def call(self, choice: Choice | None) -> Sequence[Tensor]:
        assert not isinstance(choice, Reduced)
        args = (*self.operands, None, self.weights.scale, self.seed, self.dropout_p, self.backward)
        if choice is None:
            return native.lora_matmul(*args)
        if isinstance(choice, Tiled):
            return launch.lora_matmul(*args, config=choice.tile, schedule=choice.schedule)
        return launch.lora_matmul(*args, config=choice)

    def plain(self, dtype: torch.dtype) -> Sequence[Tensor]:
        a, w, u, v = (operand.to(dtype) for operand in self.operands)
        return eager_backend.lora_matmul(a, w, u, v, None, self.weights.scale, self.seed, self.dropout_p, self.backward)


class ReductionSubject(Subject):
    """dA (R, K) and dB (N, R)."""

    def __init__(self, job: Job, device: torch.device) -> None:
        super().__init__(job, device)
        w = self.weights
        self.g = self.dy @ w.lora_B.detach().to(self.dy.dtype)
        self.h = self.x @ w.lora_A.detach().to(self.x.dtype).t()
        self.problem = ReductionProblem(
            job.M, job.K + job.N, job.R, self.x.itemsize, job.dropout, self.tensor_cores
        )  # fmt: skip
        self.rule = rules.rule_reduction(self.problem, device)
        self.longest_sum = job.M

    def call(self, choice: Choice | None) -> Sequence[Tensor]:
        if choice is None:
            return self._both(native.adapter_grad, self.x.dtype)
        assert isinstance(choice, Reduced)
        return self._both(launch.adapter_grad, self.x.dtype, choice.config, choice.parts)

    def plain(self, dtype: torch.dtype) -> Sequence[Tensor]:
        return self._both(eager_backend.adapter_grad, dtype)

    def _both(self, adapter_grad, dtype, *choice) -> Sequence[Tensor]:  # type: ignore[no-untyped-def]
        x, g, dy, h = (tensor.to(dtype) for tensor in (self.x, self.g, self.dy, self.h))
        scale = self.weights.scale
        both: Sequence[Tensor] = adapter_grad(x, g, dy, h, scale, self.seed, self.dropout_p, dtype, dtype, *choice)
        return both


def make(job: Job, device: torch.device) -> Subject:
    kind = ReductionSubject if job.pass_ == ADAPTER_GRADIENTS else MatmulSubject
    return kind(job, device)


def in_one_line(choice: Choice | None) -> str:
    """A choice in one line."""
    if choice is None:
        return "the compiled extension"
    if isinstance(choice, Tiled):
        t, schedule = choice.tile, choice.schedule
        how = schedule.kind.name + (f" {schedule.split}" if schedule.split > 1 else "")
        how += ", descriptors" if schedule.descriptors else ""
        blocks = f"{t.BLOCK_M}×{t.BLOCK_P}×{t.BLOCK_Q}, group {t.GROUP_M}"
        return f"{blocks}, {t.num_warps} warps, {t.num_stages} stages, {how}"
    if isinstance(choice, DecodeConfig):
        parts = f"{choice.SPLIT} and {choice.SPLIT_H} parts"
        return (
            f"decode {choice.BLOCK_P}×{choice.BLOCK_Q}, {choice.num_warps} warps, {choice.num_stages} stages, {parts}"
        )
    c = choice.config
    return f"{c.BLOCK_M}×{c.BLOCK_C}, {c.num_warps} warps, {c.num_stages} stages, {choice.parts} parts"
