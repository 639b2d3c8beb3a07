"""The compiled extension beside plain PyTorch, PEFT and the frozen linear, on a CPU; candidates take turns.

python benchmarks/native.py [--repeats N] [--threads N] [--seconds S] [--out FILE]
default: benchmarks/results/native/<device>-<date>.json
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fused_lora.backends import native
from fused_lora.bench import measure
from fused_lora.bench.baselines import FROZEN, PEFT
from fused_lora.bench.check import Judge
from fused_lora.bench.results import Environment, ResultsFile, Row, default_path
from fused_lora.bench.shapes import FORWARD, SHAPES, STEP
from fused_lora.bench.workloads import LayerWorkload, NetWorkload, Workload

CPU = torch.device("cpu")
CANDIDATES = (FROZEN, "ours-native", "ours-eager", PEFT)


def workloads() -> Iterator[Workload]:
    shapes = {shape.name: shape for shape in SHAPES}
    yield NetWorkload("float32", CPU)
    for dtype in ("float32", "bfloat16", "bfloat16+float32"):
        yield LayerWorkload(FORWARD, shapes["decode-2048-m1"], dtype, CPU)
    for name in ("decode-4096-m4", "decode-4096-m16"):
        for dtype in ("float32", "bfloat16"):
            yield LayerWorkload(FORWARD, shapes[name], dtype, CPU)
    yield LayerWorkload(FORWARD, shapes["richboynet-3"], "float32", CPU)
    for dtype in ("float32", "bfloat16", "bfloat16+float32"):
        yield LayerWorkload(STEP, shapes["square-2048"], dtype, CPU)


def checked(workload: Workload) -> dict[str, Callable[[], object]]:
    """The candidates' calls, each right."""
    judge, calls = Judge(workload), {}
    for name in CANDIDATES:
        candidate = workload.candidate(name)
        verdict = judge.verdict(name, candidate)
        if verdict is not None:
            raise SystemExit(f"{workload.label}, {name}: {verdict}")
        calls[name] = candidate.call
    return calls


def main() -> None:
    if not native.available():
        raise SystemExit(native.why_not())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    environment = Environment.here(CPU)
    parser.add_argument("--out", type=Path, default=default_path("native", environment), metavar="FILE")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of everything, one after the other")
    parser.add_argument("--seconds", type=float, default=4.0, help="for a measurement of a workload")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="one says most on a busy machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    environment = dataclasses.replace(environment, threads=args.threads)
    plan = measure.Plan(args.seconds, min_rounds=21, max_rounds=300, sample_ms=2.0)
    file = ResultsFile("native", "python benchmarks/native.py", environment)
    for workload in workloads():
        calls, rows = checked(workload), list[Row]()
        for repeat in range(args.repeats):
            found = measure.interleave(calls, measure.HostTimer(), plan)
            for name in calls:
                ratios = {base: found.ratio(name, base) for base in (FROZEN, PEFT)}
                rows.append(Row(
                    workload.pass_, workload.label, workload.dtype, name, len(found.samples[name]),
                    **vars(found.time(name)), repeat=repeat, ratios=ratios, inputs=workload.copies,
                ))  # fmt: skip
                print(
                    f"{workload.pass_} {workload.label} {workload.dtype} {name:12} {rows[-1].median:9.4f} ms"
                    f"  ÷ frozen {ratios[FROZEN].median:.3f}  ÷ PEFT {ratios[PEFT].median:.3f}", flush=True,
                )  # fmt: skip
        file.add(rows)
        file.save(args.out)
    print(f"saved: {args.out}")


if __name__ == "__main__":
    main()
