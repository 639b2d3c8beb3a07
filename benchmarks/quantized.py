"""A training step over a quantized base: PEFT's layers over bitsandbytes, the same fused, and ours. On the CPU.

python benchmarks/quantized.py [--seconds S] [--out FILE]
default: benchmarks/results/quantized/<device>-<date>.json

Candidates take turns; each is compared with PEFT's before it is timed. Memory is what a step takes above the model.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from encoder import Encoder
from peft import LoraConfig, get_peft_model
from torch import nn

from fused_lora import apply_lora, quantize_base
from fused_lora.bench import measure
from fused_lora.bench.results import Environment, ResultsFile, Row, default_path
from fused_lora.bench.shapes import FORWARD, STEP
from fused_lora.integrations.peft import fuse

CPU = torch.device("cpu")
KINDS = ("nf4", "int8")


class Layer(nn.Module):
    """One linear layer of 2048 features."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2048, 2048)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


# title -> what makes the model, the size of its input, its rank
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "512×2048×2048, rank 16": (Layer, (512, 2048), 16),
    "BERT of MiniLM's sizes, 8×64 tokens, rank 8": (Encoder, (8, 64, 384), 8),
}


def candidates(make: Callable[[], nn.Module], rank: int, kind: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The same weights and adapters in each: float32 adapters, as QLoRA has them."""
    torch.manual_seed(0)
    base = quantize_base(make().to(dtype), kind)
    targets = [path for path, module in base.named_modules() if isinstance(module, nn.Linear)]
    ours = apply_lora(copy.deepcopy(base), rank=rank)
    base.is_loaded_in_4bit = base.is_loaded_in_8bit = True
    peft = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    for name, parameter in ours.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.02)
            path, _, side = name.rpartition(".adapters.default.")
            pefts = peft.get_submodule(f"base_model.model.{path}.{side}.default").weight
            pefts.data.copy_(parameter.data)
    return {"peft": peft, "peft fused": fuse(copy.deepcopy(peft)), "ours": ours}


def step_of(model: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], object]:
    def step() -> None:
        model(x).backward(dy)
        model.zero_grad(set_to_none=True)
        x.grad = None

    return step


def forward_of(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    return torch.no_grad()(lambda: model(x))


def workloads() -> Iterator[tuple[str, str, str, dict[str, Callable[[], object]]]]:
    """Pass, shape, dtype and calls."""
    for title, (make, size, rank) in MODELS.items():
        for kind in KINDS:
            for dtype in (torch.float32, torch.bfloat16):
                models = candidates(make, rank, kind, dtype)
                x = torch.randn(size).to(dtype).requires_grad_()
                expected = models["peft"](x)
                dy = torch.randn_like(expected)
                for name, model in models.items():
                    torch.testing.assert_close(model(x), expected, rtol=5e-2, atol=5e-2, msg=name)
                told = str(dtype).removeprefix("torch.")
                yield STEP, title, f"{kind}, {told}", {name: step_of(m, x, dy) for name, m in models.items()}
                if make is Layer and kind == "nf4":
                    # without the product of its own that bitsandbytes has in evaluation on some CPUs
                    row = x.detach()[:1]
                    calls = {name: forward_of(m.train(), row) for name, m in models.items()}
                    yield FORWARD, "1×2048×2048, rank 16", f"{kind}, {told}", calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    environment = Environment.here(CPU)
    parser.add_argument("--out", type=Path, default=default_path("quantized", environment), metavar="FILE")
    parser.add_argument("--seconds", type=float, default=8.0, help="for a measurement")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    plan = measure.Plan(seconds=options.seconds, min_rounds=9, max_rounds=200, sample_ms=20.0)
    file = ResultsFile("quantized", "python benchmarks/quantized.py", environment)
    for pass_, shape, dtype, calls in workloads():
        measured = measure.interleave(calls, measure.HostTimer(), plan)
        for name, call in calls.items():
            ms = {key: round(value, 4) for key, value in vars(measured.time(name)).items()}
            ratio = measured.ratio(name, "peft")
            peak = measure.peak_bytes(call, CPU)
            rounds = len(measured.samples[name])
            file.rows.append(Row(pass_, shape, dtype, name, rounds, **ms, ratios={"peft": ratio}, peak_bytes=peak))
            told = f"{ms['median']:9.2f} ms  ×{ratio.median:.3f}  {peak / 1e6:8.2f} MB"
            print(f"{pass_:8} {shape:44} {dtype:15} {name:11} {told}", flush=True)
    file.save(options.out)
    print(f"saved: {options.out}")


if __name__ == "__main__":
    main()
