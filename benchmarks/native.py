"""The compiled extension beside plain PyTorch, PEFT and the frozen linear, on a CPU; candidates take turns.

python benchmarks/native.py [--repeats N] [--threads N] [--seconds S] [--out FILE]
default: benchmarks/results/native/<device>-<date>.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fused_lora.backends import native
from fused_lora.bench import measure
from fused_lora.bench.baselines import FROZEN
from fused_lora.bench.check import Judge
from fused_lora.bench.problems import LayerProblem, NetProblem, Problem
from fused_lora.bench.results import Environment
from fused_lora.bench.shapes import FORWARD, SHAPES, STEP

CPU = torch.device("cpu")
CANDIDATES = (FROZEN, "ours-native", "ours-eager", "peft")


def problems() -> Iterator[Problem]:
    shapes = {shape.name: shape for shape in SHAPES}
    yield NetProblem("float32", CPU)
    for dtype in ("float32", "bfloat16", "bfloat16+float32"):
        yield LayerProblem(FORWARD, shapes["decode-2048-m1"], dtype, CPU)
    for name in ("decode-4096-m4", "decode-4096-m16"):
        for dtype in ("float32", "bfloat16"):
            yield LayerProblem(FORWARD, shapes[name], dtype, CPU)
    yield LayerProblem(FORWARD, shapes["richboynet-3"], "float32", CPU)
    for dtype in ("float32", "bfloat16", "bfloat16+float32"):
        yield LayerProblem(STEP, shapes["square-2048"], dtype, CPU)


def checked(problem: Problem) -> dict[str, Callable[[], object]]:
    """The candidates' calls, each right."""
    judge, calls = Judge(problem), {}
    for name in CANDIDATES:
        candidate = problem.candidate(name)
        verdict = judge.verdict(name, candidate)
        if verdict is not None:
            raise SystemExit(f"{problem.label}, {name}: {verdict}")
        calls[name] = candidate.call
    return calls


def main() -> None:
    if not native.available():
        raise SystemExit(native.why_not())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    environment = Environment.here(CPU)
    default = Path(__file__).parent / "results" / "native" / f"{environment.slug}-{environment.date}.json"
    parser.add_argument("--out", type=Path, default=default, metavar="FILE")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of everything, one after the other")
    parser.add_argument("--seconds", type=float, default=4.0, help="for a measurement of a problem")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="one says most on a busy machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    environment = dataclasses.replace(environment, threads=args.threads)
    plan = measure.Plan(args.seconds, min_rounds=21, max_rounds=300, sample_ms=2.0)
    rows: list[dict[str, object]] = []
    for problem in problems():
        calls = checked(problem)
        for repeat in range(args.repeats):
            found = measure.interleave(calls, measure.HostTimer(), plan)
            for name in calls:
                ratios = {base: dataclasses.asdict(found.ratio(name, base)) for base in (FROZEN, "peft")}
                rows.append({
                    "work": problem.work, "shape": problem.label, "dtype": problem.dtype, "candidate": name,
                    "repeat": repeat, "rounds": len(found.samples[name]),
                    "ms": dataclasses.asdict(found.time(name)), "ratio_to": ratios,
                })  # fmt: skip
                print(
                    f"{problem.work} {problem.label} {problem.dtype} {name:12} {found.time(name).median:9.4f} ms"
                    f"  ÷ frozen {ratios[FROZEN]['median']:.3f}  ÷ PEFT {ratios['peft']['median']:.3f}", flush=True,
                )  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"environment": dataclasses.asdict(environment), "rows": rows}, indent=1) + "\n")
    print(f"saved: {args.out}")


if __name__ == "__main__":
    main()
