"""What ``impl="auto"`` chooses by: ``fused_lora/backends/measured.json``, from the newest file of each generation."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fused_lora.backends import measured
from fused_lora.backends.measured import LayerPass, Served, Tables
from fused_lora.bench.baselines import OURS_PREFIX
from fused_lora.bench.groups import Group, groups_of, has_wall, is_gpu, wall
from fused_lora.bench.results import ResultsFile, Row, Spread
from fused_lora.bench.shapes import DECODE, FORWARD, STEP
from fused_lora.bench.table import markdown

from ..files import NOT_MEASURED, Files
from ..predict import gpu_called

PATH = Path("fused_lora/backends") / measured.FILE.name
# a decode is a forward of few tokens
PASSES = {FORWARD: measured.FORWARD, DECODE: measured.FORWARD, STEP: measured.STEP}
SIZED = ("pass", "dtype", "M", "K", "N", "R")
SIZES = re.compile(r"M=(\d+) K=(\d+) N=(\d+) R=(\d+)")
# what "auto" is to be no slower than, and how much slower is as fast
REPLACED, TOLERATED = ("addmm", "eager"), 1.03
WALL, EVENTS = "wall", "between two events on the device"


def generation(file: ResultsFile) -> measured.Capability | None:
    """A GPU's compute capability: the file's own, or in older ones that of the GPU with this name."""
    named, known = file.environment.compute_capability, gpu_called(file.environment.device)
    if named is not None:
        return measured.capability_of(named)
    return None if known is None else known.device.capability


def files_that_count(files: Files) -> dict[measured.Capability, tuple[str, ResultsFile]]:
    """The newest of each generation, oldest generation first."""
    found: dict[measured.Capability, tuple[str, ResultsFile]] = {}
    for name, file in files["layers"].items():
        if is_gpu(file) and (capability := generation(file)) is not None:
            found.setdefault(capability, (name, file))
    return dict(sorted(found.items()))


def candidate_of(backend: str, file: ResultsFile) -> str:
    """The candidate whose time is a backend's: see ``measured.py`` for "eager"."""
    return "addmm" if backend == "eager" and not has_wall(file) else f"{OURS_PREFIX}{backend}"


def asked_of(group: Group) -> LayerPass | None:
    """What a group's candidates did; None for what is no pass of a layer that has a row."""
    sizes = SIZES.search(group.shape)
    if group.pass_ not in PASSES or sizes is None:
        return None
    base, _, adapters = group.dtype.partition("+")
    M, K, N, R = map(int, sizes.groups())
    return LayerPass(group.pass_ == STEP, M, K, N, R, getattr(torch, adapters or base))


def user_ms(row: Row) -> float:
    """What a user waits, as far as the file has it."""
    return row.median if row.wall_ms is None else row.wall_ms


def text(files: Files) -> str:
    """The packaged file: a row takes a line."""
    count = files_that_count(files)
    clocks = ("", " device") if any(has_wall(file) for _, file in count.values()) else ("",)
    columns = [*SIZED, *(f"{backend}{clock}" for clock in clocks for backend in measured.BACKENDS)]
    parts = []
    for (major, minor), (name, file) in count.items():
        about = {
            "gpu": file.environment.device, "file": name, "date": file.environment.date,
            "clock": WALL if has_wall(file) else EVENTS,
        }  # fmt: skip
        head = json.dumps(about, indent=3, ensure_ascii=False).removesuffix("\n}")
        rows = ",\n".join("    " + json.dumps(row[: len(columns)]) for row in sorted(_rows(file), key=_place))
        parts.append(f'  "{major}.{minor}": {head},\n   "rows": [\n{rows}\n   ]\n  }}')
    made_of = "made by `make report`; times in microseconds; null: not measured"
    top = f' "about": {json.dumps(made_of)},\n "columns": {json.dumps(columns)},\n'
    body = ",\n".join(parts)
    return f'{{\n{top} "generations": {{\n{body}\n }}\n}}\n'


def _rows(file: ResultsFile) -> Iterator[list[Any]]:
    for group in groups_of(file):
        asked = asked_of(group)
        if asked is None:
            continue
        by = {row.candidate: row for row in group.rows}
        timed = [by.get(candidate_of(backend, file)) for backend in measured.BACKENDS]
        if not any(timed):
            continue
        walls = [None if row is None else _us(user_ms(row)) for row in timed]
        devices = [None if row is None or row.wall_ms is None else _us(row.median) for row in timed]
        yield [PASSES[group.pass_], group.dtype, *asked[1:5], *walls, *devices]


def _place(row: list[Any]) -> list[Any]:
    """In the file: by pass, dtype and sizes."""
    return row[: len(SIZED)]


def _us(ms: float) -> float:
    return float(f"{1e3 * ms:.5g}")


# --------------------------------------------------------------------------------------------------
# In words
# --------------------------------------------------------------------------------------------------


def choices(files: Files) -> str:
    """What is chosen by M, for docs/gpu.md."""
    known = measured.parse(json.loads(text(files)))
    if not known:
        return f"{NOT_MEASURED}: no file in `benchmarks/results/` is a GPU's.\n"
    lines = []
    for (major, minor), table in known.items():
        for gradients in (False, True):
            ways = [
                measured.served(table, torch.bfloat16, measured.EXAMPLE._replace(gradients=gradients), able)
                for able in (measured.BACKENDS, ("triton", "eager"))
            ]
            what = "with gradients" if gradients else "without"
            lines.append([f"{major}.{minor}, {table.gpu}, {table.date}", what, *map(in_ranges, ways)])
    heads = ["compute capability, GPU, measured on", "gradients", "with the extension", "without it"]
    return f"{markdown(heads, lines)}\n{_clocks(known)}"


def words(file: ResultsFile) -> str:
    """What ``impl="auto"`` takes of a GPU's own file, and where a baseline is ahead of it all the same."""
    taken: Counter[str] = Counter()
    behind, clear = dict.fromkeys(REPLACED, 0), 0
    for group in groups_of(file):
        by = {row.candidate: row for row in group.rows}
        times = {
            backend: user_ms(row) for backend in measured.BACKENDS
            if asked_of(group) is not None and (row := by.get(candidate_of(backend, file))) is not None
        }  # fmt: skip
        if not times:
            continue
        best = min(times, key=lambda backend: times[backend])
        taken[best] += 1
        mine = by[candidate_of(best, file)]
        for name in REPLACED:
            if name in by and user_ms(mine) > TOLERATED * user_ms(by[name]):
                behind[name] += 1
                clear += _spread(by[name]).p80 < _spread(mine).p20
    told = ", ".join(f"`{name}` in {taken[name]}" for name in measured.BACKENDS)
    late = ", ".join(f"{name} in {count}" for name, count in behind.items())
    beyond = f"; in {clear} of these their spreads don't overlap" if any(behind.values()) else ""
    return f'By this file `impl="auto"` takes {told}, and is more than 3 % behind {late}{beyond}. '


def _spread(row: Row) -> Spread:
    return wall(row) or Spread(row.median, row.p20, row.p80)


def in_ranges(found: list[Served]) -> str:
    return "; ".join(f"M {one.first:,} to {one.last:,}: `{one.backend}`" for one in found)


def _clocks(known: Tables) -> str:
    old = [f"{table.gpu} of {table.date}" for table in known.values() if table.clock != WALL]
    if not old:
        return ""
    return (
        f"The file of the {', '.join(old)} has no wall times: its times are between two events on the device, and hold "
        "the host's where a call costs the host more. It is of the code before calls that repeat were made cheap.\n"
    )
