"""Candidates against the rule's choice: checked, then timed in turn; what wins by more than the noise is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..backends.triton.configs import Device
from ..backends.triton.entries import Choice, Entry, class_of
from ..bench.measure import Measurement, Thunk
from ..bench.subjects import Subject, in_one_line
from .candidates import ROUNDS, Round, fitting

Measure = Callable[[Mapping[str, Thunk]], Measurement]
RULE = "rule"
# after it the device computes nothing more in this process; not every supported PyTorch tells it apart
_FATAL = getattr(torch, "AcceleratorError", ())


@dataclass
class Outcome:
    """entry: the winner, or None where the rule's choice is the best that was found.

    failed: why the rule's own choice is wrong, which ends the search.  interrupted: by the user, before its end.
    """

    entry: Entry | None = None
    tried: int = 0
    failed: str | None = None
    interrupted: bool = False


def search(
    subject: Subject, device: Device, measure: Measure, say: Callable[[str], None], rounds: Sequence[Round] = ROUNDS
) -> Outcome:
    """A winner is faster than the rule's choice in most rounds of measuring (80th percentile of the ratios)."""
    outcome = Outcome(failed=_verdict(subject, subject.rule))
    if outcome.failed is not None:
        return outcome
    best, tried = subject.rule, {subject.rule}
    try:
        for choose in rounds:
            right: dict[str, Choice] = {}
            for choice in fitting(choose, subject.problem, device, best, tried):
                tried.add(choice)
                wrong = _verdict(subject, choice)
                if wrong is None:
                    right[in_one_line(choice)] = choice
                else:
                    say(f"      -  {in_one_line(choice)}: {wrong}")
            if not right:
                continue
            if best != subject.rule:
                right[in_one_line(best)] = best
            calls = {name: partial(subject.call, choice) for name, choice in right.items()}
            measured = measure({RULE: partial(subject.call, subject.rule), **calls})
            for name in sorted(right, key=lambda name: measured.time(name).median):
                say(f"  {measured.ratio(name, RULE).median:5.3f}  {name}")
            winner = min(right, key=lambda name: measured.time(name).median)
            if measured.ratio(winner, RULE).p80 < 1:
                best = right[winner]
                times = measured.time(winner).median, measured.time(RULE).median
                outcome.entry = Entry(device.name, device.capability, class_of(subject.problem), best, *times)
    except KeyboardInterrupt:
        outcome.interrupted = True
    outcome.tried = len(tried)
    return outcome


def _verdict(subject: Subject, choice: Choice) -> str | None:
    try:
        return subject.verdict(choice)
    except _FATAL:
        raise
    except Exception as error:
        # a compiler, or too little of something: this candidate's own loss
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
