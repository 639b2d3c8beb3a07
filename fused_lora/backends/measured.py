"""What ``impl="auto"`` takes on a GPU: the fastest of what was measured on a GPU of its generation.

``measured.json`` beside this has the times. ``make report`` makes it from the newest results file of each generation,
and a test holds it to that. The time is the wall's, which a user waits for; where a file is older than that clock, the
time between two events on the device, which holds the host's where the host is slower. Device times explain them.

The rule, for one pass of a layer:

1. The table is the GPU's own generation's, else the nearest one's: ``nearest``.
2. The rows are those of a pass with gradients ("step") or without ("forward"), in the same dtypes; where none has the
   adapters' dtype, of the same base; where none has that, of a base of as many bytes.
3. The nearest rows count, by the distance of (M, K, N, R) in logarithms, each by the inverse square of its distance: of
   a shape that was measured, its own row alone.
4. The backend with the least mean logarithm of its time is taken, of those that can run here and have a time there.

Where no row fits, which dropout and float32 on most tables mean: the first that can run of "triton", "native", "eager"
and has a time anywhere in the table. Without a table, the first that can run.

"eager" is in-place addmm: its time is ours where the file has wall times, and in older files, whose "ours-eager" was
another, that of the baseline "addmm", which does the same and one product more.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

FILE = Path(__file__).with_name("measured.json")
BACKENDS = ("triton", "native", "eager")
FORWARD, STEP = "forward", "step"
# how many rows count
NEAREST = 4
# where it is looked at how a choice depends on M
TOKENS = tuple(1 << power for power in range(15))

Capability = tuple[int, int]


class LayerPass(NamedTuple):
    """What is asked of a layer.  gradients: whether any is wanted.  dropout: whether a mask is drawn."""

    gradients: bool
    M: int
    K: int
    N: int
    R: int
    adapter_dtype: torch.dtype
    dropout: bool = False


# for who tells what is chosen
EXAMPLE = LayerPass(True, 1, 4096, 4096, 16, torch.bfloat16)


class Timed(NamedTuple):
    """A row: backend -> microseconds, of the wall and of the device, where they were measured."""

    pass_: str
    dtype: str
    M: int
    K: int
    N: int
    R: int
    wall: Mapping[str, float]
    device: Mapping[str, float]


class Table(NamedTuple):
    """What was measured on one generation.  gpu: the driver's name.  file: in benchmarks/results/.  clock: in words."""

    gpu: str
    file: str
    date: str
    clock: str
    rows: Sequence[Timed]

    @property
    def backends(self) -> set[str]:
        return {name for row in self.rows for name in row.wall}


Tables = Mapping[Capability, Table]


def parse(data: Mapping[str, Any]) -> Tables:
    """``measured.json``: "columns" names the numbers of a row, "<backend>" on the wall, "<backend> device" there."""
    columns = data["columns"]

    def timed(values: Sequence[Any]) -> Timed:
        row = dict(zip(columns, values, strict=True))
        walls = {name: row[name] for name in BACKENDS if row[name] is not None}
        devices = {name: us for name in BACKENDS if (us := row.get(f"{name} device")) is not None}
        return Timed(row["pass"], row["dtype"], row["M"], row["K"], row["N"], row["R"], walls, devices)

    return {
        capability_of(name): Table(**about | {"rows": [timed(values) for values in about["rows"]]})
        for name, about in data["generations"].items()
    }


@functools.cache
def tables() -> Tables:
    return parse(json.loads(FILE.read_text(encoding="utf-8")))


def capability_of(name: str) -> Capability:
    major, minor = name.split(".")
    return int(major), int(minor)


def nearest(capability: Capability, tables: Tables) -> Capability | None:
    """The generation whose table counts: of the least distance in major, then in minor numbers, the newer of two."""
    major, minor = capability
    return min(
        tables, key=lambda of: (abs(of[0] - major), abs(of[1] - minor), (-of[0], -of[1])), default=None
    )  # fmt: skip


# a call that no plan knows asks again
@functools.lru_cache(4096)
def choose(capability: Capability, dtype: torch.dtype, asked: LayerPass, able: tuple[str, ...]) -> str:
    """The backend for what is asked, by the packaged tables.  able: what can run here, in the order of ``BACKENDS``."""
    known = tables()
    generation = nearest(capability, known)
    return able[0] if generation is None else fastest(known[generation], dtype, asked, able)


def fastest(table: Table, dtype: torch.dtype, asked: LayerPass, able: Sequence[str]) -> str:
    """The rule's answer from one table."""
    near = _near(table, dtype, asked)
    names = [name for name in able if near and name in near[0][1].wall]
    if not names:
        return next(name for name in able if name in table.backends or name == "eager")
    weighed = [(weight, row.wall) for weight, row in near if all(name in row.wall for name in names)]
    return least(names, lambda name: sum(weight * math.log(wall[name]) for weight, wall in weighed))


def least(names: Sequence[str], time: Callable[[str], float]) -> str:
    return min(names, key=time)


def _near(table: Table, dtype: torch.dtype, asked: LayerPass) -> list[tuple[float, Timed]]:
    """The rows that count and their weights, nearest first."""
    if asked.dropout:
        return []
    sizes = [math.log2(max(size, 1)) for size in (asked.M, asked.K, asked.N, asked.R)]
    found = []
    for row in _alike(table, STEP if asked.gradients else FORWARD, dtype, asked.adapter_dtype):
        apart = (math.log2(size) - wanted for size, wanted in zip(row[2:6], sizes, strict=True))
        found.append((sum(way * way for way in apart), row))
    same = [(1.0, row) for squared, row in found if squared == 0.0]
    return same or [(1.0 / squared, row) for squared, row in sorted(found, key=lambda one: one[0])[:NEAREST]]


def _alike(table: Table, pass_: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> list[Timed]:
    base, adapters = (str(one).removeprefix("torch.") for one in (dtype, adapter_dtype))
    label = base if adapters == base else f"{base}+{adapters}"
    rows = [row for row in table.rows if row.pass_ == pass_]
    likenesses: tuple[Callable[[str], bool], ...] = (
        lambda other: other == label,
        lambda other: other.partition("+")[0] == base,
        lambda other: getattr(torch, other.partition("+")[0]).itemsize == dtype.itemsize,
    )
    found = ([row for row in rows if alike(row.dtype)] for alike in likenesses)
    return next((some for some in found if some), [])


class Served(NamedTuple):
    """From so many tokens to so many, by this backend."""

    first: int
    last: int
    backend: str


def served(table: Table, dtype: torch.dtype, asked: LayerPass, able: Sequence[str]) -> list[Served]:
    """What serves which numbers of tokens, as far as ``TOKENS`` goes, of a layer of which ``asked`` is one pass."""
    found: list[Served] = []
    for M in TOKENS:
        backend = fastest(table, dtype, asked._replace(M=M), able)
        first = M
        if found and found[-1].backend == backend:
            first = found.pop().first
        found.append(Served(first, M, backend))
    return found
