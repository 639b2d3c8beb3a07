"""``make gpu``, from a checkout on a machine with a GPU: what only a GPU can show, most valuable first.

    python -m tools.gpu [--only PART,…] [--skip PART,…] [--minutes N] [--quick] [--device cpu] [--out FILE]

    tests      the kernel tests, on the device; the compiled extension's too where it is built with CUDA
    races      a thousand launches with the same bits, streams side by side, captured graphs
    sanitizer  every kernel once under compute-sanitizer's memcheck, synccheck and, kernel by kernel, racecheck
    speed      the timing table, each candidate checked first; withheld where tests or races failed

Needs PyTorch with its Triton, and pytest; nothing is installed and nothing fetched. ``--device cpu`` walks the same way
with interpreted kernels.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fused_lora.bench import list_of, minutes_of

from .commands import Ended, run

if TYPE_CHECKING:
    from fused_lora.bench.results import ResultsFile

CHECKOUT = Path(__file__).parents[1]
PARTS = TESTS, RACES, SANITIZER, SPEED = ("tests", "races", "sanitizer", "speed")
# the share of the time that each may take; speed has the rest
SHARE = {TESTS: 0.4, RACES: 0.15, SANITIZER: 0.2}
MINUTES = {"cuda": 12.0, "cpu": 60.0}
WORKERS = 8
# what a sanitizer says when it breaks itself, and of what it finds in a kernel
TOOL_BROKE, FOUND = "Internal Sanitizer Error", re.compile("Race reported|Invalid __|Misaligned|Barrier error")
# those of Hopper's kernels that run on the device where it is one; the others are of the shim
HOPPER_TESTS = (
    "tests/test_native_hopper.py::test_matmul_is_as_exact_as_plain_pytorch",
    "tests/test_native_hopper_grads.py::test_as_exact_as_plain_pytorch",
)
SPEED_DTYPES = {"cuda": ["bfloat16", "float16"], "cpu": ["float32", "bfloat16+float32"]}
PASSED, FAILED, UNFINISHED, ABSENT, TOOL_FAILED = "passed", "failed", "unfinished", "absent", "tool failed"


def main(argv: Sequence[str] | None = None, checkout: Path = CHECKOUT) -> int:
    """0 when all passed in time, was absent or broke a tool; 1 when a part failed or is unfinished; 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="make gpu", description="Tests on the device, then a timing table.")
    parser.add_argument("--only", type=list_of(PARTS), metavar="PART,…", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--skip", type=list_of(PARTS), default=[], metavar="PART,…")
    parser.add_argument(
        "--minutes", type=minutes_of, metavar="N", help=f"for everything; default: {MINUTES['cuda']:.0f}"
    )
    parser.add_argument("--quick", action="store_true", help="one dtype, few shapes; not saved without --out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu interprets the kernels, slowly")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: benchmarks/results/<device>-<date>.json")
    args, started = parser.parse_args(argv), time.monotonic()
    parts = [part for part in args.only or PARTS if part not in args.skip]

    # before Triton is first imported, here or by the tests
    if args.device == "cuda":
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from fused_lora.bench.results import Environment, ResultsFile, default_path

    dry = args.device == "cpu"
    if not dry and not torch.cuda.is_available():
        return _refuse("PyTorch finds no CUDA device here; --device cpu interprets the kernels instead")
    environment = Environment.here(torch.device(args.device), dry)
    path = args.out or (None if dry or args.quick else default_path("layers", environment))
    try:
        file = ResultsFile.open(path, "layers", "make gpu", environment)
    except ValueError as error:
        return _refuse(str(error))

    if SPEED in parts:
        file.complete = False
    limit_s = 60 * (args.minutes or MINUTES[args.device])
    outcomes: dict[str, str] = {}
    try:
        for part in parts:
            print(f"\n==== {part}", flush=True)
            outcomes[part] = UNFINISHED
            outcomes[part] = _part(part, outcomes, file, path, limit_s, started + limit_s, checkout, args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    print("\n==== make gpu")
    for part, outcome in outcomes.items():
        print(f"{part:<10} {outcome}")
    print("not saved: --out FILE saves" if path is None else f"saved: {path}")
    return 1 if any(outcome.startswith((FAILED, UNFINISHED)) for outcome in outcomes.values()) else 0


def _part(
    part: str, outcomes: dict[str, str], file: ResultsFile, path: Path | None, limit_s: float, deadline: float,
    checkout: Path, args: argparse.Namespace,
) -> str:  # fmt: skip
    if part == SPEED:
        failed = [name for name in (TESTS, RACES) if outcomes.get(name, "").startswith(FAILED)]
        if failed:
            return f"{ABSENT}: nothing is timed while {' and '.join(failed)} fail"
        return _speed(file, path, deadline, args.device == "cpu", args.quick)
    left = max(min(SHARE[part] * limit_s, deadline - time.monotonic()), 1.0)
    check = {TESTS: _tests, RACES: _races, SANITIZER: _sanitizer}[part]
    file.checks[part] = check(checkout, left, args.device, args.quick)
    if path is not None:
        file.save(path)
    return file.checks[part]


def _tests(checkout: Path, limit_s: float, device: str, quick: bool) -> str:
    """pytest on everything that needs the device, on several cores where pytest-xdist is installed."""
    import torch

    from fused_lora.backends import native

    command = [sys.executable, "-m", "pytest", "tests/kernels", "-q"]
    if device == "cuda" and native.why_not(torch.device("cuda"), torch.float32) is None:
        command += ["tests/test_native_cuda.py", *HOPPER_TESTS]
    # the one has a part of its own, the other compiles for GPUs that are not here
    command += [f"--ignore=tests/kernels/test_{name}.py" for name in ("device", "codegen")]
    if quick:
        command += ["-k", "not float32 and not bfloat16"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]
    return _outcome(run(command, checkout, limit_s))


def _races(checkout: Path, limit_s: float, device: str, quick: bool) -> str:
    return _outcome(run([sys.executable, "-m", "pytest", "tests/kernels/test_device.py", "-q"], checkout, limit_s))


def _sanitizer(checkout: Path, limit_s: float, device: str, quick: bool) -> str:
    script = [sys.executable, "-m", "tools.sanitized", "--device", device]
    if device == "cpu":
        return f"{_outcome(run(script, checkout, limit_s))}; the script alone: there is no GPU to watch"
    tool = sanitizer_path()
    if tool is None:
        return f"{ABSENT}: compute-sanitizer is neither on the PATH nor in the CUDA toolkit"
    from . import sanitized

    kernels = tuple(sanitized.KERNELS.values())
    # one racecheck a kernel: where one breaks the tool, the others are still checked
    watched = {"memcheck": kernels, "synccheck": kernels} | {f"racecheck {kernel}": (kernel,) for kernel in kernels}
    # compiled before, so that no tool watches the compiler; no cache, so that every operand ends where its memory does
    outcomes, start = {"script": _outcome(run(script, checkout, limit_s))}, time.monotonic()
    for name, watching in watched.items():
        left = limit_s - (time.monotonic() - start)
        if left <= 0:
            outcomes[name] = UNFINISHED
            continue
        command = [tool, "--tool", name.split()[0], "--error-exitcode", "9", "--report-api-errors", "no"]
        for kernel in watching:
            command += ["--kernel-name", f"kns={kernel}"]
        command += [*script, *(("--kernel", *watching) if len(watching) == 1 else ())]
        outcomes[name] = _checked(run(command, checkout, left, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    words = (FAILED, UNFINISHED, TOOL_FAILED)
    worst = next((word for word in words if any(o.startswith(word) for o in outcomes.values())), PASSED)
    return f"{worst}: " + "; ".join(f"{name} {outcome}" for name, outcome in outcomes.items())


def _checked(ended: Ended) -> str:
    """A tool that breaks says nothing of the kernel, whatever its exit status; what it found before counts."""
    broke = [line for line in ended.lines if TOOL_BROKE in line]
    if not broke or any(map(FOUND.search, ended.lines)):
        return _outcome(ended)
    return f"{TOOL_FAILED} after {ended.seconds:.0f} s, which says nothing of the kernel: {broke[0].strip('= ')}"


def sanitizer_path() -> str | None:
    from torch.utils.cpp_extension import CUDA_HOME

    folders = [] if CUDA_HOME is None else [Path(CUDA_HOME) / "bin", Path(CUDA_HOME) / "compute-sanitizer"]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(map(str, folders))
    )


def _speed(file: ResultsFile, path: Path | None, deadline: float, dry: bool, quick: bool) -> str:
    import torch

    from fused_lora.bench import dequantizing, measure, nets, runner, series
    from fused_lora.bench.shapes import DECODE, FORWARD, STEP

    from . import models

    device = torch.device("cpu" if dry else "cuda")
    dtypes = SPEED_DTYPES[device.type][: 1 if quick else None]
    specs = nets.runnable(nets.SPEED_NETS[device.type][: 1 if quick else None])
    agenda: list[series.Make] = [partial(models.ModelWorkload, spec, device, models.LORA_NAMES) for spec in specs]
    sizes = dequantizing.SIZES[device.type][: 1 if quick else None]
    agenda += [partial(dequantizing.DequantizeWorkload, *size, dtypes[0], device) for size in sizes]
    agenda += runner.agenda(device, dtypes, [FORWARD, STEP, DECODE], quick and not dry, "dry" if dry else "gpu")
    plan = measure.Plan(0.0, 2, 2, 0.0) if dry else measure.plan_for(device, quick)
    code = series.compete(agenda, file, path, plan, deadline, dry)
    if code == 130:
        raise KeyboardInterrupt
    if code != 0:
        return f"{FAILED}: a candidate is wrong; the others are timed"
    return PASSED if file.complete else f"{PASSED}, as far as time allowed: INCOMPLETE"


def _outcome(ended: Ended) -> str:
    words = UNFINISHED if ended.timed_out else PASSED if ended.code == 0 else f"{FAILED} (exit code {ended.code})"
    return f"{words} after {ended.seconds:.0f} s: {ended.last}"


def _refuse(why: str) -> int:
    print(f"make gpu: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
