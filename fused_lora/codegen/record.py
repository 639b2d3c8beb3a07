"""What was found as a results file, and that file as a table: docs/codegen.md is made of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ..bench import results
from ..bench.results import Environment, ResultsFile, Row
from ..bench.table import NOTHING, markdown
from .shipped import DequantizeCase, Found

# no GPU was used, and what the compiler makes does not depend on the CPU
OFFLINE = "offline compile"
HEADS = (
    "GPU", "pass", "dtype", "adapters", "R", "M", "tile, warps, stages", "schedule", "loads", "registers", "spills",
    "shared KB", "instruction", "loop", "plain", "waits", "ptxas",
)  # fmt: skip


def _environment() -> Environment:
    return replace(Environment.here(torch.device("cpu")), device=OFFLINE)


def default_path() -> Path | None:
    return results.default_path("codegen", _environment())


def of(found: Iterable[Found]) -> ResultsFile:
    return ResultsFile("codegen", "fused-lora codegen", _environment(), [_row(one) for one in found])


def _row(found: Found) -> Row:
    case, got = found.case, found.resources
    *tile, warps, stages = found.tile
    weight = f"K={case.K} N={case.N}"
    shape = weight if isinstance(case, DequantizeCase) else f"M={case.M} {weight} R={case.R}"
    return Row(
        found.pass_, shape, str(case.dtype).removeprefix("torch."),
        "ours-triton", 1, got.registers, got.registers, got.registers, unit="registers",
        extra={
            "arch": case.arch, "adapters": None if isinstance(case, DequantizeCase) else case.adapters,
            "tile": f"{'×'.join(map(str, tile))}, {warps}, {stages}", "warps": warps,
            "schedule": found.schedule, "loads": found.loads, "spill_bytes": got.spill_bytes,
            "shared_kb": round(got.shared_bytes / 1024), "instructions": list(found.instructions),
            "loop": found.loop, "plain": found.plain_loop, "waits": got.loop_waits, "ptxas": got.assembler,
        },
    )  # fmt: skip


def sizes(row: Row) -> dict[str, int]:
    """M, K, N and R of a row's shape; of a weight alone K and N."""
    return {name: int(value) for name, value in re.findall(r"\b([MKNR])=(\d+)", row.shape)}


def table(file: ResultsFile) -> str:
    return markdown(HEADS, _lines(file))


def _lines(file: ResultsFile) -> Iterator[tuple[object, ...]]:
    for row in file.rows:
        about, size = row.extra, sizes(row)
        yield (
            f"sm_{about['arch']}", row.pass_, row.dtype, about["adapters"] or NOTHING,
            size.get("R", NOTHING), size.get("M", NOTHING), about["tile"], about["schedule"], about["loads"],
            f"{row.median:g}", about["spill_bytes"], about["shared_kb"], ", ".join(about["instructions"]),
            about["loop"] or NOTHING, about["plain"] or NOTHING, about["waits"], about["ptxas"],
        )  # fmt: skip
