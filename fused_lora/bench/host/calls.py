"""What is timed: a call of a layer, what it is made of, and what the like costs in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import backends, functional, validation
from ..baselines import EAGER, FROZEN, OURS, PEERS, Weights
from ..measure import Call
from .parts import (
    ALLOCATOR,
    BACKEND,
    CHOICE,
    FULL,
    GEMMS,
    JIT,
    LAUNCHER,
    LAYER,
    LINEAR,
    LORA_LINEAR,
    MODULE,
    OPERATOR,
    PEFT,
    STEP,
    VALIDATION,
    VIEWS,
)  # fmt: skip
from .watch import watching


@dataclass(frozen=True)
class Sizes:
    """Of a layer at work, symbols as in ``reference.py``."""

    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"M={self.M} K={self.K} N={self.N} R={self.R} {str(self.dtype).removeprefix('torch.')}"

    def operands(self, device: torch.device) -> tuple[Tensor, Weights]:
        """x and the layer's weights, random."""
        generator = torch.Generator(device).manual_seed(0)
        weights = Weights.random(self.K, self.N, self.R, False, self.dtype, self.dtype, generator)
        return torch.randn(self.M, self.K, dtype=self.dtype, device=device), weights


# A kernel's sizes don't show in the host's time, but choose the kernel and how it loads. A CPU must compute what it is
# given, so what is plain PyTorch is as small as can be.
TRITON = {
    "decode": Sizes(1, 1024, 1024, 16, torch.bfloat16),
    "tile": Sizes(512, 1024, 1024, 16, torch.bfloat16),
    "descriptors": Sizes(4096, 1024, 1024, 16, torch.bfloat16),
}
TINY = Sizes(1, 16, 16, 4, torch.float32)
NATIVE = Sizes(32, 256, 256, 16, torch.float32)
CPU = torch.device("cpu")


class Nothing(nn.Module):
    """What ``nn.Module`` costs."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def triton_forward(sizes: Sizes, device: torch.device) -> dict[str, Call]:
    """Without gradients. To be made and called within ``no_grad``."""
    from ...backends.triton import launch

    x, weights = sizes.operands(device)
    layer = PEERS[f"{OURS}triton"].build(weights)
    W, A, B, scale = weights.weight, weights.lora_A, weights.lora_B, weights.scale
    # the first call of its kind goes through Triton's JIT, and shows what is launched
    with watching() as first:
        layer(x)
    operands = (x, W.t(), A.t(), B.t(), None, scale, None, 0.0, False)
    operator = torch.ops.fused_lora.lora_matmul.default
    out, low_rank = launch.lora_matmul(*operands)

    def validate() -> None:
        validation.check_operands(x, W, A, B, None)
        validation.check_scale(scale)
        validation.check_dropout(0.0)
        validation.check_impl("triton")
        validation.check_dtypes(x, W, A, B, None)

    return {
        LAYER: lambda: layer(x),
        LORA_LINEAR: lambda: functional.lora_linear(x, W, A, B, scale, impl="triton"),
        OPERATOR: lambda: operator(*operands, "triton"),
        BACKEND: lambda: launch.lora_matmul(*operands),
        JIT: first.jit_runs[0],
        LAUNCHER: first.launches[0],
        ALLOCATOR: lambda: (x.new_empty(out.shape), x.new_empty(low_rank.shape)),
        VIEWS: lambda: (W.t(), A.t(), B.t()),
        VALIDATION: validate,
        CHOICE: lambda: backends.choose("triton", x.device, x.dtype),
    }


def plain_forward(device: torch.device) -> dict[str, Call]:
    """Without gradients. To be called within ``no_grad``."""
    x, weights = TINY.operands(device)
    W, A, B, scale = weights.weight, weights.lora_A, weights.lora_B, weights.scale
    eager, nothing = PEERS[EAGER].build(weights), Nothing()
    return {
        # the fewest calls by which eager computes the layer
        GEMMS: lambda: torch.addmm(F.linear(x, W), F.linear(x, A), B.t(), alpha=scale),
        EAGER: lambda: eager(x),
        LINEAR: lambda: F.linear(x, W),
        MODULE: lambda: nothing(x),
    }


def triton_step(sizes: Sizes, device: torch.device) -> dict[str, Call]:
    x, weights = sizes.operands(device)
    layer = PEERS[f"{OURS}triton"].build(weights)
    call = step(layer, (weights.lora_A, weights.lora_B), x)
    with watching() as seen:
        call()

    def launch() -> None:
        for kernel in seen.launches:
            kernel()

    x_with_grad = x.detach().requires_grad_()
    return {STEP: call, LAYER: lambda: layer(x_with_grad), LAUNCHER: launch}


def plain_step(device: torch.device) -> dict[str, Call]:
    """LoRA by eager PyTorch and by PEFT where it is installed; the bare linear, trained and frozen."""
    x, weights = TINY.operands(device)
    full = nn.Linear(TINY.K, TINY.N, bias=False, dtype=TINY.dtype, device=device)
    return {
        **_steps((EAGER, PEFT), x, weights),
        FULL: step(full, (full.weight,), x),
        FROZEN: step(PEERS[FROZEN].build(weights), (), x),
    }


def native_forward() -> dict[str, Call]:
    """Without gradients, on the CPU; no LAYER where the extension is not built. To be called within ``no_grad``."""
    x, weights = NATIVE.operands(CPU)
    calls: dict[str, Call] = {LINEAR: lambda: F.linear(x, weights.weight)}
    if PEERS[_NATIVE].why_not(weights) is None:
        layer = PEERS[_NATIVE].build(weights)
        calls[LAYER] = lambda: layer(x)
    return calls


def native_step() -> dict[str, Call]:
    x, weights = NATIVE.operands(CPU)
    steps = _steps((_NATIVE, EAGER), x, weights)
    if _NATIVE in steps:
        steps[STEP] = steps.pop(_NATIVE)
    return {**steps, FROZEN: step(PEERS[FROZEN].build(weights), (), x)}


_NATIVE = f"{OURS}native"


def _steps(names: Sequence[str], x: Tensor, weights: Weights) -> dict[str, Call]:
    """Of those candidates that can run here."""
    wanted = (weights.lora_A, weights.lora_B)
    return {name: step(PEERS[name].build(weights), wanted, x) for name in names if PEERS[name].why_not(weights) is None}


def step(module: nn.Module, wanted: Sequence[Tensor], x: Tensor) -> Call:
    """Forward and backward, with gradients of x and of what is wanted."""
    x = x.detach().requires_grad_()
    dy = torch.randn_like(module(x))
    return lambda: torch.autograd.grad(module(x), (x, *wanted), dy)
