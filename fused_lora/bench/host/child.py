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
from ..shapes import FORWARD, STEP
from . import calls, parts, stub, watch


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
    settings = {
        "driver": "stub" if launches is not None else "CUDA",
        "launches": None if launches is None else launches.value,
        "counted": run.counted,
    }
    write_json(args.out, {
        "format": "fused_lora results, 1", "kind": "host", "command": "make host",
        "environment": dataclasses.asdict(Environment.here(device)), "settings": settings, "rows": run.rows,
    })  # fmt: skip


class Run:
    """rows: one for each part of each group.  counted: what a warm call of a group does, by ``watch.count``."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.rows, self.counted = list[dict[str, object]](), dict[str, dict[str, int]]()
        self._device = device
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
                made = calls.triton_forward(sizes, self._device)
                self.counted[f"{name} {FORWARD}"] = watch.count(made[parts.LAYER])
                self._measure(FORWARD, name, sizes, made | calls.plain_forward(self._device), parts.GEMMS)
            made = calls.triton_step(sizes, self._device)
            self.counted[f"{name} {STEP}"] = watch.count(made[parts.LAYER])
            self._measure(STEP, name, sizes, made | calls.plain_step(self._device), EAGER)
        with torch.no_grad():
            self._measure(FORWARD, parts.NATIVE, calls.NATIVE, calls.native_forward(), parts.LINEAR)
        self._measure(STEP, parts.NATIVE, calls.NATIVE, calls.native_step(), EAGER)

    def _measure(
        self, pass_: str, group: str, sizes: calls.Sizes, made: Mapping[str, measure.Call], baseline: str
    ) -> None:  # fmt: skip
        found = measure.interleave(made, self._timer, self._plan)
        for part, samples in found.samples.items():
            us = {name: round(1e3 * ms, 3) for name, ms in dataclasses.asdict(found.time(part)).items()}
            ratio = {name: round(r, 4) for name, r in dataclasses.asdict(found.ratio(part, baseline)).items()}
            self.rows.append({
                "pass": pass_, "shape": f"{group} {sizes}", "dtype": str(sizes.dtype).removeprefix("torch."),
                "candidate": part, "rounds": len(samples), **us, "unit": "us", "ratios": {baseline: ratio},
            })  # fmt: skip


if __name__ == "__main__":
    main()
