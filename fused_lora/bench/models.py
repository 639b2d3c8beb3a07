"""``make models``: a training step of whole models, ours, PEFT's, eager, fine-tuned in full, and frozen.

    python -m fused_lora.bench.models [--device cpu|cuda] [--threads N] [--seconds N] [--out FILE]

Models of real sizes with random weights; a step is forward, backward and fused Adam on what is trained. A results file
like any other, in benchmarks/results/models/.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..demo.net import RichBoyNet
from . import measure, series
from .peers import EAGER, FROZEN, FULL, PEERS, Weights, our_choice
from .problems import Candidate, parse_dtype
from .results import Environment, Results, default_path

MODEL = "model"
WANTED = (FROZEN, FULL, EAGER, "peft")


class Block(nn.Module):
    """A Llama block: grouped-query attention and a gated MLP, each on a normed input, each added to it."""

    def __init__(self, width: int, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, head = heads, kv_heads, width // heads
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(width, kv_heads * head, bias=False) for _ in range(2))
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm_1(x)
        q = split_heads(self.q_proj(normed), self.heads)
        k, v = (split_heads(project(normed), self.kv_heads) for project in (self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        normed = self.norm_2(x)
        return x + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, tokens, heads · size) as (batch, heads, tokens, size)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


@dataclass(frozen=True)
class Case:
    """make: the model, on the meta device or not.  shape: of its input."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rank: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.name} (input {'×'.join(map(str, self.shape))}, R={self.rank})"


def _minilm() -> nn.Module:
    """The encoder of all-MiniLM-L6-v2's sizes: six layers of PyTorch's own."""
    layer = _EncoderLayer(384, 1536, 12)
    return nn.Sequential(*(copy.deepcopy(layer) for _ in range(6)))


class _EncoderLayer(nn.Module):
    """BERT's layer: attention and MLP, each added to its input and normed."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(project(x), self.heads) for project in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm_1(x + self.output(mixed))
        return self.norm_2(x + self.down(F.gelu(self.up(x))))


_LLAMA_1B, _LLAMA_8B = partial(Block, 2048, 8192, 32, 8), partial(Block, 4096, 14336, 32, 8)
CASES = {
    "cpu": (
        Case("RichBoyNet", RichBoyNet, (10, 784), 1, "float32"),
        Case("MiniLM", _minilm, (8, 64, 384), 8, "float32"),
        Case("Llama-1B-block", _LLAMA_1B, (1, 128, 2048), 16, "bfloat16+float32"),
        Case("Llama-8B-block", _LLAMA_8B, (1, 64, 4096), 16, "bfloat16+float32"),
    ),
    "cuda": (
        Case("MiniLM", _minilm, (64, 256, 384), 8, "bfloat16+float32"),
        Case("Llama-1B-block", _LLAMA_1B, (4, 2048, 2048), 16, "bfloat16+float32"),
        Case("Llama-8B-block", _LLAMA_8B, (4, 2048, 4096), 16, "bfloat16+float32"),
        Case("Llama-8B-block-same-dtype", _LLAMA_8B, (4, 2048, 4096), 16, "bfloat16"),
    ),
}


class ModelProblem:
    """A training step of a whole model with LoRA in all its linear layers: forward, backward, fused Adam.

    Adam's learning rate is zero: the same arithmetic, and every step is the same step. The input asks for its gradient,
    as it would inside a deeper model.
    """

    work = MODEL
    first = False

    def __init__(self, case: Case, device: torch.device) -> None:
        self.label, self.dtype, self.device, self.case = str(case), case.dtype, device, case
        base, adapter = parse_dtype(case.dtype)
        generator = torch.Generator(device).manual_seed(0)
        with torch.device("meta"):
            net = case.make()
        self.linears = {name: module for name, module in net.named_modules() if isinstance(module, nn.Linear)}
        self.longest_sum = max(max(linear.weight.shape) for linear in self.linears.values()) * len(self.linears)
        self.weights = {
            name: Weights.random(
                linear.in_features, linear.out_features, case.rank, linear.bias is not None, base, adapter, generator
            )
            for name, linear in self.linears.items()
        }
        self.net, self.other_dtype = net, base
        self.x = torch.randn(case.shape, generator=generator, device=device).to(base).requires_grad_()
        shape = self._build(FROZEN)[0](self.x).shape
        self.dy = (torch.randn(shape, generator=generator, device=device) * shape[-1] ** -0.5).to(base)

    def ours(self) -> str:
        return our_choice(next(iter(self.weights.values())))

    def why_not(self, name: str) -> str | None:
        if name not in (*WANTED, self.ours()):
            return "left out of whole models, to keep the run short"
        return None if name == FULL else PEERS[name].why_not(next(iter(self.weights.values())))

    def _build(self, name: str) -> tuple[nn.Module, dict[str, Weights]]:
        """The model whose linear layers this peer computes, with adapters of its own; norms are fresh, and frozen."""
        net = copy.deepcopy(self.net).to_empty(device=self.device).to(self.other_dtype)
        for module in net.modules():
            if isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
                module.reset_parameters()
        net.requires_grad_(False)
        own = {path: weights.with_own_adapter() for path, weights in self.weights.items()}
        for path, weights in own.items():
            net.set_submodule(path, PEERS[name].build(weights))
        return net, own

    def candidate(self, name: str) -> Candidate:
        net, own = self._build(name)
        leaves: dict[str, Tensor] = {"dx": self.x}
        trained: list[nn.Parameter] = []
        if name == FULL:
            trained = [parameter for path in own for parameter in net.get_submodule(path).parameters()]
        elif name != FROZEN:
            sides = {f"{path}.d{side}": getattr(w, f"lora_{side}") for path, w in own.items() for side in "AB"}
            leaves |= sides
            trained = list(sides.values())
        optimizer: Any = torch.optim.Adam(trained, lr=0.0, fused=True) if trained else None

        def step() -> dict[str, Tensor | None]:
            y = net(self.x)
            y.backward(self.dy)
            results = {"y": y.detach()} | {key: leaf.grad for key, leaf in leaves.items()}
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            for leaf in leaves.values():
                leaf.grad = None
            return results

        parameters = (*net.parameters(), *(p for w in own.values() for p in w.parameters))
        return Candidate(step, parameters)

    def exact(self) -> ModelProblem:
        exact = copy.copy(self)
        exact.dtype, exact.other_dtype = "float64", torch.float64
        exact.weights = {path: weights.in_float64() for path, weights in self.weights.items()}
        exact.x, exact.dy = self.x.detach().double().requires_grad_(), self.dy.double()
        return exact

    def useful(self, name: str) -> tuple[int, int] | None:
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every candidate was right, 1 when one was not, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="make models", description="A training step of whole models.")
    parser.add_argument("--device", choices=tuple(CASES), help="default: cuda where there is one")
    parser.add_argument("--threads", type=int, metavar="N", help="PyTorch's on the CPU; 1 for a machine that is busy")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each model; default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: benchmarks/results/models/ of the checkout")
    args = parser.parse_args(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    environment = Environment.here(device)
    standard = default_path(environment)
    path = args.out or (None if standard is None else standard.parent / "models" / standard.name)
    plan = replace(measure.plan_for(device, quick=False), seconds=args.seconds, min_rounds=5)
    agenda = [partial(ModelProblem, case, device) for case in CASES[device.type]]
    return series.compete(list(agenda), Results.open(path, environment), path, plan)


if __name__ == "__main__":
    sys.exit(main())
