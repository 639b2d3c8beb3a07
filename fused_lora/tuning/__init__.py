"""``fused-lora tune``: time candidates on the GPU at hand, and write those that beat the rules to a data file."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..bench import KNOWN_DTYPES, NO_CUDA, list_of
from ..bench.shapes import MODEL_LAYERS

if TYPE_CHECKING:
    import torch

    from ..backends.triton.tuned import Table
    from ..bench.measure import Timer
    from ..bench.subjects import Job
    from .search import Measure, Outcome

TOKENS, QUICK_TOKENS = "1,16,512,2048,8192", "1,8192"
CPU_SHAPES, CPU_TOKENS = "64x48", "3,40"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shapes", type=_shapes, metavar="KxN,…", help="in_features x out_features of layers")
    what.add_argument("--model-like", choices=list(MODEL_LAYERS), help="the layers of such a model; default: llama-8b")
    parser.add_argument("--tokens", type=_numbers, metavar="M,…", help=f"default: {TOKENS}")
    parser.add_argument("--rank", type=_numbers, default=[16], metavar="R,…", help="default: 16")
    parser.add_argument(
        "--dtype",
        type=list_of(KNOWN_DTYPES),
        default=["bfloat16"],
        help="default: bfloat16; bfloat16+float32: adapters",
    )
    parser.add_argument("--dropout", action="store_true", help="for training with LoRA dropout")
    parser.add_argument(
        "--quick", action="store_true", help="only the rules' own lists, without neighbours and other schedules"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: your own file, which every process reads")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu interprets the kernels")


def _shapes(text: str) -> list[tuple[int, int]]:
    shapes = []
    for part in text.split(","):
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part)
        if match is None:
            raise argparse.ArgumentTypeError(f"must be in_features x out_features, as 4096x14336, got {part!r}")
        shapes.append((int(match[1]), int(match[2])))
    return shapes


def _numbers(text: str) -> list[int]:
    for part in text.split(","):
        if not re.fullmatch(r"[1-9]\d*", part):
            raise argparse.ArgumentTypeError(f"must be whole numbers from 1, got {part!r}")
    return [int(part) for part in text.split(",")]


def run(args: argparse.Namespace, timer: Timer | None = None) -> int:
    """0 when all was tuned, 1 when a rule's own choice is wrong, 2 when nothing can be tuned, 130 when interrupted.

    timer: instead of the device's own.
    """
    import torch

    from .. import backends

    device = torch.device(args.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return _refuse(NO_CUDA)
        device = torch.device("cuda", torch.cuda.current_device())
    why = backends.why_not("triton", device, torch.float32)
    if why is not None:
        return _refuse(why)

    from ..backends.triton import tuned
    from ..bench import measure

    path = args.out or (tuned.default_path() if device.type == "cuda" else None)
    table = tuned.Table() if path is None else tuned.read(path, must_exist=False)
    if table.complaints:
        return _refuse(f"{path} would be overwritten: {table.complaints[0]}; fix it, remove it or name another --out")
    plan = measure.Plan(0.1, 5, 20, 0.0) if args.quick else measure.Plan(0.3, 10, 50, 0.0)
    timed = partial(measure.interleave, timer=timer or measure.timer_for(device), plan=plan)
    code = _tune(_jobs(args), device, table, timed, args.quick)
    print("not saved: --out FILE saves" if path is None else f"saved: {path}")
    if path is not None and args.out is not None:
        print(f"read where {tuned.VARIABLE}={path} is set")
    return code


def _tune(jobs: Sequence[Job], device: torch.device, table: Table, measure: Measure, quick: bool) -> int:
    """Job by job, saved after each."""
    from ..backends.triton.choice import known_device
    from ..backends.triton.entries import class_of
    from ..bench.results import write_json
    from ..bench.subjects import make
    from .candidates import ROUNDS
    from .search import search

    known, failures, done = known_device(device), 0, set()
    for index, job in enumerate(jobs):
        print(f"[{index + 1}/{len(jobs)}] {job}", flush=True)
        subject = make(job, device)
        if class_of(subject.problem) in done:
            print("  shares an entry with one before")
            continue
        done.add(class_of(subject.problem))
        say: Callable[[str], None] = partial(print, flush=True)
        outcome = search(subject, known, measure, say, ROUNDS[:1] if quick else ROUNDS)
        print(f"  {_conclusion(outcome)}", flush=True)
        failures += outcome.failed is not None
        if outcome.entry is not None:
            table.put(outcome.entry)
        elif not outcome.interrupted:
            # the rule is the best again: an older choice is not
            table.remove(known, subject.problem)
        if table.path is not None:
            write_json(table.path, table.as_json())
        if outcome.interrupted:
            print("interrupted", file=sys.stderr)
            return 130
    return 1 if failures else 0


def _conclusion(outcome: Outcome) -> str:
    from ..bench.subjects import in_one_line

    if outcome.failed is not None:
        return f"FAILED, so not tuned: the rule's own choice is {outcome.failed}"
    if outcome.entry is None:
        return f"none of {outcome.tried} is clearly faster than the rule's choice"
    entry = outcome.entry
    gain = 1 - entry.ms / entry.heuristic_ms
    return f"{gain:.1%} less time than the rule's choice: {in_one_line(entry.choice)}"


def _jobs(args: argparse.Namespace) -> list[Job]:
    """Everything that was asked for."""
    from ..bench.subjects import ADAPTER_GRADIENTS, FORWARD, INPUT_GRADIENT, Job

    on_cpu = args.device == "cpu"
    layers = args.shapes
    if layers is None:
        default = _shapes(CPU_SHAPES) if on_cpu else list(MODEL_LAYERS["llama-8b"].values())
        layers = default if args.model_like is None else list(MODEL_LAYERS[args.model_like].values())
    tokens = args.tokens or _numbers(CPU_TOKENS if on_cpu else QUICK_TOKENS if args.quick else TOKENS)
    jobs = []
    for dtype in args.dtype:
        for rank in args.rank:
            for K, N in layers:
                for M in tokens:
                    # small M is decoded, without gradients
                    passes = (FORWARD,) if M <= 16 else (FORWARD, INPUT_GRADIENT, ADAPTER_GRADIENTS)
                    jobs += [Job(pass_, M, K, N, rank, dtype, args.dropout) for pass_ in passes]
    return jobs


def _refuse(why: str) -> int:
    print(f"fused-lora tune: {why}", file=sys.stderr)
    return 2
