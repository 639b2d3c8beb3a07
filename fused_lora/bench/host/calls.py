"""What is timed: a call of a layer, each part of it, and what the same call costs in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import backends, functional, ops, validation
from ..baselines import EAGER, FROZEN, OURS, PEERS, Weights
from .watch import Call, watching

SEED = 0
LAYER, GEMMS, LINEAR, STEP = "layer", "three GEMMs", "F.linear", "step"
FULL, PEFT = "full", "peft"


@dataclass(frozen=True)
class Shape:
    """A layer at work, as ``bench.shapes`` has them."""

    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"M={self.M} K={self.K} N={self.N} R={self.R} {str(self.dtype).removeprefix('torch.')}"

    def weights(self, device: torch.device) -> Weights:
        generator = torch.Generator(device).manual_seed(SEED)
        return Weights.random(self.K, self.N, self.R, False, self.dtype, self.dtype, generator)

    def x(self, device: torch.device) -> Tensor:
        return torch.randn(self.M, self.K, dtype=self.dtype, device=device)


# the sizes of Triton's layers do not show in the host's time, but choose the kernel; a CPU must compute what it is
# given, so that what is plain PyTorch is as small as can be
TRITON = {
    "decode": Shape(1, 1024, 1024, 16, torch.bfloat16),
    "tile": Shape(512, 1024, 1024, 16, torch.bfloat16),
}
TINY = Shape(1, 16, 16, 4, torch.float32)
NATIVE = Shape(32, 256, 256, 16, torch.float32)


class Passing(nn.Module):
    """A module that does nothing: what ``nn.Module`` costs."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def triton_forward(shape: Shape, device: torch.device) -> dict[str, Call]:
    """A call of the layer, and what it is made of: nested, then alone. To be called within ``no_grad``."""
    from ...backends.triton import launch

    weights, x = shape.weights(device), shape.x(device)
    layer = PEERS[f"{OURS}triton"].build(weights)
    W, A, B, scale = weights.weight, weights.lora_A, weights.lora_B, weights.scale
    # the first call of its kind compiles, and shows how its kernel is launched
    with watching() as first:
        layer(x)
    operands = (x, W.t(), A.t(), B.t(), None, scale, None, 0.0, False)
    result = launch.lora_matmul(*operands)
    operator = torch.ops.fused_lora.lora_matmul.default

    def validate() -> None:
        validation.check_operands(x, W, A, B, None)
        validation.check_scale(scale)
        validation.check_dropout(0.0)
        validation.check_impl("triton")
        validation.check_dtypes(x, W, A, B, None)

    return {
        LAYER: lambda: layer(x),
        "lora_linear": lambda: functional.lora_linear(x, W, A, B, scale, impl="triton"),
        "operator": lambda: operator(*operands, "triton"),
        "backend": lambda: launch.lora_matmul(*operands),
        "JITFunction.run": first.jits[0],
        "launcher": first.launches[0],
        "allocator": lambda: (x.new_empty(result[0].shape), x.new_empty(result[1].shape)),
        "views": lambda: (W.t(), A.t(), B.t()),
        "validation": validate,
        "choice": lambda: backends.choose("triton", x.device, x.dtype),
    }


def plain_forward(device: torch.device) -> dict[str, Call]:
    """The same of plain PyTorch, to be called within ``no_grad``."""
    weights, x, module = TINY.weights(device), TINY.x(device), Passing()
    W, A, B, scale = weights.weight, weights.lora_A, weights.lora_B, weights.scale
    eager = PEERS[EAGER].build(weights)
    return {
        # the fewest calls by which eager computes the layer
        GEMMS: lambda: torch.addmm(F.linear(x, W), F.linear(x, A), B.t(), alpha=scale),
        EAGER: lambda: eager(x),
        LINEAR: lambda: F.linear(x, W),
        "nn.Module": lambda: module(x),
    }


def step(module: nn.Module, wanted: Sequence[Tensor], x: Tensor) -> Call:
    """Forward and backward, for gradients of x and of what is trained."""
    x = x.detach().requires_grad_()
    dy = torch.randn_like(module(x))
    return lambda: torch.autograd.grad(module(x), (x, *wanted), dy)


def triton_step(shape: Shape, device: torch.device) -> dict[str, Call]:
    weights, x = shape.weights(device), shape.x(device)
    layer = PEERS[f"{OURS}triton"].build(weights)
    wanted = (weights.lora_A, weights.lora_B)
    with watching() as first:
        step(layer, wanted, x)()

    def launches() -> None:
        for launch in first.launches:
            launch()

    with_grad = x.detach().requires_grad_()
    return {STEP: step(layer, wanted, x), "forward": lambda: layer(with_grad), "launchers": launches}


def plain_step(device: torch.device) -> dict[str, Call]:
    """Steps of a tiny layer: eager's, PEFT's where it is installed, that of the bare linear, frozen and trained."""
    weights, x = TINY.weights(device), TINY.x(device)
    wanted = (weights.lora_A, weights.lora_B)
    full = nn.Linear(TINY.K, TINY.N, bias=False, device=device, dtype=TINY.dtype)
    calls = {name: step(PEERS[name].build(weights), wanted, x) for name in (EAGER, PEFT) if not _missing(name, weights)}
    return {**calls, FULL: step(full, (full.weight,), x), FROZEN: step(PEERS[FROZEN].build(weights), (), x)}


def native_forward(shape: Shape) -> dict[str, Call]:
    """On the CPU, to be called within ``no_grad``; LINEAR alone where the extension is not built."""
    device = torch.device("cpu")
    weights, x = shape.weights(device), shape.x(device)
    calls: dict[str, Call] = {LINEAR: lambda: F.linear(x, weights.weight)}
    if not _missing(f"{OURS}native", weights):
        layer = PEERS[f"{OURS}native"].build(weights)
        calls[LAYER] = lambda: layer(x)
    return calls


def native_step(shape: Shape) -> dict[str, Call]:
    device = torch.device("cpu")
    weights, x = shape.weights(device), shape.x(device)
    wanted = (weights.lora_A, weights.lora_B)
    names: dict[str, str] = {STEP: f"{OURS}native", EAGER: EAGER, FROZEN: FROZEN}
    return {
        key: step(PEERS[name].build(weights), () if name == FROZEN else wanted, x)
        for key, name in names.items()
        if not _missing(name, weights)
    }


def _missing(name: str, weights: Weights) -> str | None:
    return PEERS[name].why_not(weights)
