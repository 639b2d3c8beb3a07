"""One group at a time: check every candidate, time the right ones in turn, write down what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ..backends import environment
from . import measure
from .baselines import COMPILED, FROZEN, PARAMETRIZE, PEERS
from .check import Judge
from .problems import Candidate, LayerProblem, NetProblem, Problem
from .results import Row
from .roofline import Peak
from .shapes import TRAIN, select


@dataclass(frozen=True)
class Group:
    """What came of a problem; no tensors. ours: the candidate that a user of ours gets by default.

    red: candidates that are wrong, and how.  absent: those that can't run here, and why.
    """

    title: str
    ours: str
    rows: list[Row]
    red: dict[str, str]
    absent: dict[str, str]


def run_group(problem: Problem, plan: measure.Plan, peak: Peak | None = None, dry: bool = False) -> Group:
    """peak: the GPU's.  dry: take interpreted kernels too, whose times mean nothing."""
    absent = {name: why for name in problem.names if (why := _why_absent(problem, name, dry)) is not None}
    title, names = f"{problem.work}  {problem.label}  {problem.dtype}", [n for n in problem.names if n not in absent]
    try:
        candidates, red = _check(problem, names)
    except torch.OutOfMemoryError:
        return Group(
            title, problem.ours(), [], {}, absent | dict.fromkeys(names, "the float64 truth does not fit in memory")
        )
    return Group(title, problem.ours(), _time(problem, candidates, plan, peak), red, absent)


def _why_absent(problem: Problem, name: str, dry: bool) -> str | None:
    # what is made for whole models alone is neither
    kernels, first = (peer.kernels, peer.first) if (peer := PEERS.get(name)) is not None else (False, False)
    if kernels and problem.device.type == "cpu" and environment.interpreting() and not dry:
        return "interpreted kernels say nothing about time"
    if name == COMPILED and dry:
        return "its time would mean nothing either, and compiling takes long"
    if first and problem.device.type == "cuda" and not problem.first:
        return "timed in the first shapes alone, to keep the run short"
    return problem.why_not(name)


def _check(problem: Problem, names: list[str]) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The right candidates, and what is wrong with the others."""
    judge = Judge(problem)
    right, red = {}, {}
    for name in names:
        try:
            candidate = problem.candidate(name)
            verdict = judge.verdict(name, candidate)
        except Exception as error:
            # foreign code, a compiler, too little memory: its own red line, and the others still get their times
            verdict = f"{type(error).__name__}: {error}"
        if verdict is None:
            right[name] = candidate
        else:
            red[name] = verdict
    return right, red


def _time(problem: Problem, candidates: dict[str, Candidate], plan: measure.Plan, peak: Peak | None) -> list[Row]:
    if not candidates:
        return []
    calls = {name: candidate.call for name, candidate in candidates.items()}
    clocks = measure.on_every_clock(calls, problem.device, plan)
    measured, rows = clocks.time, []
    for name, candidate in candidates.items():
        time = measured.time(name)
        ratio = measured.ratio(name, FROZEN) if FROZEN in calls else None
        useful = problem.useful(name)
        rows.append(
            Row(
                work=problem.work,
                shape=problem.label,
                dtype=problem.dtype,
                candidate=name,
                rounds=len(measured.samples[name]),
                median_ms=time.median,
                p20_ms=time.p20,
                p80_ms=time.p80,
                ratio_to_frozen=None if ratio is None else ratio.median,
                ratio_p20=None if ratio is None else ratio.p20,
                ratio_p80=None if ratio is None else ratio.p80,
                ratio_to_parametrize=measured.ratio(name, PARAMETRIZE).median if PARAMETRIZE in calls else None,
                tflops=None if useful is None else useful[0] / time.median * 1e-9,
                gb_per_s=None if useful is None else useful[1] / time.median * 1e-6,
                roofline=None if useful is None or peak is None else peak.share(*useful, time.median),
                saved_bytes=measure.saved_bytes(candidate.call, candidate.parameters),
                peak_bytes=measure.peak_bytes(candidate.call, problem.device),
                inputs=problem.copies,
                wall_ms=None if clocks.wall is None else clocks.wall.time(name).median,
                host_ms=None if clocks.host is None else clocks.host.time(name).median,
                host_hidden=None if clocks.host is None else name not in clocks.exposed,
            )
        )
    return rows


def agenda(
    device: torch.device, dtypes: list[str], works: list[str], quick: bool, place: str | None = None
) -> list[Callable[[], Problem]]:
    """All that was asked for, most valuable first, yet to be made: tensors exist while their problem is measured.

    place: whose shapes to take, as ``shapes.select`` knows it; the device's own by default.
    """
    wanted: list[Callable[[], Problem]] = []
    shapes = select(place or ("gpu" if device.type == "cuda" else "cpu"), quick)
    for first in (True, False):
        for dtype in dtypes:
            # RichBoyNet trains in float32, as in the demo
            if TRAIN in works and dtype == "float32" and not first:
                wanted.append(partial(NetProblem, dtype, device))
            for shape in shapes:
                if ("first" in shape.tags) == first:
                    wanted += [
                        partial(LayerProblem, work, shape, dtype, device) for work in shape.works if work in works
                    ]
    return wanted
