"""A run from its agenda to its file: most valuable first, saved after each group, ended when its time is up."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from . import measure, runner, table
from .groups import Group, Tally
from .results import ResultsFile
from .roofline import peak_of
from .workloads import Workload

Make = Callable[[], Workload]


def compete(
    agenda: list[Make],
    file: ResultsFile,
    path: Path | None,
    plan: measure.Plan,
    deadline: float = math.inf,
    dry: bool = False,
    after: Callable[[list[Group]], None] | None = None,
) -> int:
    """0 when every candidate was right, 1 when one was not, 130 when interrupted.

    deadline: no group is started after it, by ``time.monotonic``. The file says that it is not complete until it is.
    after: called with what was measured, at the end.
    """
    groups: list[Group] = []
    environment, interrupted = file.environment, False
    print(f"{environment}, {environment.date}")
    steps, write, say = _progress(agenda)
    file.complete = False
    try:
        for make in steps:
            if time.monotonic() >= deadline:
                break
            workload = make()
            say(f"{workload.pass_} {workload.label.partition(' (')[0]} {workload.dtype}")
            group = runner.run_group(workload, plan, peak_of(environment.device, workload.dtype), dry)
            groups.append(group)
            file.add(group.rows)
            file.complete = len(groups) == len(agenda)
            if path is not None:
                file.save(path)
            write("\n".join(table.lines(group)))
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted", file=sys.stderr)
    conclude(groups, path)
    if after is not None:
        after(groups)
    if len(groups) < len(agenda):
        print(f"INCOMPLETE: {len(agenda) - len(groups)} of {len(agenda)} groups were not measured")
    return 130 if interrupted else 1 if any(group.failed for group in groups) else 0


def conclude(groups: list[Group], path: Path | None) -> None:
    """Who was ahead, what was not timed, and where it is saved."""
    tally = Tally.of(groups)
    counts = f"{tally.ahead} faster, {tally.level} level, {tally.behind} SLOWER"
    print(f"\nours against the fastest baseline, in {len(tally.places)} groups: {counts}")
    for place in tally.lost:
        print(f"  {place.group.title}: {place}")
    absent: dict[str, dict[str, None]] = {}
    for name, why in (pair for group in groups for pair in group.absent.items()):
        absent.setdefault(why, {})[name] = None
    for why, names in absent.items():
        print(f"not timed: {', '.join(names)}: {why}")
    for group in groups:
        for name, why in group.failed.items():
            print(f"FAILED, so without a time: {group.title}: {name}: {why}")
    print("not saved: --out FILE saves" if path is None else f"saved: {path}")


def _progress(agenda: list[Make]) -> tuple[Iterable[Make], Callable[[str], None], Callable[[str], None]]:
    """The agenda with a bar on the terminal, how to print beside it, and how to say there what is being done.

    No bar where tqdm is not installed, or stderr is not a terminal.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return agenda, print, lambda text: None
    bar = tqdm(agenda, unit="group", leave=False, disable=None, dynamic_ncols=True)
    return bar, tqdm.write, bar.set_description
