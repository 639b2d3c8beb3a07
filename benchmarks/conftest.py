"""Two fixtures: a candidate is checked, measured in turn with the others, and then timed, or weighed, by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fused_lora.bench import measure, table
from fused_lora.bench.groups import Group
from fused_lora.bench.nets import NetSpec
from fused_lora.bench.results import Environment, Row
from fused_lora.bench.runner import run_group
from fused_lora.bench.shapes import TRAIN, Shape
from fused_lora.bench.workloads import LayerWorkload, NetWorkload, Workload
from tools.models import MODEL, ModelWorkload

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# what pytest-benchmark's tables are headed by, where it is not the pass's own name
HEADINGS = {TRAIN: "whole model", MODEL: "whole model"}
MOST_MS, FEWEST, MOST = 200.0, 3, 100
# for the rounds of a group, where `fused-lora bench` takes more: there are many groups
GROUP_SECONDS = 2.0
WEIGHED = pytest.StashKey[dict[str, list[Row]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="layers of the quick shapes in one dtype, in few rounds")
    parser.addoption("--peft-results", type=Path, help="results file that test_peft.py writes what it measured to")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[WEIGHED] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        left_out = [item for item in items if not _is_quick(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if _is_quick(item)]


def _is_quick(item: pytest.Item) -> bool:
    """RichBoyNet, and layers of a quick shape in the first dtype."""
    values = getattr(item, "callspec", None)
    if values is None or "spec" in values.params or not {"compete", "weigh"} & set(getattr(item, "fixturenames", ())):
        return False
    shape, dtype = values.params.get("shape"), values.params.get("dtype")
    return shape is None or ("quick" in shape.tags and dtype == ("bfloat16" if DEVICE.type == "cuda" else "float32"))


@functools.cache
def _measured(pass_: str, shape: Shape | NetSpec | None, dtype: str, quick: bool) -> tuple[Workload, Group]:
    """Once for all the tests of a group."""
    workload: Workload
    if pass_ == TRAIN:
        workload = NetWorkload(dtype, DEVICE)
    elif isinstance(shape, NetSpec):
        workload = ModelWorkload(shape, DEVICE)
    else:
        assert shape is not None
        workload = LayerWorkload(pass_, shape, dtype, DEVICE)
    plan = measure.plan_for(DEVICE, quick)
    return workload, run_group(workload, replace(plan, seconds=min(plan.seconds, GROUP_SECONDS)))


def _row(name: str, group: Group) -> Row:
    """What was measured of a candidate. Skips where it can't run, fails where it is wrong."""
    if name in group.absent:
        pytest.skip(group.absent[name])
    if name in group.failed:
        pytest.fail(group.failed[name])
    return next(row for row in group.rows if row.candidate == name)


@pytest.fixture
def compete(benchmark, request: pytest.FixtureRequest) -> Callable[..., None]:
    """``compete(name, pass_, shape, dtype)``: fails if the candidate is wrong, skipped where it can't run."""

    def run(name: str, pass_: str, shape: Shape | NetSpec | None, dtype: str) -> None:
        workload, group = _measured(pass_, shape, dtype, request.config.getoption("--quick"))
        row = _row(name, group)
        benchmark.group = f"{HEADINGS.get(pass_, pass_)}  {row.shape}  {dtype}"
        benchmark.extra_info.update(vars(Environment.here(DEVICE)) | row.as_json())
        call = workload.candidate(name).call
        call()
        rounds = int(min(max(MOST_MS / row.median, FEWEST), MOST))
        benchmark.pedantic(_until_done, setup=lambda: (tuple(measure.ready(call, 1)), {}), rounds=rounds)

    return run


@pytest.fixture
def weigh(benchmark, request: pytest.FixtureRequest) -> Callable[..., None]:
    """``weigh(name, pass_, shape, dtype)``: the bytes that it takes, for the table at the end; its time is one."""

    def run(name: str, pass_: str, shape: Shape, dtype: str) -> None:
        workload, group = _measured(pass_, shape, dtype, request.config.getoption("--quick"))
        row = _row(name, group)
        benchmark.group = f"memory  {row.shape}  {dtype}"
        benchmark.extra_info.update(vars(Environment.here(DEVICE)) | row.as_json())
        request.config.stash[WEIGHED].setdefault(benchmark.group, []).append(row)
        benchmark.pedantic(_until_done, args=(workload.candidate(name).call,), rounds=1)

    return run


def _until_done(call: Callable[[], object]) -> None:
    """pytest-benchmark reads the host's clock, so a GPU must have finished."""
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for title, rows in config.stash[WEIGHED].items():
        terminalreporter.write_line(f"\n{title}\n{'candidate':<16}{'kept for backward':>20}{'peak of a step':>18}")
        for row in sorted(rows, key=lambda row: (row.peak_bytes, row.saved_bytes)):
            kept, peak = table.size(row.saved_bytes), table.size(row.peak_bytes)
            terminalreporter.write_line(f"{row.candidate:<16}{kept:>20}{peak:>18}")
