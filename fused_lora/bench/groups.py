"""A results file as groups, and who is ahead in them: standings are computed here and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from .baselines import CANDIDATES, FROZEN, OURS_PREFIX, SCHEDULES
from .results import ResultsFile, Row, Spread
from .shapes import DEQUANTIZE


@dataclass(frozen=True)
class Group:
    """The results of a workload, without tensors. ours: the candidate of ours that standings are about.

    failed: candidates that are wrong, and how.  absent: those that can't run here, and why.
    """

    pass_: str
    shape: str
    dtype: str
    ours: str
    rows: list[Row]
    failed: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.pass_}  {self.shape}  {self.dtype}"

    @property
    def short_title(self) -> str:
        """Without the shape's sizes."""
        return f"{self.pass_}  {self.shape.partition(' (')[0]}  {self.dtype}"

    @property
    def tokens(self) -> int:
        """M of a layer's group."""
        found = re.search(r"\bM=(\d+)", self.shape)
        assert found is not None, self.shape
        return int(found[1])


def is_gpu(file: ResultsFile) -> bool:
    return file.environment.cuda_version is not None


def has_wall(file: ResultsFile) -> bool:
    """Whether device and wall were timed apart."""
    return any(row.wall_ms is not None for row in file.rows)


def our_default(file: ResultsFile) -> str:
    """The candidate that standings are about: what ``impl="auto"`` takes on a CPU; on a GPU, where that is chosen by
    size, the fused kernels."""
    built = any(row.candidate == f"{OURS_PREFIX}native" for row in file.rows)
    return OURS_PREFIX + ("triton" if is_gpu(file) else "native" if built else "eager")


def groups_of(file: ResultsFile) -> list[Group]:
    """In the order in which they were measured."""
    rows: dict[tuple[str, str, str], list[Row]] = {}
    for row in file.rows:
        rows.setdefault(row.group, []).append(row)
    ours = our_default(file)
    return [Group(*group, ours, found) for group, found in rows.items()]


def candidates_of(rows: Iterable[Row]) -> list[str]:
    """Those that have a time, in the order of CANDIDATES. Only full tables have imposed schedules, and weights."""
    found = {row.candidate for row in rows if row.pass_ != DEQUANTIZE} - set(SCHEDULES)
    return [name for name in CANDIDATES if name in found] + sorted(found - set(CANDIDATES))


# --------------------------------------------------------------------------------------------------
# Standings
# --------------------------------------------------------------------------------------------------


def pace(row: Row) -> Spread:
    """The ratio to the frozen baseline, because it was measured side by side; where there is none, the time."""
    return row.ratio or Spread(row.median, row.p20, row.p80)


def wall(row: Row) -> Spread | None:
    """What a user waits, where it was timed."""
    return None if row.wall_ms is None else Spread(row.wall_ms, row.wall_ms, row.wall_ms)


@dataclass(frozen=True)
class Standing:
    """Our candidate against the fastest baseline of its group.

    lead: 0.1 is 10 % less time than the baseline's.  clear: their p20-p80 ranges do not overlap.
    """

    group: Group
    baseline: str
    lead: float
    clear: bool

    @property
    def won(self) -> bool:
        return self.clear and self.lead > 0

    @property
    def lost(self) -> bool:
        return self.clear and self.lead < 0

    def __str__(self) -> str:
        ours, noise = self.group.ours, f"({self.lead:+.1%}, within the noise)"
        if not self.clear:
            return f"{ours} is level with {self.baseline}, the fastest baseline {noise}"
        verdict = f"{self.lead:.1%} faster" if self.lead > 0 else f"{-self.lead:.1%} SLOWER"
        return f"{ours} is {verdict} than {self.baseline}, the fastest baseline"


def standing(
    group: Group, baselines: Collection[str] | None = None, clock: Callable[[Row], Spread | None] = pace
) -> Standing | None:
    """None without a time of ours, or of a baseline.

    baselines: the candidates that count as such; by default all that do the same and are not ours.
    """
    if baselines is None:
        baselines = {row.candidate for row in group.rows if not row.candidate.startswith(OURS_PREFIX)} - {FROZEN}
    times = {row.candidate: spread for row in group.rows if (spread := clock(row)) is not None}
    others = {name: times[name] for name in baselines if name in times}
    if group.ours not in times or not others:
        return None
    best = min(others, key=lambda name: others[name].median)
    mine, other = times[group.ours], others[best]
    clear = mine.p80 < other.p20 or other.p80 < mine.p20
    return Standing(group, best, 1 - mine.median / other.median, clear)


@dataclass(frozen=True)
class Tally:
    """Every group's standing, and in how many of them ours is ahead, level and behind."""

    places: Sequence[Standing]

    @classmethod
    def of(
        cls, groups: Iterable[Group], baselines: Collection[str] | None = None,
        clock: Callable[[Row], Spread | None] = pace, ours: str | None = None,
    ) -> Tally:  # fmt: skip
        """ours: another candidate than the default, in its place."""
        chosen = (group if ours is None else replace(group, ours=ours) for group in groups)
        return cls([place for group in chosen if (place := standing(group, baselines, clock)) is not None])

    @property
    def won(self) -> list[Standing]:
        return [place for place in self.places if place.won]

    @property
    def lost(self) -> list[Standing]:
        return [place for place in self.places if place.lost]

    @property
    def ahead(self) -> int:
        return len(self.won)

    @property
    def behind(self) -> int:
        return len(self.lost)

    @property
    def level(self) -> int:
        return len(self.places) - self.ahead - self.behind
