"""The candidates: each is a module that computes ``x Wᵀ + scale · (x Aᵀ) Bᵀ + bias`` over the same tensors.

Modules, not functions, because that is what a user swaps: the cost of calling one belongs to the time.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends, reference
from ..layer import FusedLoRALinear
from .results import FROZEN as FROZEN

EAGER, PEFT = "eager", "peft"
PARAMETRIZE = "parametrize"
COMPILED = "compiled"
LORAFUSION = "lorafusion"
OURS_PREFIX = "ours-"
# ours-triton with one of them imposed
SCHEDULES = tuple(f"{OURS_PREFIX}{name}" for name in ("publish", "produce", "recompute"))
# programs that make the low-rank product of a row of tiles, where that schedule is imposed
PRODUCERS = 4


@dataclass(frozen=True)
class Weights:
    """One layer: weight (N, K) and bias (N,) or None, frozen; lora_A (R, K) and lora_B (N, R), trained."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float

    @classmethod
    def random(
        cls,
        K: int,
        N: int,
        R: int,
        bias: bool,
        dtype: torch.dtype,
        adapter_dtype: torch.dtype,
        generator: torch.Generator,
    ) -> Weights:
        """Entries such that W and the adapter count alike, and nothing leaves float16's range. scale is 2."""

        linear = nn.Linear(K, N, bias, device="meta")
        linear.weight = nn.Parameter(_draw(generator, dtype, K**-0.5, N, K), requires_grad=False)
        if bias:
            linear.bias = nn.Parameter(_draw(generator, dtype, 1.0, N), requires_grad=False)
        return cls.beside(linear, R, 2.0, adapter_dtype, generator)

    @classmethod
    def beside(
        cls, linear: nn.Linear, rank: int, scale: float, dtype: torch.dtype, generator: torch.Generator
    ) -> Weights:
        """The linear's own weight and bias, and a random adapter."""
        N, K = linear.weight.shape
        lora_A = nn.Parameter(_draw(generator, dtype, K**-0.5, rank, K))
        lora_B = nn.Parameter(_draw(generator, dtype, rank**-0.5, N, rank))
        return cls(cast(nn.Parameter, linear.weight), linear.bias, lora_A, lora_B, scale)

    def in_float64(self) -> Weights:
        def widened(tensor: nn.Parameter) -> nn.Parameter:
            return nn.Parameter(tensor.detach().double(), tensor.requires_grad)

        bias = None if self.bias is None else widened(self.bias)
        return Weights(widened(self.weight), bias, widened(self.lora_A), widened(self.lora_B), self.scale)

    def with_own_adapter(self) -> Weights:
        """The same base, and a copy of the adapter that an optimizer may write to."""
        lora_A, lora_B = (nn.Parameter(adapter.detach().clone()) for adapter in (self.lora_A, self.lora_B))
        return replace(self, lora_A=lora_A, lora_B=lora_B)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        every = (self.weight, self.bias, self.lora_A, self.lora_B)
        return tuple(parameter for parameter in every if parameter is not None)

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def linear(self) -> nn.Linear:
        """The bare frozen layer, sharing weight and bias."""
        N, K = self.weight.shape
        linear = nn.Linear(K, N, self.bias is not None, device="meta")
        linear.weight = self.weight
        if self.bias is not None:
            linear.bias = self.bias
        return linear


def _draw(generator: torch.Generator, dtype: torch.dtype, std: float, *size: int) -> Tensor:
    return (torch.randn(size, generator=generator, device=generator.device) * std).to(dtype)


# --------------------------------------------------------------------------------------------------
# The modules
# --------------------------------------------------------------------------------------------------


class EagerLoRA(nn.Module):
    """What frameworks write: five kernels, ordinary autograd. Adapters are rounded to x's dtype, as autocast would."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        w = self.weights
        return reference.eager_lora_linear(x, w.weight, w.lora_A.to(x.dtype), w.lora_B.to(x.dtype), w.scale, w.bias)


class AddmmLoRA(EagerLoRA):
    """What Unsloth and axolotl do: three GEMMs forward, the last into the first's result, and six backward."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weights
        y: Tensor = _InPlaceAddmm.apply(
            x, w.weight, w.lora_A.to(x.dtype), w.lora_B.to(x.dtype), w.bias, w.scale
        )  # fmt: skip
        return y


class _InPlaceAddmm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, lora_A, lora_B)
        ctx.scale = scale
        y = F.linear(x, weight, bias)
        return y.addmm_(x @ lora_A.t(), lora_B.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, lora_A, lora_B = ctx.saved_tensors
        g = dy @ lora_B
        dA = torch.empty_like(lora_A).addmm_(g.t(), x, beta=0, alpha=ctx.scale)
        dB = torch.empty_like(lora_B).addmm_(dy.t(), x @ lora_A.t(), beta=0, alpha=ctx.scale)
        dx = (dy @ weight).addmm_(g, lora_A, alpha=ctx.scale) if ctx.needs_input_grad[0] else None
        return dx, None, dA, dB, None, None


class ScheduleLoRA(nn.Module):
    """Our kernels with one schedule imposed, in the rule's tile, small M too; ours-triton chooses."""

    def __init__(self, schedule: str, weights: Weights) -> None:
        super().__init__()
        # here, not at the top: Triton may be missing, and must be told to interpret before it is imported
        from ..backends.triton.configs import Schedule, ScheduleConfig

        self.weights, kind = weights, Schedule[schedule]
        self.schedule = ScheduleConfig(kind, PRODUCERS if kind == Schedule.PRODUCE else 1)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weights
        y: Tensor = _InOneSchedule.apply(x, w.weight, w.lora_A, w.lora_B, w.bias, w.scale, self.schedule)
        return y


class _InOneSchedule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scale: float,
        schedule: Any,
    ) -> Tensor:  # fmt: skip
        from ..backends.triton import launch

        operands = (x, weight.t(), lora_A.t(), lora_B.t(), bias)
        y, h = launch.lora_matmul(*operands, scale, None, 0.0, False, schedule=schedule)
        ctx.save_for_backward(x, h, weight, lora_A, lora_B)
        ctx.scale, ctx.schedule = scale, schedule
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from ..backends.triton import launch

        x, h, weight, lora_A, lora_B = ctx.saved_tensors
        dx, g = launch.lora_matmul(dy, weight, lora_B, lora_A, None, ctx.scale, None, 0.0, True, schedule=ctx.schedule)
        dA, dB = launch.adapter_grad(x, g, dy, h, ctx.scale, None, 0.0, lora_A.dtype, lora_B.dtype)
        return dx, None, dA, dB, None, None, None


def _frozen(weights: Weights) -> nn.Module:
    return weights.linear()


def _parametrize(weights: Weights) -> nn.Module:
    linear = weights.linear()
    lora = reference.parametrize_linear(linear, weights.rank, weights.scale * weights.rank)
    lora.lora_A, lora.lora_B = weights.lora_A, weights.lora_B
    return linear


def _compiled(weights: Weights) -> nn.Module:
    """``torch.compile`` of the eager baseline, for these sizes alone."""
    # or the ninth shape would run eagerly
    torch.compiler.reset()
    return cast(nn.Module, torch.compile(EagerLoRA(weights), dynamic=False))


def _peft(weights: Weights) -> nn.Module:
    """PEFT's own layer, made by PEFT, over the same tensors."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=weights.rank, lora_alpha=int(weights.scale * weights.rank), target_modules=["linear"])
    layer: Any = inject_adapter_in_model(config, nn.ModuleDict({"linear": weights.linear()})).get_submodule("linear")
    layer.lora_A["default"].weight = weights.lora_A
    layer.lora_B["default"].weight = weights.lora_B
    return cast(nn.Module, layer)


class LoRAFusionLoRA(EagerLoRA):
    """LoRAFusion's own kernels (github.com/CentML/lorafusion), by the call that its PEFT patch makes."""

    def forward(self, x: Tensor) -> Tensor:
        from lorafusion.ops.lora_v1 import fused_linear_lora

        w = self.weights
        # it takes (batch, tokens, K) alone, and calls the scale alpha
        y: Tensor = fused_linear_lora(
            x=x[None], linear_w=w.weight, lora_a=w.lora_A, lora_b=w.lora_B, alpha=w.scale, linear_bias=w.bias
        )
        return y[0]


def _ours(impl: str, weights: Weights) -> nn.Module:
    alpha = weights.scale * weights.rank
    layer = FusedLoRALinear.from_linear(weights.linear(), rank=weights.rank, alpha=alpha, impl=impl)
    adapter = layer.adapters["default"]
    adapter.lora_A, adapter.lora_B = weights.lora_A, weights.lora_B
    return layer


# --------------------------------------------------------------------------------------------------
# Which candidates are installed and can run
# --------------------------------------------------------------------------------------------------


def _always(weights: Weights) -> None:
    return None


def _why_no_impl(impl: str, weights: Weights) -> str | None:
    return backends.why_not(impl, weights.weight.device, weights.weight.dtype)


def _why_no_compiler(weights: Weights) -> str | None:
    """For a CPU, torch.compile writes C++ that Python loads."""
    if weights.weight.device.type == "cuda":
        return None
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        return "torch.compile for a CPU needs a C++ compiler, and there is none"
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return None if headers.exists() else f"torch.compile for a CPU needs Python's headers, and there is no {headers}"


def _why_no_peft(weights: Weights) -> str | None:
    try:
        import peft  # noqa: F401  # to see whether it can be
    except ImportError as error:
        return f"PEFT does not import: {error}"
    return None


def _why_no_lorafusion(weights: Weights) -> str | None:
    """Why its kernels can't take these weights; other reasons come from the library itself."""
    device, dtype, rank = weights.weight.device, weights.weight.dtype, weights.rank
    if device.type != "cuda":
        return "LoRAFusion's kernels run on CUDA devices alone"
    if dtype.itemsize != 2 or weights.lora_A.dtype != dtype:
        return "LoRAFusion's kernels are timed in 16 bits, its adapters in the base's dtype"
    if rank < 16 or rank & (rank - 1):
        return f"LoRAFusion's kernels take ranks that are powers of two from 16 on, not {rank}"
    try:
        from lorafusion.ops import lora_v1  # noqa: F401  # to see whether it can be
        from lorafusion.ops.triton_ops.config import get_hardware_config

        get_hardware_config()
    except Exception as error:
        # foreign code: beside what is not installed, it refuses GPUs and versions in errors of many kinds
        return f"LoRAFusion cannot run here: {error}"
    return None


def _why_no_parametrize(weights: Weights) -> str | None:
    mixed = weights.lora_A.dtype != weights.weight.dtype
    return "W + scale · B A needs adapters of the weight's dtype" if mixed else None


@dataclass(frozen=True)
class Recipe:
    """How a candidate is made. build: the module over these weights.  why_not: why it can't be timed on them, or None.

    kernels: made of Triton kernels, which say nothing about time where they are interpreted.
    first: on a GPU timed in the shapes of the tag "first" alone, to keep the run short.
    """

    build: Callable[[Weights], nn.Module]
    why_not: Callable[[Weights], str | None] = _always
    kernels: bool = False
    first: bool = False


CANDIDATES = {
    FROZEN: Recipe(_frozen),
    **{
        f"{OURS_PREFIX}{impl}": Recipe(partial(_ours, impl), partial(_why_no_impl, impl), kernels=impl == "triton")
        for impl in ("triton", "native", "eager")
    },
    **{
        name: Recipe(
            partial(ScheduleLoRA, name[len(OURS_PREFIX) :].upper()), partial(_why_no_impl, "triton"), kernels=True
        )
        for name in SCHEDULES
    },
    "addmm": Recipe(AddmmLoRA),
    EAGER: Recipe(EagerLoRA),
    COMPILED: Recipe(_compiled, _why_no_compiler, first=True),
    PEFT: Recipe(_peft, _why_no_peft),
    LORAFUSION: Recipe(LoRAFusionLoRA, _why_no_lorafusion),
    PARAMETRIZE: Recipe(_parametrize, _why_no_parametrize),
}


def our_choice(weights: Weights) -> str:
    """The candidate that ``impl="auto"`` means for these weights; on a GPU, whatever the sizes: as
    ``groups.our_default``."""
    return OURS_PREFIX + backends.choose("auto", weights.weight.device, weights.weight.dtype)
