"""One fixture: a candidate is checked, measured in turn with its peers, then timed once more by pytest-benchmark."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from fused_lora.bench import measure
from fused_lora.bench.problems import LayerProblem, NetProblem, Problem
from fused_lora.bench.runner import Group, run_group
from fused_lora.bench.shapes import TRAIN, Shape

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--peft-results", type=Path, help="JSON file that test_peft.py writes what it measured to")


@functools.cache
def _measured(work: str, shape: Shape | None, dtype: str) -> tuple[Problem, Group]:
    """Once for all the tests of a group."""
    if work == TRAIN:
        problem: Problem = NetProblem(dtype, DEVICE)
    else:
        assert shape is not None
        problem = LayerProblem(work, shape, dtype, DEVICE)
    return problem, run_group(problem, measure.plan_for(DEVICE, quick=False))


@pytest.fixture
def compete(benchmark) -> Callable[..., None]:
    """``compete(name, work, shape, dtype)``: red if the candidate is wrong, skipped where it can't run."""

    def run(name: str, work: str, shape: Shape | None, dtype: str) -> None:
        problem, group = _measured(work, shape, dtype)
        if name in group.absent:
            pytest.skip(group.absent[name])
        if name in group.red:
            pytest.fail(group.red[name])
        benchmark.group = group.title
        benchmark.extra_info.update(asdict(next(row for row in group.rows if row.candidate == name)))
        benchmark(_until_done(problem.candidate(name).call))

    return run


def _until_done(call: Callable[[], object]) -> Callable[[], None]:
    """pytest-benchmark reads the host's clock, so a GPU must have finished."""

    def done() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return done
