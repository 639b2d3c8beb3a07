"""Groups as text: ratios first, losses in plain words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..models import overview
from .groups import Group, pace, standing
from .results import Row, Spread

CANDIDATE, NOTHING = "candidate", "–"
EXPOSED = "* the host could not be hidden: its time may be in the device's"


def lines(group: Group) -> list[str]:
    """A heading, a line for each candidate, fastest first, and our standing."""
    heads, rows = cells(group.rows)
    columns = [_padded(column) for column in zip(heads, *rows, strict=True)]
    text = ["", group.title, *("  ".join(line).rstrip() for line in zip(*columns, strict=True))]
    text += [EXPOSED] if any(row.host_hidden is False for row in group.rows) else []
    text += [f"FAILED  {name}  {why}" for name, why in group.failed.items()]
    place = standing(group)
    return text if place is None else [*text, str(place)]


def cells(rows: Iterable[Row]) -> tuple[list[str], list[list[str]]]:
    """Heads, and a line for each row, fastest first. What no row has, has no column."""
    rows = sorted(rows, key=lambda row: pace(row).median)
    columns = [(head, [cell(row) for row in rows]) for head, cell in COLUMNS]
    shown = [(head, column) for head, column in columns if any(column)]
    lines = zip(*(column for _, column in shown), strict=True)
    return [head for head, _ in shown], [[cell or NOTHING for cell in line] for line in lines]


def markdown(heads: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A table of a page."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _padded(column: Sequence[str]) -> list[str]:
    """A head and its cells, as wide as the widest; numbers to the right."""
    width = max(map(len, column))
    return [cell.ljust(width) if column[0] == CANDIDATE else cell.rjust(width) for cell in column]


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _range(spread: Spread | None, spec: str) -> str:
    return "" if spread is None else f"{spread.p20:{spec}}–{spread.p80:{spec}}"


def milliseconds(row: Row) -> str:
    return f"{row.median:.4g}" + ("*" if row.host_hidden is False else "")


def size(count: float | None) -> str:
    """Of bytes."""
    return "" if count is None else overview.size(count)


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    (CANDIDATE, lambda row: row.candidate),
    ("÷ frozen", lambda row: "" if row.ratio is None else f"{row.ratio.median:.3f}"),
    ("p20–p80", lambda row: _range(row.ratio, ".3f")),
    ("ms", milliseconds),
    ("p20–p80, ms", lambda row: _range(Spread(row.median, row.p20, row.p80), ".4g")),
    ("wall ms", lambda row: _number(row.wall_ms, ".4g")),
    ("host", lambda row: _number(row.host_share, ".0%")),
    ("rounds", lambda row: str(row.rounds)),
    ("TFLOP/s", lambda row: _number(row.tflops, ".3g")),
    ("GB/s", lambda row: _number(row.gb_per_s, ".3g")),
    ("roofline", lambda row: _number(row.roofline, ".1%")),
    ("saved", lambda row: size(row.saved_bytes)),
    ("peak", lambda row: size(row.peak_bytes)),
)
