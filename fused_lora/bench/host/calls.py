"""What is timed: a call of a layer, its parts, and the same in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import backends, functional, validation
from ..baselines import CANDIDATES, EAGER, FROZEN, OURS_PREFIX, PEFT, Weights
from ..measure import Thunk
from . import parts
from .watch import watching

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sizes:
    """The tensors of a layer's call; symbols as in ``reference.py``."""

    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"(M={self.M} K={self.K} N={self.N} R={self.R})"

    def operands(self, device: torch.device) -> tuple[Tensor, Weights]:
        """x and the layer's weights, random."""
        generator = torch.Generator(device).manual_seed(0)
        weights = Weights.random(self.K, self.N, self.R, False, self.dtype, self.dtype, generator)
        return torch.randn(self.M, self.K, dtype=self.dtype, device=device), weights


# A kernel's sizes choose it and how it loads. A CPU must allocate and compute what it is given: results are so small
# that they come from its heap without a system call, as a GPU's come from PyTorch's cache, and plain PyTorch is tiny.
TRITON = {
    parts.DECODE: Sizes(1, 256, 256, 16, torch.bfloat16),
    parts.TILE: Sizes(160, 64, 384, 16, torch.bfloat16),
    parts.DESCRIPTORS: Sizes(4096, 1280, 1280, 16, torch.bfloat16),
}
TINY = Sizes(1, 16, 16, 4, torch.float32)
NATIVE = Sizes(32, 256, 256, 16, torch.float32)


class Nothing(nn.Module):
    """What ``nn.Module`` costs."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def triton_forward(sizes: Sizes, device: torch.device) -> dict[str, Thunk]:
    """Without gradients. To be made and called within ``no_grad``."""
    from ...backends.triton import launch

    x, weights = sizes.operands(device)
    layer = CANDIDATES[f"{OURS_PREFIX}triton"].build(weights)
    W, A, B, scale = weights.weight, weights.lora_A, weights.lora_B, weights.scale
    # the first call of its kind goes through Triton's JIT, the second goes as all later ones
    with watching() as first:
        results = [layer(x)]
    with watching() as warm:
        results.append(layer(x))
    operands = (x, W.t(), A.t(), B.t(), None, scale, None, 0.0, False)
    operator = torch.ops.fused_lora.lora_matmul.default
    plan = launch.matmul_plan(*operands[:5], None, 0.0, False)
    out = (sizes.M, sizes.N)

    def validate() -> None:
        validation.check_operands(x, W, A, B, None)
        validation.check_scale(scale)
        validation.check_dropout(0.0)
        validation.check_impl("triton")
        validation.check_dtypes(x, W, A, B, None)

    return {
        parts.LAYER: lambda: layer(x),
        parts.LORA_LINEAR: lambda: functional.lora_linear(x, W, A, B, scale, impl="triton"),
        parts.PLAN: lambda: plan(x, W, A, B, None, scale, None, False),
        parts.LAUNCHER: partial(_make, warm.launches, results),
        parts.ALLOCATOR: lambda: x.new_empty(out),
        parts.VALIDATION: validate,
        parts.CHOICE: lambda: backends.choose("triton", x.device, x.dtype),
        parts.VIEWS: lambda: (W.t(), A.t(), B.t()),
        parts.OPERATOR: lambda: operator(*operands, "triton"),
        parts.BACKEND: lambda: launch.lora_matmul(*operands),
        parts.JIT: first.jit_runs[0],
    }


def _make(launches: Sequence[Thunk], written: object) -> None:
    """The launches again. written: what they write to, so that its memory stays theirs."""
    for launch in launches:
        launch()


def plain_forward(device: torch.device) -> dict[str, Thunk]:
    """Without gradients. To be called within ``no_grad``."""
    x, weights = TINY.operands(device)
    W, A, B, scale = weights.weight, weights.lora_A, weights.lora_B, weights.scale
    eager, nothing = CANDIDATES[EAGER].build(weights), Nothing()
    return {
        # the fewest calls by which eager computes the layer
        parts.GEMMS: lambda: torch.addmm(F.linear(x, W), F.linear(x, A), B.t(), alpha=scale),
        EAGER: lambda: eager(x),
        parts.LINEAR: lambda: F.linear(x, W),
        parts.MODULE: lambda: nothing(x),
    }


def triton_step(sizes: Sizes, device: torch.device) -> dict[str, Thunk]:
    """Forward and backward, and the launches in it."""
    x, weights = sizes.operands(device)
    call = step(CANDIDATES[f"{OURS_PREFIX}triton"].build(weights), (weights.lora_A, weights.lora_B), x)
    call()
    with watching() as warm:
        results = call()
    return {parts.LAYER: call, parts.LAUNCHER: partial(_make, warm.launches, results)}


def plain_step(device: torch.device) -> dict[str, Thunk]:
    """LoRA by eager PyTorch and by PEFT where it is installed; the bare linear, trained and frozen."""
    x, weights = TINY.operands(device)
    full = nn.Linear(TINY.K, TINY.N, bias=False, dtype=TINY.dtype, device=device)
    trained = {parts.FULL: step(full, (full.weight,), x), FROZEN: step(weights.linear(), (), x)}
    return _steps({EAGER: EAGER, PEFT: PEFT}, x, weights) | trained


def native_forward() -> dict[str, Thunk]:
    """Without gradients, on the CPU; no LAYER where the extension is not built. To be called within ``no_grad``."""
    x, weights = NATIVE.operands(CPU)
    calls: dict[str, Thunk] = {parts.LINEAR: lambda: F.linear(x, weights.weight)}
    native = CANDIDATES[f"{OURS_PREFIX}native"]
    if native.why_not(weights) is None:
        layer = native.build(weights)
        calls[parts.LAYER] = lambda: layer(x)
    return calls


def native_step() -> dict[str, Thunk]:
    """On the CPU; no LAYER where the extension is not built."""
    x, weights = NATIVE.operands(CPU)
    return {
        **_steps({parts.LAYER: f"{OURS_PREFIX}native", EAGER: EAGER}, x, weights),
        FROZEN: step(weights.linear(), (), x),
    }


def _steps(candidates: dict[str, str], x: Tensor, weights: Weights) -> dict[str, Thunk]:
    """Part -> step, of those candidates that can run here."""
    wanted = (weights.lora_A, weights.lora_B)
    recipes = {part: CANDIDATES[name] for part, name in candidates.items()}
    here = {part: recipe for part, recipe in recipes.items() if recipe.why_not(weights) is None}
    return {part: step(recipe.build(weights), wanted, x) for part, recipe in here.items()}


def step(module: nn.Module, wanted: Sequence[Tensor], x: Tensor) -> Thunk:
    """Forward and backward, with gradients of x and of what is wanted."""
    x = x.detach().requires_grad_()
    dy = torch.randn_like(module(x))
    return lambda: torch.autograd.grad(module(x), (x, *wanted), dy)
