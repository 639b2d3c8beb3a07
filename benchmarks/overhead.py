"""What Python costs a call, and what torch.compile does to a step. On the CPU; candidates take turns.

python benchmarks/overhead.py [--out FILE]      default: benchmarks/results/overhead/<device>-<date>.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from encoder import Encoder
from torch import nn

from fused_lora import FusedLoRALinear, apply_lora
from fused_lora.bench import measure
from fused_lora.bench.results import Environment, ResultsFile, Row, default_path
from fused_lora.bench.shapes import FORWARD, STEP
from fused_lora.demo.net import RichBoyNet

PLAN = measure.Plan(seconds=6.0, min_rounds=15, max_rounds=200, sample_ms=20.0)
Calls = dict[str, Callable[[], object]]


def forward_calls() -> Calls:
    """One token of 16 features, without gradients: nothing but overhead."""
    linear, layer, x = nn.Linear(16, 16), FusedLoRALinear(16, 16, rank=4), torch.randn(1, 16)

    def call(module: nn.Module) -> Callable[[], object]:
        return torch.no_grad()(lambda: module(x))

    return {"linear": call(linear), "ours": call(layer)}


def step_calls(module: nn.Module, x: torch.Tensor, prefix: str = "") -> Calls:
    """Forward and backward, eager and compiled, of the same parameters."""
    # what was compiled before would have its guards tried first
    torch._dynamo.reset()
    # a gradient as a network gives it: that of a sum is one number, expanded, and 16-bit products of it are slow
    dy = torch.randn_like(module(x))

    def call(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        def step() -> None:
            function(x).backward(dy)
            module.zero_grad(set_to_none=True)
            x.grad = None

        return step

    return {f"{prefix}eager": call(module), f"{prefix}compiled": call(torch.compile(module, fullgraph=True))}


# candidate -> the one that it is divided by; "frozen" is the base alone, without adapters
BASES = {"ours": "linear", "compiled": "eager", "frozen compiled": "frozen eager"}


def layer(size: int, rank: int, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> FusedLoRALinear:
    made = FusedLoRALinear(size, size, rank=rank, dtype=dtype, dropout=dropout)
    nn.init.normal_(made.lora_B)
    return made


def workloads() -> Iterator[tuple[str, str, str, Calls]]:
    """Pass, shape, dtype and candidates."""
    torch.manual_seed(0)
    single = "float32"
    yield FORWARD, "1×16×16, rank 4", single, forward_calls()
    half = torch.bfloat16
    for tokens, size, rank, dtype in (
        (10, 64, 4, torch.float32),
        (512, 2048, 16, torch.float32),
        (512, 2048, 16, half),
    ):
        name, title = str(dtype).removeprefix("torch."), f"{tokens}×{size}×{size}, rank {rank}"
        x = torch.randn(tokens, size, dtype=dtype).requires_grad_()
        yield STEP, title, name, step_calls(layer(size, rank, dtype), x)
        yield STEP, title, name, step_calls(nn.Linear(size, size, dtype=dtype).requires_grad_(False), x, "frozen ")
        if tokens > 10 and dtype != half:
            yield STEP, f"{title}, dropout 0.1", name, step_calls(layer(size, rank, dtype, dropout=0.1), x)
    for batch in (10, 512):
        title, x = f"RichBoyNet, batch {batch}, rank 1", torch.randn(batch, 784).requires_grad_()
        yield STEP, title, single, step_calls(apply_lora(RichBoyNet(), rank=1), x)
        yield STEP, title, single, step_calls(RichBoyNet().requires_grad_(False), x, "frozen ")
    title, x = "BERT of MiniLM's sizes, 8×64 tokens, rank 8", torch.randn(8, 64, 384).requires_grad_()
    yield STEP, title, single, step_calls(apply_lora(Encoder(), rank=8), x)
    yield STEP, title, single, step_calls(Encoder().requires_grad_(False), x, "frozen ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    environment = Environment.here(torch.device("cpu"))
    parser.add_argument("--out", type=Path, default=default_path("overhead", environment), metavar="FILE")
    out = parser.parse_args().out
    file = ResultsFile("overhead", "python benchmarks/overhead.py", environment)
    for pass_, shape, dtype, calls in workloads():
        measured = measure.interleave(calls, measure.HostTimer(), PLAN)
        for name in calls:
            base = BASES.get(name, name)
            us = {key: round(1e3 * value, 3) for key, value in vars(measured.time(name)).items()}
            ratio = measured.ratio(name, base)
            row = Row(pass_, shape, dtype, name, len(measured.samples[name]), **us, unit="us", ratios={base: ratio})
            file.rows.append(row)
            print(f"{pass_:8} {shape:44} {name:15} {row.median:12.2f} µs  ×{ratio.median:.3f}", flush=True)
    file.save(out)
    print(f"saved: {out}")


if __name__ == "__main__":
    main()
