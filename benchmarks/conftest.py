"""One fixture: a candidate is checked, measured in turn with its peers, then timed once more by pytest-benchmark."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from fused_lora.bench import measure
from fused_lora.bench.models import Case, ModelProblem
from fused_lora.bench.problems import LayerProblem, NetProblem, Problem
from fused_lora.bench.results import Environment
from fused_lora.bench.runner import Group, run_group
from fused_lora.bench.shapes import TRAIN, Shape

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="layers of the quick shapes in one dtype, in few rounds")
    parser.addoption("--peft-results", type=Path, help="JSON file that test_peft.py writes what it measured to")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        left_out = [item for item in items if not _is_quick(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if _is_quick(item)]


def _is_quick(item: pytest.Item) -> bool:
    """RichBoyNet, and layers of a quick shape in the first dtype."""
    values = getattr(item, "callspec", None)
    if values is None or "case" in values.params or "compete" not in getattr(item, "fixturenames", ()):
        return False
    shape, dtype = values.params.get("shape"), values.params.get("dtype")
    return shape is None or ("quick" in shape.tags and dtype == ("bfloat16" if DEVICE.type == "cuda" else "float32"))


@functools.cache
def _measured(work: str, shape: Shape | Case | None, dtype: str, quick: bool) -> tuple[Problem, Group]:
    """Once for all the tests of a group."""
    problem: Problem
    if work == TRAIN:
        problem = NetProblem(dtype, DEVICE)
    elif isinstance(shape, Case):
        problem = ModelProblem(shape, DEVICE)
    else:
        assert shape is not None
        problem = LayerProblem(work, shape, dtype, DEVICE)
    return problem, run_group(problem, measure.plan_for(DEVICE, quick))


@pytest.fixture
def compete(benchmark, request: pytest.FixtureRequest) -> Callable[..., None]:
    """``compete(name, work, shape, dtype)``: red if the candidate is wrong, skipped where it can't run."""

    def run(name: str, work: str, shape: Shape | Case | None, dtype: str) -> None:
        problem, group = _measured(work, shape, dtype, request.config.getoption("--quick"))
        if name in group.absent:
            pytest.skip(group.absent[name])
        if name in group.red:
            pytest.fail(group.red[name])
        benchmark.group = group.title
        benchmark.extra_info.update(vars(Environment.here(DEVICE)))
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
