"""A results file read back as the groups that were measured, in the order in which they were."""

from __future__ import annotations

import re

from .baselines import OURS, PEERS, SCHEDULES
from .results import Results, Row
from .runner import Group


def is_gpu(results: Results) -> bool:
    return results.environment.cuda_version is not None


def has_wall(results: Results) -> bool:
    """Whether device and wall were timed apart."""
    return any(row.wall_ms is not None for row in results.rows)


def tokens_of(group: Group) -> int:
    """M of a layer's group."""
    found = re.search(r"\bM=(\d+)", group.title)
    assert found is not None, group.title
    return int(found[1])


def our_default(results: Results) -> str:
    """The candidate that ``impl="auto"`` means where the results come from."""
    built = any(row.candidate == f"{OURS}native" for row in results.rows)
    return OURS + ("triton" if is_gpu(results) else "native" if built else "eager")


def groups_of(results: Results) -> list[Group]:
    rows: dict[tuple[str, str, str], list[Row]] = {}
    for row in results.rows:
        rows.setdefault(row.group, []).append(row)
    ours = our_default(results)
    return [Group("  ".join(group), ours, found, {}, {}) for group, found in rows.items()]


def candidates_of(results: Results) -> list[str]:
    """Those that have a time anywhere in the file, in the order of PEERS. Only full tables have imposed schedules."""
    found = {row.candidate for row in results.rows} - set(SCHEDULES)
    return [name for name in PEERS if name in found] + sorted(found - set(PEERS))
