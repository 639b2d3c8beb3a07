"""The process that measures: ``python -m fused_lora.bench.host.child [--libcuda FOLDER] --seconds S --out FILE``.

One of its own, because Triton looks for its driver once. Without --libcuda it is the driver of the GPU at hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from .. import measure
from ..baselines import EAGER
from ..results import Environment, write_json
from . import calls, stub, watch
from .parts import GEMMS, LAYER, LINEAR, STEP


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--libcuda", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    launches = None if args.libcuda is None else stub.install(args.libcuda)
    device = calls.CPU if launches is not None else torch.device("cuda")
    run = Run(device, args.seconds)
    run.everything()
    write_json(args.out, {
        "environment": dataclasses.asdict(Environment.here(device)),
        "driver": "stub" if launches is not None else "CUDA",
        "launches": None if launches is None else launches.value,
        "ratios": run.ratios(), "structure": run.structure, "rows": run.rows,
    })  # fmt: skip


class Run:
    """rows: one for each part of each group.  structure: what a call of a group does, by ``watch.structure``."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.rows, self.structure = device, list[dict[str, object]](), dict[str, dict[str, int]]()
        self._measured = dict[str, measure.Measurement]()
        if device.type == "cuda":
            # samples that do not fill the queue of launches; backward is another thread's, and its user waits for it
            self._timer, sample_ms = measure.HostTimer(before=torch.cuda.synchronize), 1.0
        else:
            # this process's own time, which others on the machine do not lengthen
            self._timer, sample_ms = measure.HostTimer(now=time.process_time), 5.0
        self._plan = measure.Plan(seconds, min_rounds=7, max_rounds=2000, sample_ms=sample_ms)

    def everything(self) -> None:
        for name, sizes in calls.TRITON.items():
            with torch.no_grad():
                parts = calls.triton_forward(sizes, self.device)
                self.structure[f"{name} forward"] = watch.structure(parts[LAYER])
                self._measure(f"{name} forward", sizes, parts | calls.plain_forward(self.device))
            parts = calls.triton_step(sizes, self.device)
            self.structure[f"{name} step"] = watch.structure(parts[STEP])
            self._measure(f"{name} step", sizes, parts | calls.plain_step(self.device))
        with torch.no_grad():
            self._measure("native forward", calls.NATIVE, calls.native_forward())
        self._measure("native step", calls.NATIVE, calls.native_step())

    def _measure(self, group: str, sizes: calls.Sizes, parts: Mapping[str, measure.Call]) -> None:
        found = self._measured[group] = measure.interleave(parts, self._timer, self._plan)
        for part, samples in found.samples.items():
            us = {name: round(1e3 * ms, 3) for name, ms in dataclasses.asdict(found.time(part)).items()}
            self.rows.append({"group": group, "sizes": str(sizes), "part": part, "rounds": len(samples), "us": us})

    def ratios(self) -> dict[str, float | None]:
        """Of a tiny layer's two kernels the one that is further behind; None where the extension is not built."""
        kernels = ("decode", "tile")
        forward = [self._ratio(f"{kernel} forward", LAYER, GEMMS) for kernel in kernels]
        step = [self._ratio(f"{kernel} step", STEP, EAGER) for kernel in kernels]
        built = LAYER in self._measured["native forward"].samples
        native = self._ratio("native forward", LAYER, LINEAR) if built else None
        return {"triton_forward": max(forward), "triton_step": max(step), "native_forward": native}

    def _ratio(self, group: str, part: str, baseline: str) -> float:
        return round(self._measured[group].ratio(part, baseline).median, 3)


if __name__ == "__main__":
    main()
