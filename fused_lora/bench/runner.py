"""One group at a time: check every candidate, time the right ones in turn, write down what was measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..backends import environment
from . import measure
from .baselines import CANDIDATES, COMPILED, FROZEN
from .check import Judge
from .groups import Group
from .results import Row
from .roofline import Peak
from .shapes import TRAIN, select
from .workloads import Candidate, LayerWorkload, NetWorkload, Workload


def run_group(workload: Workload, plan: measure.Plan, peak: Peak | None = None, dry: bool = False) -> Group:
    """peak: the GPU's.  dry: take interpreted kernels too, whose times mean nothing."""
    absent = {name: why for name in workload.names if (why := _why_absent(workload, name, dry)) is not None}
    names = [name for name in workload.names if name not in absent]
    about = (workload.pass_, workload.label, workload.dtype, workload.ours())
    try:
        judge = Judge(workload)
    except torch.OutOfMemoryError:
        return Group(*about, [], {}, absent | dict.fromkeys(names, "the float64 truth does not fit in memory"))
    candidates, failed = _check(judge, workload, names)
    return Group(*about, _time(workload, candidates, plan, peak), failed, absent)


def _why_absent(workload: Workload, name: str, dry: bool) -> str | None:
    # what is made for whole models alone is neither
    kernels, first = (recipe.kernels, recipe.first) if (recipe := CANDIDATES.get(name)) is not None else (False, False)
    if kernels and workload.device.type == "cpu" and environment.interpreting() and not dry:
        return "interpreted kernels say nothing about time"
    if name == COMPILED and dry:
        return "its time would mean nothing either, and compiling takes long"
    if first and workload.device.type == "cuda" and not workload.first:
        return "timed in the first shapes alone, to keep the run short"
    return workload.why_not(name)


def _check(judge: Judge, workload: Workload, names: list[str]) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The right candidates, and what is wrong with the others."""
    right, failed = {}, {}
    for name in names:
        try:
            candidate = workload.candidate(name)
            verdict = judge.verdict(name, candidate)
        except Exception as error:
            # foreign code, a compiler, too little memory: it failed, and the others still get their times
            verdict = f"{type(error).__name__}: {error}"
        if verdict is None:
            right[name] = candidate
        else:
            failed[name] = verdict
    return right, failed


def _time(workload: Workload, candidates: dict[str, Candidate], plan: measure.Plan, peak: Peak | None) -> list[Row]:
    if not candidates:
        return []
    calls = {name: candidate.call for name, candidate in candidates.items()}
    clocks = measure.on_every_clock(calls, workload.device, plan)
    measured, rows = clocks.time, []
    for name, candidate in candidates.items():
        time, useful = measured.time(name), workload.useful(name)
        rows.append(
            Row(
                workload.pass_,
                workload.label,
                workload.dtype,
                name,
                len(measured.samples[name]),
                **vars(time),
                ratios={FROZEN: measured.ratio(name, FROZEN)} if FROZEN in calls else {},
                tflops=None if useful is None else useful[0] / time.median * 1e-9,
                gb_per_s=None if useful is None else useful[1] / time.median * 1e-6,
                roofline=None if useful is None or peak is None else peak.share(*useful, time.median),
                saved_bytes=measure.saved_bytes(candidate.call, candidate.parameters),
                peak_bytes=measure.peak_bytes(candidate.call, workload.device),
                inputs=workload.copies,
                wall_ms=None if clocks.wall is None else clocks.wall.time(name).median,
                host_ms=None if clocks.host is None else clocks.host.time(name).median,
                host_hidden=None if clocks.host is None else name not in clocks.exposed,
            )
        )
    return rows


def agenda(
    device: torch.device, dtypes: list[str], passes: list[str], quick: bool, place: str | None = None
) -> list[Callable[[], Workload]]:
    """All that was asked for, most valuable first, yet to be made: tensors exist while their workload is measured.

    place: whose shapes to take, as ``shapes.select`` knows it; the device's own by default.
    """
    wanted: list[Callable[[], Workload]] = []
    shapes = select(place or ("gpu" if device.type == "cuda" else "cpu"), quick)
    for first in (True, False):
        for dtype in dtypes:
            # RichBoyNet trains in float32, as in the demo
            if TRAIN in passes and dtype == "float32" and not first:
                wanted.append(partial(NetWorkload, dtype, device))
            for shape in shapes:
                if ("first" in shape.tags) == first:
                    wanted += [
                        partial(LayerWorkload, pass_, shape, dtype, device) for pass_ in shape.passes if pass_ in passes
                    ]
    return wanted
