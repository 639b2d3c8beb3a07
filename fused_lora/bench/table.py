"""Groups as text: ratios first, losses in plain words."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from .baselines import FROZEN, OURS
from .results import Row
from .runner import Group

CANDIDATE = "candidate"
EXPOSED = "* the host could not be hidden: its time may be in the device's"


@dataclass(frozen=True)
class Standing:
    """Our default candidate against the fastest peer of its group.

    lead: 0.1 is 10 % less time than the peer's.  clear: their p20-p80 ranges do not overlap.
    """

    group: str
    ours: str
    peer: str
    lead: float
    clear: bool

    @property
    def won(self) -> bool:
        return self.clear and self.lead > 0

    @property
    def lost(self) -> bool:
        return self.clear and self.lead < 0

    def __str__(self) -> str:
        if not self.clear:
            return f"{self.ours} is level with {self.peer}, the fastest peer ({self.lead:+.1%}, within the noise)"
        verdict = f"{self.lead:.1%} faster" if self.lead > 0 else f"{-self.lead:.1%} SLOWER"
        return f"{self.ours} is {verdict} than {self.peer}, the fastest peer"


def standing(group: Group, names: Collection[str] | None = None) -> Standing | None:
    """None without a time of ours, or of a peer that does the same work.

    names: the candidates that count as peers; by default all that are not ours.
    """
    ours = next((row for row in group.rows if row.candidate == group.ours), None)
    if names is None:
        names = {row.candidate for row in group.rows if not row.candidate.startswith(OURS)} - {FROZEN}
    peers = [row for row in group.rows if row.candidate in names]
    if ours is None or not peers:
        return None
    best = min(peers, key=pace)
    (_, low, high), (_, peer_low, peer_high) = pace(ours), pace(best)
    lead = 1 - pace(ours)[0] / pace(best)[0]
    return Standing(group.title, ours.candidate, best.candidate, lead, high < peer_low or peer_high < low)


def counts(places: Collection[Standing]) -> tuple[int, int, int]:
    """In how many ours is ahead, level and behind."""
    ahead, behind = sum(place.won for place in places), sum(place.lost for place in places)
    return ahead, len(places) - ahead - behind, behind


def lines(group: Group) -> list[str]:
    """A heading, a line for each candidate, fastest first, and our standing. What no candidate has, has no column."""
    rows = sorted(group.rows, key=pace)
    columns = [[head, *map(cell, rows)] for head, cell in COLUMNS]
    shown = [_padded(cells) for cells in columns if any(cells[1:])]
    text = ["", group.title, *("  ".join(line).rstrip() for line in zip(*shown, strict=True))]
    text += [EXPOSED] if any(row.host_hidden is False for row in rows) else []
    text += [f"RED  {name}  {why}" for name, why in group.red.items()]
    place = standing(group)
    return text if place is None else [*text, str(place)]


def pace(row: Row) -> tuple[float, float, float]:
    """Median, p20, p80 of the ratio, because it was measured side by side; without a baseline, of the time."""
    if row.ratio_to_frozen is None or row.ratio_p20 is None or row.ratio_p80 is None:
        return row.median_ms, row.p20_ms, row.p80_ms
    return row.ratio_to_frozen, row.ratio_p20, row.ratio_p80


def _padded(cells: list[str]) -> list[str]:
    """A head and its cells, as wide as the widest; numbers to the right."""
    width = max(map(len, cells))
    return [cell.ljust(width) if cells[0] == CANDIDATE else (cell or "-").rjust(width) for cell in cells]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _range(low: float | None, high: float | None, form: str) -> str:
    return "" if low is None or high is None else f"{low:{form}}-{high:{form}}"


def milliseconds(row: Row) -> str:
    return f"{row.median_ms:.4g}" + ("*" if row.host_hidden is False else "")


def size(count: float | None) -> str:
    if count is None:
        return "-"
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("÷ frozen", lambda row: _number(row.ratio_to_frozen, ".3f")),
    ("p20-p80", lambda row: _range(row.ratio_p20, row.ratio_p80, ".3f")),
    (CANDIDATE, lambda row: row.candidate),
    ("ms", milliseconds),
    ("p20-p80", lambda row: _range(row.p20_ms, row.p80_ms, ".4g")),
    ("wall ms", lambda row: _number(row.wall_ms, ".4g")),
    ("host", lambda row: _number(row.host_share, ".0%")),
    ("TFLOP/s", lambda row: _number(row.tflops, ".3g")),
    ("GB/s", lambda row: _number(row.gb_per_s, ".3g")),
    ("roofline", lambda row: _number(row.roofline, ".1%")),
    ("saved", lambda row: size(row.saved_bytes) if row.saved_bytes is not None else ""),
    ("peak", lambda row: size(row.peak_bytes) if row.peak_bytes is not None else ""),
)
