"""What is timed: a layer's forward, backward or step, and RichBoyNet's training step, by every candidate."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..demo.net import LAYERS, RichBoyNet, Trainer
from . import measure
from .baselines import CANDIDATES, FROZEN, Weights, our_choice
from .shapes import BACKWARD, DECODE, FORWARD, STEP, TRAIN, Shape

# calls on a CPU take turns with copies of their inputs: as many as fill this, twice a large cache, but no more than 16
ROTATED_BYTES, MOST_COPIES = 1 << 26, 16
Computed = dict[str, Tensor | None]


@dataclass(frozen=True)
class Candidate:
    """call: runs it once; gives by name what it computed, None for a gradient that did not come."""

    call: Callable[[], Computed]
    parameters: tuple[Tensor, ...]


class Workload(Protocol):
    """What candidates compete in: a pass of a shape in a dtype. dtype: as :func:`parse_dtype` reads it."""

    pass_: str
    label: str
    dtype: str
    device: torch.device
    longest_sum: int  # terms of the longest sum in it
    first: bool  # whether it comes before the others
    copies: int  # of the inputs, which calls take in turn

    @property
    def names(self) -> tuple[str, ...]:
        """The candidates that may compete."""

    def adapted(self, name: str) -> bool:
        """Whether the candidate has an adapter, so that its results are LoRA's."""

    def ours(self) -> str:
        """The candidate of ours that standings are about: ``baselines.our_choice``."""

    def why_not(self, name: str) -> str | None:
        """Why this candidate can't compute it, or None."""

    def candidate(self, name: str) -> Candidate: ...

    def exact(self) -> Workload:
        """The same in float64."""

    def useful(self, name: str) -> tuple[int, int] | None:
        """Floating-point operations and bytes that the candidate's formula asks for, where that is defined."""


def parse_dtype(label: str) -> tuple[torch.dtype, torch.dtype]:
    """ "bfloat16" is the dtype of everything; "bfloat16+float32" that of the base, then that of the adapters."""
    base, _, adapter = label.partition("+")
    return getattr(torch, base), getattr(torch, adapter or base)


def copies_of(device: torch.device, nbytes: int) -> int:
    """How many copies of inputs of so many bytes. One on a GPU, whose cache is flushed before every call."""
    return 1 if device.type == "cuda" else min(max(-(-ROTATED_BYTES // nbytes), 1), MOST_COPIES)


def _taken(leaves: dict[str, Tensor]) -> Computed:
    """The leaves' gradients, which are taken off them."""
    gradients = {key: leaf.grad for key, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None
    return gradients


class LayerWorkload:
    """A layer over x (M, K) whose result's gradient is dy (M, N)."""

    def __init__(self, pass_: str, shape: Shape, dtype: str, device: torch.device) -> None:
        self.pass_, self.shape, self.dtype, self.device = pass_, shape, dtype, device
        self.label, self.longest_sum = str(shape), max(shape.M, shape.K, shape.N)
        self.first = "first" in shape.tags
        base, adapter = parse_dtype(dtype)
        generator = torch.Generator(device).manual_seed(0)
        self.weights = Weights.random(shape.K, shape.N, shape.R, shape.bias, base, adapter, generator)
        x = torch.randn(shape.M, shape.K, generator=generator, device=device).to(base)
        dy = (torch.randn(shape.M, shape.N, generator=generator, device=device) * shape.N**-0.5).to(base)
        self.copies = copies_of(device, x.nbytes + dy.nbytes)
        self.inputs = [(x.clone().requires_grad_(), dy.clone()) for _ in range(self.copies)]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(CANDIDATES)

    def adapted(self, name: str) -> bool:
        return name != FROZEN

    def ours(self) -> str:
        return our_choice(self.weights)

    def why_not(self, name: str) -> str | None:
        return CANDIDATES[name].why_not(self.weights)

    def candidate(self, name: str) -> Candidate:
        return self._of_module(CANDIDATES[name].build(self.weights), trained=name != FROZEN)

    def _of_module(self, module: nn.Module, trained: bool) -> Candidate:
        adapter = {"dA": self.weights.lora_A, "dB": self.weights.lora_B} if trained else {}
        inputs = itertools.cycle(self.inputs)

        @torch.no_grad()
        def forward() -> Computed:
            x, _ = next(inputs)
            return {"y": module(x)}

        def backward(x: Tensor, dy: Tensor, y: Tensor) -> Computed:
            y.backward(dy)
            return _taken({"dx": x, **adapter})

        def step() -> Computed:
            x, dy = next(inputs)
            y = module(x)
            return {"y": y.detach(), **backward(x, dy, y)}

        def ready() -> Callable[[], Computed]:
            x, dy = next(inputs)
            return partial(backward, x, dy, module(x))

        ways = {FORWARD: forward, DECODE: forward, STEP: step, BACKWARD: measure.Staged(ready)}
        return Candidate(cast(Callable[[], Computed], ways[self.pass_]), self.weights.parameters)

    def exact(self) -> LayerWorkload:
        exact = copy.copy(self)
        exact.dtype = "float64"
        exact.weights = self.weights.in_float64()
        x, dy = self.inputs[0]
        exact.inputs = [(x.detach().double().requires_grad_(), dy.double())]
        return exact

    def useful(self, name: str) -> tuple[int, int] | None:
        lora = name != FROZEN
        moved = self.shape.bytes(self.pass_, self.weights.weight.itemsize, lora)
        return self.shape.flops(self.pass_, lora), moved


class NetWorkload:
    """RichBoyNet, batch 10, rank 1: forward, cross entropy, backward, and Adam on A and B alone."""

    pass_ = TRAIN
    label = "RichBoyNet (M=10, 784→1000→2000→10, R=1)"
    first = False

    def __init__(self, dtype: str, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        base, adapter = parse_dtype(dtype)
        generator = torch.Generator(device).manual_seed(0)
        with torch.device("meta"):
            net = RichBoyNet()
        sizes = [getattr(net, path).weight.shape for path in LAYERS]
        self.longest_sum = max(map(max, sizes))
        self.weights = [Weights.random(K, N, 1, True, base, adapter, generator) for N, K in sizes]
        images = torch.randn(10, sizes[0][1], generator=generator, device=device).to(base)
        self.copies = copies_of(device, images.nbytes)
        self.images = [images.clone() for _ in range(self.copies)]
        self.labels = torch.arange(10, device=device)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(CANDIDATES)

    def adapted(self, name: str) -> bool:
        return name != FROZEN

    def ours(self) -> str:
        return our_choice(self.weights[0])

    def why_not(self, name: str) -> str | None:
        return CANDIDATES[name].why_not(self.weights[0])

    def candidate(self, name: str) -> Candidate:
        weights = [layer.with_own_adapter() for layer in self.weights]
        with torch.device("meta"):
            net = RichBoyNet()
        for path, layer in zip(LAYERS, weights, strict=True):
            setattr(net, path, CANDIDATES[name].build(layer))
        parameters = tuple(parameter for layer in weights for parameter in layer.parameters)
        if name == FROZEN:
            return self._frozen(net, parameters)
        leaves = {f"{path}.d{side}": getattr(layer, f"lora_{side}")
                  for path, layer in zip(LAYERS, weights, strict=True) for side in "AB"}  # fmt: skip
        trainer = Trainer(net, leaves.values())
        # the same arithmetic, and every step is the same step
        trainer.optimizer.param_groups[0]["lr"] = 0.0
        images = itertools.cycle(self.images)

        def step() -> Computed:
            trainer.step(next(images), self.labels)
            return _taken(leaves)

        return Candidate(step, parameters)

    def _frozen(self, net: RichBoyNet, parameters: tuple[nn.Parameter, ...]) -> Candidate:
        """The frozen network's own step: forward, cross entropy, and the gradient down to the first layer's result."""
        hidden: list[Tensor] = []

        def keep(module: nn.Module, args: object, output: Tensor) -> None:
            hidden[:] = [output.requires_grad_()]

        net.linear1.register_forward_hook(keep)
        images = itertools.cycle(self.images)

        def step() -> Computed:
            F.cross_entropy(net(next(images)), self.labels).backward()
            return {"dhidden": hidden.pop().grad}

        return Candidate(step, parameters)

    def exact(self) -> NetWorkload:
        exact = copy.copy(self)
        exact.dtype = "float64"
        exact.weights = [layer.in_float64() for layer in self.weights]
        exact.images = [self.images[0].double()]
        return exact

    def useful(self, name: str) -> tuple[int, int] | None:
        return None
