"""``fused-lora codegen``: compile every shipped launch for GPUs that are not here, and say what came of it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .kernels.shipped import Case, Found

ARCHS = (80, 86, 89, 90, 100, 120)
RANKS = (8, 16, 32, 64, 128)
HEAD = ("GPU", "work", "dtype", "R", "M", "tile, warps, stages", "form", "registers", "spills", "shared KB",
        "instruction", "loop", "plain", "waits")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", default=",".join(map(str, ARCHS)), help="compute capabilities; default: %(default)s")
    parser.add_argument("--rank", default=",".join(map(str, RANKS)), help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table")


def run(args: argparse.Namespace) -> int:
    """0 when nothing spills and ptxas warns of nothing, 1 otherwise, 2 when nothing could be compiled."""
    from . import ops

    try:
        archs, ranks = _numbers(args.arch, ARCHS, "--arch"), _numbers(args.rank, None, "--rank")
    except ValueError as error:
        return _refuse(str(error))
    if ops.interpreting():
        return _refuse("TRITON_INTERPRET=1 interprets the kernels: unset it to compile them")
    if not ops.triton_installed():
        return _refuse("Triton is not installed")
    found = [row for case in _progress(_cases(archs, ranks)) for row in _compile(case)]
    table = "\n".join(_table(found))
    print(table)
    if args.markdown is not None:
        args.markdown.write_text(f"{_INTRODUCTION}\n{table}\n")
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in found], default=str, indent=1) + "\n")
    return 1 if any(row.resources.spill_bytes or row.resources.warnings for row in found) else 0


def _compile(case: Case) -> Iterable[Found]:
    from .kernels.shipped import compile_case

    return compile_case(case)


def _cases(archs: list[int], ranks: list[int]) -> list[Case]:
    import torch

    from .kernels.shipped import Case

    return [
        Case(arch, M, 4096, 4096, rank, dtype, dtype)
        for arch in archs
        for dtype in (torch.bfloat16, torch.float16)
        for rank in ranks
        for M in (8192, 256)
    ]


def _table(found: list[Found]) -> list[str]:
    rows = [HEAD, ("---",) * len(HEAD)]
    for row in found:
        case, got = row.case, row.resources
        plain = row.plain.loops[0] if row.plain is not None and row.plain.loops else "–"
        rows.append(
            (f"sm_{case.arch}", row.work, str(case.dtype).removeprefix("torch."), str(case.R), str(case.M),
             "×".join(map(str, row.tile[:3])) + f", {row.tile[3]}, {row.tile[4]}", row.form, str(got.registers),
             str(got.spill_bytes), f"{got.shared_bytes / 1024:.0f}", ", ".join(got.matrix_instructions),
             str(row.loop or "–"), str(plain), str(got.loop_waits))
        )  # fmt: skip
    return [f"| {' | '.join(row)} |" for row in rows]


_INTRODUCTION = """# What the compiler makes of the kernels

Written by `fused-lora codegen --markdown docs/codegen.md`; no GPU was used. Every launch that a layer of 4096 × 4096
makes, with the tile and the form that the rules choose for M tokens. *loop* counts the machine instructions in the main
loop of the tiles that wait for `h`, *plain* those of the bare GEMM of the same tile. ptxas warnings and spills fail
the command.
"""


def _numbers(text: str, known: tuple[int, ...] | None, name: str) -> list[int]:
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    for number, part in zip(numbers, text.split(","), strict=True):
        if number < 1 or (known is not None and number not in known):
            rule = "a whole number from 1" if known is None else f"one of {', '.join(map(str, known))}"
            raise ValueError(f"{name} must be {rule}, got {part!r}")
    return numbers


def _progress(cases: list[Any]) -> Iterable[Any]:
    try:
        from tqdm import tqdm
    except ImportError:
        return cases
    return tqdm(cases, unit="case", leave=False)  # type: ignore[no-any-return]


def _refuse(why: str) -> int:
    print(f"fused-lora codegen: {why}", file=sys.stderr)
    return 2
