"""``make scaling``: how a layer's step grows with M, K, N, R, and with the number of adapters that are loaded.

    python -m tools.scaling [--device cpu|cuda] [--seconds N] [--out FILE]

One size at a time, the others at the middle's; a results file like any other, in benchmarks/results/scaling/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from fused_lora.bench import measure, series
from fused_lora.bench.baselines import EAGER, FROZEN, OURS_PREFIX, PEFT
from fused_lora.bench.results import Environment, ResultsFile, default_path
from fused_lora.bench.shapes import STEP, Shape
from fused_lora.bench.workloads import Candidate, LayerWorkload

ADAPTERS = "adapters"
AXES = ("M", "K", "N", "R", ADAPTERS)
# ours by default, and the baselines that run everywhere
WANTED = (FROZEN, "addmm", EAGER, PEFT)


@dataclass(frozen=True)
class Sweep:
    """middle: what the sizes are that do not vary.  values: axis -> its sizes, ascending."""

    middle: Shape
    values: dict[str, tuple[int, ...]]
    dtype: str


SWEEPS = {
    "cpu": Sweep(
        Shape("middle", 256, 1024, 1024, 16, ()),
        {
            "M": (1, 16, 64, 256, 1024),
            "K": (256, 1024, 4096),
            "N": (256, 1024, 4096),
            "R": (1, 4, 16, 64, 256),
            ADAPTERS: (1, 8, 64),
        },
        "float32",
    ),
    "cuda": Sweep(
        Shape("middle", 4096, 4096, 4096, 16, ()),
        {
            "M": (1, 16, 64, 256, 1024, 4096, 16384),
            "K": (1024, 2048, 4096, 8192, 16384),
            "N": (1024, 2048, 4096, 8192, 16384),
            "R": (1, 4, 16, 32, 64, 128, 256),
            ADAPTERS: (1, 8, 64),
        },
        "bfloat16",
    ),
}


class ScalingWorkload(LayerWorkload):
    """A layer's step at one place of a sweep. label: "axis=value (M=… K=… N=… R=…)"."""

    def __init__(self, axis: str, value: int, sweep: Sweep, device: torch.device) -> None:
        sizes = {size: getattr(sweep.middle, size) for size in ("M", "K", "N", "R")} | {axis: value}
        shape = Shape(f"{axis}={value}", sizes["M"], sizes["K"], sizes["N"], sizes["R"], ())
        super().__init__(STEP, shape, sweep.dtype, device)
        self.loaded = value if axis == ADAPTERS else 1

    @property
    def names(self) -> tuple[str, ...]:
        return *WANTED, self.ours()

    def candidate(self, name: str) -> Candidate:
        return (
            super().candidate(name)
            if self.loaded == 1 or not name.startswith(OURS_PREFIX)
            else self._among_others(name)
        )

    def _among_others(self, name: str) -> Candidate:
        """Ours with other adapters of the same rank loaded beside the active one."""
        from fused_lora.layer import FusedLoRALinear

        w = self.weights
        layer = FusedLoRALinear.from_linear(
            w.linear(), rank=w.rank, alpha=w.scale * w.rank, impl=name[len(OURS_PREFIX) :]
        )
        for other in range(1, self.loaded):
            layer.add_adapter(f"other_{other}", rank=w.rank)
        adapter = layer.adapters["default"]
        adapter.lora_A, adapter.lora_B = w.lora_A, w.lora_B
        return self._of_module(layer, trained=True)


def agenda(sweep: Sweep, device: torch.device) -> list[partial[ScalingWorkload]]:
    return [partial(ScalingWorkload, axis, value, sweep, device) for axis in AXES for value in sweep.values[axis]]


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every candidate was right, 1 when one was not, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="make scaling", description="How a layer's step grows with its sizes.")
    parser.add_argument("--device", choices=tuple(SWEEPS), help="default: cuda where there is one")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each group; default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: benchmarks/results/scaling/ of the checkout")
    args = parser.parse_args(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    environment = Environment.here(device)
    path = args.out or default_path("scaling", environment)
    file = ResultsFile.open(path, "scaling", "make scaling", environment)
    plan = replace(measure.plan_for(device, quick=False), seconds=args.seconds, min_rounds=7)
    return series.compete(list(agenda(SWEEPS[device.type], device)), file, path, plan)


if __name__ == "__main__":
    sys.exit(main())
