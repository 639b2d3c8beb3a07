"""``fused-lora codegen``: compile every shipped launch for GPUs that are not here, and report what ptxas made."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backends import environment

if TYPE_CHECKING:
    from .shipped import Case, DequantizeCase, Found

ARCHS = (80, 86, 89, 90, 100, 120)
RANKS = (8, 16, 32, 64, 128)
TOKENS = (8192, 256, 128, 16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", default=",".join(map(str, ARCHS)), help="compute capabilities; default: %(default)s")
    parser.add_argument("--rank", default=",".join(map(str, RANKS)), help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default, of every GPU and rank: benchmarks/results/")


def run(args: argparse.Namespace) -> int:
    """0 when all is as it must be (``shipped.Found.faults``), 1 otherwise, 2 when nothing could be compiled."""

    try:
        archs, ranks = _numbers(args.arch, ARCHS, "--arch"), _numbers(args.rank, None, "--rank")
    except ValueError as error:
        return _refuse(str(error))
    if environment.interpreting():
        return _refuse("TRITON_INTERPRET=1 interprets the kernels: unset it to compile them")
    if not environment.TRITON_INSTALLED:
        return _refuse("Triton is not installed")
    from . import record

    found = _compile_all([*_cases(archs, ranks), *_dequantize_cases(archs)])
    file = record.of(found)
    print(record.table(file))
    path = args.json or (record.default_path() if (archs, ranks) == (list(ARCHS), list(RANKS)) else None)
    if path is not None:
        file.save(path)
        print(f"saved: {path}")
    faults = [f"{_name(row)}: {fault}" for row in found for fault in row.faults()]
    for fault in faults:
        print(f"fused-lora codegen: {fault}", file=sys.stderr)
    return 1 if faults else 0


def _compile_all(cases: Sequence[Case | DequantizeCase]) -> list[Found]:
    """In as many processes as there are cores, none of them forked from this one's threads. In the order of cases.

    Neighbours share what they have in common, the bare GEMM among it, so a process takes several at a time.
    """
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        return [row for rows in _progress(pool.map(_compile, cases, chunksize=5), len(cases)) for row in rows]


def _compile(case: Case | DequantizeCase) -> list[Found]:
    from .shipped import DequantizeCase, compile_case, compile_dequantize

    return [compile_dequantize(case)] if isinstance(case, DequantizeCase) else list(compile_case(case))


def _cases(archs: list[int], ranks: list[int]) -> list[Case]:
    import torch

    from .shipped import Case

    cases = [
        Case(arch, M, 4096, 4096, rank, dtype, dtype)
        for arch in archs
        for dtype in (torch.bfloat16, torch.float16)
        for M in TOKENS
        for rank in ranks
    ]
    # as most people train: float32 adapters and dropout
    cases += [
        Case(arch, M, 4096, 4096, rank, torch.bfloat16, torch.float32, dropout)
        for arch in archs
        for M in TOKENS[:2]
        for rank in (16, 64)
        if rank in ranks
        for dropout in (False, True)
    ]
    return cases


def _dequantize_cases(archs: list[int]) -> list[DequantizeCase]:
    import torch

    from .shipped import DequantizeCase

    return [
        DequantizeCase(arch, 4096, 4096, dtype, double)
        for arch in archs
        for dtype in (torch.bfloat16, torch.float16)
        for double in (True, False)
    ]


def _name(row: Found) -> str:
    from .shipped import DequantizeCase

    case = row.case
    rows = "" if isinstance(case, DequantizeCase) else f"R {case.R}, M {case.M}, adapters {case.adapters}, "
    return f"sm_{case.arch}, {row.pass_}, {str(case.dtype).removeprefix('torch.')}, {rows}{row.schedule}"


def _numbers(text: str, known: tuple[int, ...] | None, name: str) -> list[int]:
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    for number, part in zip(numbers, text.split(","), strict=True):
        if number < 1 or (known is not None and number not in known):
            rule = "a whole number from 1" if known is None else f"one of {', '.join(map(str, known))}"
            raise ValueError(f"{name} must be {rule}, got {part!r}")
    return numbers


def _progress(results: Iterable[Any], count: int) -> Iterable[Any]:
    try:
        from tqdm import tqdm
    except ImportError:
        return results
    return tqdm(results, total=count, unit="case", leave=False)  # type: ignore[no-any-return]


def _refuse(why: str) -> int:
    print(f"fused-lora codegen: {why}", file=sys.stderr)
    return 2
