"""What the tuner tries: the lists that the rules choose from, then neighbours of what won so far, then schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

from ..backends.triton.configs import (
    MIN_DOT,
    DecodeConfig,
    Device,
    Problem,
    ReductionConfig,
    ReductionProblem,
    Schedule,
    ScheduleConfig,
    TileConfig,
    candidate_tiles,
    default_schedule,
)
from ..backends.triton.decode_configs import candidate_decodes, split_decode
from ..backends.triton.entries import Choice, Reduced, Tiled, check
from ..backends.triton.tuned import why_not

Config = TypeVar("Config", TileConfig, DecodeConfig, ReductionConfig)
Round = Callable[[Problem | ReductionProblem, Device, Choice], Iterable[Choice]]


def starts(problem: Problem | ReductionProblem, device: Device, best: Choice) -> Iterator[Choice]:
    """The rules' lists, whichever of them the rule took; the rule for reductions has none."""
    if isinstance(problem, ReductionProblem):
        yield from neighbours(problem, device, best)
        return
    for config in candidate_decodes(problem, device):
        yield split_decode(config, problem, device)
    for tile in candidate_tiles(problem, device):
        yield Tiled(tile, default_schedule(problem, tile, device))


def neighbours(problem: Problem | ReductionProblem, device: Device, best: Choice) -> Iterator[Choice]:
    """One number of the best so far made larger or smaller."""
    if isinstance(best, Tiled):
        for tile in _around(best.tile, "num_stages", "num_warps", "BLOCK_Q", "BLOCK_P", "BLOCK_M", "GROUP_M"):
            yield Tiled(tile, default_schedule(problem, tile, device))  # type: ignore[arg-type]
    elif isinstance(best, Reduced):
        for config in _around(best.config, "num_stages", "num_warps", "BLOCK_M", "BLOCK_C"):
            yield Reduced(config, best.parts)
        yield from (replace(best, parts=parts) for parts in _halved_and_doubled(best.parts))
    else:
        yield from _around(best, "num_stages", "num_warps", "BLOCK_Q", "BLOCK_P", "ROWS", "SPLIT", "SPLIT_H")


def schedules(problem: Problem | ReductionProblem, device: Device, best: Choice) -> Iterator[Choice]:
    """Every other way to share h and to load, in the best tile."""
    if isinstance(best, Tiled):
        found = [ScheduleConfig(kind) for kind in (Schedule.PUBLISH, Schedule.RECOMPUTE)]
        found += [ScheduleConfig(Schedule.PRODUCE, split) for split in (1, 2, 4, 8)]
        for schedule in found:
            yield from (Tiled(best.tile, replace(schedule, descriptors=loads)) for loads in (False, True))


# one after the other, each around the best of those before
ROUNDS: tuple[Round, ...] = (starts, neighbours, schedules)


def fitting(
    choose: Round, problem: Problem | ReductionProblem, device: Device, best: Choice, tried: set[Choice]
) -> list[Choice]:
    """A round's choices that this GPU takes and that were not tried before."""
    choices = dict.fromkeys(choose(problem, device, best))
    return [choice for choice in choices if choice not in tried and _fits(choice, problem, device)]


def _fits(choice: Choice, problem: Problem | ReductionProblem, device: Device) -> bool:
    try:
        check(choice)
    except ValueError:
        return False
    return why_not(choice, problem, device) is None


def _around(config: Config, *names: str) -> Iterator[Config]:
    for name in names:
        value = getattr(config, name)
        if name == "num_stages":
            values = [value - 1, value + 1] if value > 1 else [value + 1]
        else:
            values = _halved_and_doubled(value, MIN_DOT if name == "ROWS" or name.startswith("BLOCK_") else 1)
        for other in values:
            yield replace(config, **{name: other})


def _halved_and_doubled(value: int, least: int = 1) -> list[int]:
    return [other for other in (value // 2, value * 2) if other >= least]
