"""``fused-lora bench``: the layer against the frozen linear and its peers, checked first, then timed side by side."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .shapes import WORKS

if TYPE_CHECKING:
    from .results import Results
    from .runner import Group

# the first dtype alone in a quick run
DTYPES = {"cpu": "float32,bfloat16,bfloat16+float32", "cuda": "bfloat16,float16"}
KNOWN_DTYPES = ("float32", "bfloat16", "float16", "bfloat16+float32", "float16+float32")

NO_CUDA = "--device cuda: PyTorch finds no CUDA device here"


def list_of(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"must be among {', '.join(known)}, got {name!r}")
        return names

    return parse


def minutes_of(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of minutes above 0, got {text!r}")
    return minutes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds; not saved without --out")
    parser.add_argument("--host", action="store_true", help="what a call costs the host, layer by layer; needs no GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument(
        "--dtype",
        type=list_of(KNOWN_DTYPES),
        help=f"of the base, then of the adapters where they differ; any of {', '.join(KNOWN_DTYPES)}; "
        f"default on cpu {DTYPES['cpu']}, on cuda {DTYPES['cuda']}",
    )
    parser.add_argument("--work", type=list_of(WORKS), default=list(WORKS), help=f"default: {','.join(WORKS)}")
    parser.add_argument("--threads", type=int, metavar="N", help="PyTorch's on the CPU; 1 for a machine that is busy")
    parser.add_argument("--minutes", type=minutes_of, metavar="N", help="start nothing after them; most valuable first")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: benchmarks/results/ of the checkout")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="also write a page, and FILE.png beside it")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="measure nothing: show a results file")


def run(args: argparse.Namespace) -> int:
    """0 when every candidate was right, 1 when one was not, 2 when nothing could be run, 130 when interrupted."""
    import torch

    from . import measure, runner, series
    from .results import Environment, Results, default_path

    if args.host:
        return _host(args)
    if args.report is not None and args.report.suffix != ".html":
        return _refuse(f"--report must end in .html, got {str(args.report)!r}")
    if args.source is not None:
        return _show(args.source, args.report)
    device_type = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device_type == "cuda" and not torch.cuda.is_available():
        return _refuse(NO_CUDA)
    if args.threads is not None:
        if args.threads < 1:
            return _refuse(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    device = torch.device(device_type)
    dtypes = args.dtype or DTYPES[device_type].split(",")[: 1 if args.quick else None]
    agenda = runner.agenda(device, dtypes, args.work, args.quick)
    if not agenda:
        return _refuse("nothing to time: RichBoyNet trains in float32 alone")
    environment = Environment.here(device)
    path = args.out or (None if args.quick else default_path(environment))
    try:
        results = Results.open(path, environment)
    except ValueError as error:
        return _refuse(str(error))

    deadline = math.inf if args.minutes is None else time.monotonic() + 60 * args.minutes

    def report(groups: list[Group]) -> None:
        if args.report is not None:
            _report(results, args.report, groups)

    return series.compete(agenda, results, path, measure.plan_for(device, args.quick), deadline, after=report)


def _host(args: argparse.Namespace) -> int:
    import torch

    from . import host

    others = {"dtype": args.dtype, "threads": args.threads, "minutes": args.minutes, "report": args.report}
    given = [f"--{name}" for name, value in {**others, "from": args.source}.items() if value is not None]
    if given:
        return _refuse(f"--host goes with --quick, --device and --out alone, got {', '.join(given)}")
    device_type = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device_type == "cuda" and not torch.cuda.is_available():
        return _refuse(NO_CUDA)
    try:
        return host.run(device_type, args.quick, args.out)
    except RuntimeError as error:
        return _refuse(f"--host: {error}")


def _show(source: Path, report: Path | None) -> int:
    """What is in a results file, as if it had just been measured."""
    from . import series, table
    from .groups import groups_of
    from .results import Results

    try:
        results = Results.load(source)
    except (OSError, ValueError) as error:
        return _refuse(f"--from: {error}")
    found = groups_of(results)
    print(", ".join(f"{key} {value}" for key, value in vars(results.environment).items() if value is not None))
    for group in found:
        print("\n".join(table.lines(group)))
    series.conclude(found, source)
    if report is not None:
        _report(results, report, found)
    return 0


def _report(results: Results, path: Path, groups: list[Group]) -> None:
    from . import report

    wrong = {f"{group.title}: {name}": why for group in groups for name, why in group.red.items()}
    for file in report.write(results, path, wrong):
        print(f"written: {file}")


def _refuse(why: str) -> int:
    print(f"fused-lora bench: {why}", file=sys.stderr)
    return 2
