"""The process that measures: ``python -m fused_lora.bench.host.child [--libcuda FOLDER] --seconds S --out FILE``.

A process of its own, because Triton must find its driver before it is imported. Without --libcuda: on the GPU at hand.
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--libcuda", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    launches = None if args.libcuda is None else stub.install(args.libcuda)
    device = torch.device("cpu" if launches is not None else "cuda")
    run = Run(device, args.seconds)
    run.everything()
    write_json(args.out, {
        "environment": dataclasses.asdict(Environment.here(device)),
        "driver": "the GPU's" if launches is None else "stub",
        "launches": None if launches is None else launches.value,
        "ratios": run.ratios(), "structure": run.structure, "rows": run.rows,
    })  # fmt: skip


class Run:
    """rows: a part of a group each.  structure: what a warm call of a group does."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.rows, self.structure = device, list[dict[str, object]](), dict[str, dict[str, int]]()
        on_gpu = device.type == "cuda"
        # long enough for caches to be warm; on a GPU short enough that no queue of launches fills
        self._plan = measure.Plan(seconds, min_rounds=7, max_rounds=2000, sample_ms=1.0 if on_gpu else 5.0)
        # a processor's own time, which others on the machine do not lengthen; a GPU's backward waits for a thread, and
        # its user does
        self._timer = (
            measure.HostTimer(before=torch.cuda.synchronize) if on_gpu else measure.HostTimer(now=time.process_time)
        )
        self._measured: dict[str, measure.Measurement] = {}

    def everything(self) -> None:
        for name, shape in calls.TRITON.items():
            with torch.no_grad():
                forward = calls.triton_forward(shape, self.device)
                self.structure[f"{name} forward"] = watch.structure(forward[calls.LAYER])
                self._measure(f"{name} forward", shape, forward | calls.plain_forward(self.device))
            step = calls.triton_step(shape, self.device)
            self.structure[f"{name} step"] = watch.structure(step[calls.STEP])
            self._measure(f"{name} step", shape, step | calls.plain_step(self.device))
        with torch.no_grad():
            self._measure("native forward", calls.NATIVE, calls.native_forward(calls.NATIVE))
        self._measure("native step", calls.NATIVE, calls.native_step(calls.NATIVE))

    def _measure(self, group: str, shape: calls.Shape, parts: Mapping[str, measure.Call]) -> None:
        found = self._measured[group] = measure.interleave(parts, self._timer, self._plan)
        for part in parts:
            spread = dataclasses.asdict(found.time(part))
            us = {name: round(1e3 * ms, 3) for name, ms in spread.items()}
            self.rows.append({
                "group": group, "shape": str(shape), "part": part, "rounds": len(found.samples[part]), "us": us,
            })  # fmt: skip

    def ratios(self) -> dict[str, float | None]:
        """Of two kernels the dearer; None where the extension is not built."""
        forward = [self._ratio(f"{name} forward", calls.LAYER, calls.GEMMS) for name in calls.TRITON]
        step = [self._ratio(f"{name} step", calls.STEP, EAGER) for name in calls.TRITON]
        native = None
        if calls.LAYER in self._measured["native forward"].samples:
            native = self._ratio("native forward", calls.LAYER, calls.LINEAR)
        return {"triton_forward": max(forward), "triton_step": max(step), "native_forward": native}

    def _ratio(self, group: str, part: str, baseline: str) -> float:
        return round(self._measured[group].ratio(part, baseline).median, 3)


if __name__ == "__main__":
    main()
