"""What Python costs a call, and what torch.compile does to a step. On the CPU; candidates take turns.

python benchmarks/overhead.py [--out FILE]      default: benchmarks/results/torch/overhead-<device>-<date>.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from fused_lora import FusedLoRALinear, apply_lora
from fused_lora.bench import measure
from fused_lora.bench.results import Environment
from fused_lora.demo.net import RichBoyNet

PLAN = measure.Plan(seconds=8.0, min_rounds=15, max_rounds=200, sample_ms=20.0)
Calls = dict[str, Callable[[], object]]


def forward_calls() -> Calls:
    """One token of 16 features, without gradients: nothing but overhead."""
    linear, layer, x = nn.Linear(16, 16), FusedLoRALinear(16, 16, rank=4), torch.randn(1, 16)

    def call(module: nn.Module) -> Callable[[], object]:
        return torch.no_grad()(lambda: module(x))

    return {"linear": call(linear), "ours": call(layer)}


def step_calls(module: nn.Module, x: torch.Tensor) -> Calls:
    """Forward and backward, eager and compiled, of the same parameters."""
    compiled = torch.compile(module, fullgraph=True)

    def call(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        def step() -> None:
            function(x).sum().backward()
            module.zero_grad(set_to_none=True)
            x.grad = None

        return step

    return {"eager": call(module), "compiled": call(compiled)}


def layer(size: int, rank: int, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> FusedLoRALinear:
    made = FusedLoRALinear(size, size, rank=rank, dtype=dtype, dropout=dropout)
    nn.init.normal_(made.lora_B)
    return made


def problems() -> dict[str, tuple[Calls, str]]:
    """Title -> (candidates, the one that the others are divided by)."""
    torch.manual_seed(0)

    def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    half = torch.bfloat16
    return {
        "call, 1×16×16, rank 4, no grad": (forward_calls(), "linear"),
        "step, 10×64×64, rank 4, float32": (step_calls(layer(64, 4), x(10, 64)), "eager"),
        "step, 512×2048×2048, rank 16, float32": (step_calls(layer(2048, 16), x(512, 2048)), "eager"),
        "step, 512×2048×2048, rank 16, bfloat16": (
            step_calls(layer(2048, 16, half), x(512, 2048, dtype=half)), "eager",
        ),
        "step, 512×2048×2048, rank 16, float32, dropout 0.1": (
            step_calls(layer(2048, 16, dropout=0.1), x(512, 2048)), "eager",
        ),
        "step, RichBoyNet, batch 10, rank 1": (step_calls(apply_lora(RichBoyNet(), rank=1), x(10, 784)), "eager"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    environment = Environment.here(torch.device("cpu"))
    default = Path(__file__).parent / "results" / "torch" / f"overhead-{environment.slug}-{environment.date}.json"
    parser.add_argument("--out", type=Path, default=default, metavar="FILE")
    out = parser.parse_args().out
    rows = []
    for title, (calls, base) in problems().items():
        measured = measure.interleave(calls, measure.HostTimer(), PLAN)
        for name in calls:
            time, ratio = measured.time(name), measured.ratio(name, base)
            microseconds = {key: round(1e3 * value, 3) for key, value in dataclasses.asdict(time).items()}
            rows.append({
                "problem": title, "candidate": name, "rounds": len(measured.samples[name]), "us": microseconds,
                "divided_by": base, "ratio": {key: round(v, 4) for key, v in dataclasses.asdict(ratio).items()},
            })  # fmt: skip
            print(f"{title:52} {name:9} {microseconds['median']:12.2f} µs  ×{ratio.median:.3f}", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"environment": dataclasses.asdict(environment), "rows": rows}, indent=1) + "\n")
    print(f"saved: {out}")


if __name__ == "__main__":
    main()
