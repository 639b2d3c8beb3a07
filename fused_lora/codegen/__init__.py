"""``fused-lora codegen``: compile every shipped launch for GPUs that are not here, and say what came of it."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backends import environment

if TYPE_CHECKING:
    import torch

    from .shipped import Case, Found

ARCHS = (80, 86, 89, 90, 100, 120)
RANKS = (8, 16, 32, 64, 128)
TOKENS = (8192, 256, 16)
HEAD = ("GPU", "work", "dtype", "R", "M", "tile, warps, stages", "form", "loads", "registers", "spills", "shared KB",
        "instruction", "loop", "plain", "waits", "ptxas")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", default=",".join(map(str, ARCHS)), help="compute capabilities; default: %(default)s")
    parser.add_argument("--rank", default=",".join(map(str, RANKS)), help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table")


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
    found = _compile_all(_cases(archs, ranks))
    table = "\n".join(_table(found))
    print(table)
    if args.markdown is not None:
        args.markdown.write_text(f"{_INTRODUCTION}\n{table}\n")
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in found], default=str, indent=1) + "\n")
    faults = [f"{_name(row)}: {fault}" for row in found for fault in row.faults()]
    for fault in faults:
        print(f"fused-lora codegen: {fault}", file=sys.stderr)
    return 1 if faults else 0


def _compile_all(cases: list[Case]) -> list[Found]:
    """In as many processes as there are cores, none of them forked from this one's threads. In the order of cases.

    Neighbours share what they have in common, the bare GEMM among it, so a process takes several at a time.
    """
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        return [row for rows in _progress(pool.map(_compile, cases, chunksize=5), len(cases)) for row in rows]


def _compile(case: Case) -> list[Found]:
    from .shipped import compile_case

    return list(compile_case(case))


def _cases(archs: list[int], ranks: list[int]) -> list[Case]:
    import torch

    from .shipped import Case

    return [
        Case(arch, M, 4096, 4096, rank, dtype, dtype)
        for arch in archs
        for dtype in (torch.bfloat16, torch.float16)
        for M in TOKENS
        for rank in ranks
    ]


def _table(found: list[Found]) -> list[str]:
    rows = [HEAD, ("---",) * len(HEAD)]
    for row in found:
        case, got = row.case, row.resources
        rows.append(
            (f"sm_{case.arch}", row.work, _plain_name(case.dtype), str(case.R), str(case.M),
             "×".join(map(str, row.tile[:3])) + f", {row.tile[3]}, {row.tile[4]}", row.form, row.loads,
             str(got.registers), str(got.spill_bytes), f"{got.shared_bytes / 1024:.0f}",
             ", ".join(got.matrix_instructions), str(row.loop or "–"), str(row.plain_loop or "–"), str(got.loop_waits),
             got.assembler)
        )  # fmt: skip
    return [f"| {' | '.join(row)} |" for row in rows]


def _name(row: Found) -> str:
    case = row.case
    return f"sm_{case.arch}, {row.work}, {_plain_name(case.dtype)}, R {case.R}, M {case.M}, {row.form}"


def _plain_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_INTRODUCTION = """# What the compiler makes of the kernels

Written by `fused-lora codegen --markdown docs/codegen.md`; no GPU was used. Every launch that a layer of 4096 × 4096
makes, with the tile, the form and the kind of loads that the rules choose for M tokens; 16 tokens take the few-token
kernel, whose tile is BLOCK_P×BLOCK_Q×BLOCK_R. *loop* counts the machine instructions in the main loop of the tiles that
wait for `h`, *plain* those of the bare GEMM of the same tile, *waits* those of the loop that wait for memory or for
matrix instructions, *ptxas* is the assembler that Triton took. Spills, its warnings, another matrix instruction than
the GPU's, and a loop over 1.05 × plain fail the command; the loop of a tile that recomputes `h` is exempt, and so are
adapter gradients and few tokens, which have no bare GEMM to be compared with.

Two faults of assemblers come without a warning, so the machine code of every launch is searched for them:

- **A uniform register is read that nothing has written.** ptxas 12.8.93, which Triton 3.6.0 and 3.7.1 bring for
  Hopper, makes such code of two wgmma whose second operands take turns in one place of shared memory. On an H100 `h`
  was wrong by its whole size, for 16-bit layers with a transposed `lora_A` and an odd rank. The kernels now have both
  operands in shared memory before the first product.
- **A register of a wgmma's first operand is written again before the wgmma has read it.** ptxas before 13.3 does so to
  a wgmma that is still under way when the loop turns
  ([triton#9433](https://github.com/triton-lang/triton/issues/9433)). Dropout's mask makes such an operand, and so
  does `v` times the scale in the few-token kernel: both kernels wait for that product within the turn.
"""


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
