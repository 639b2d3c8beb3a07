"""Two fixtures: a candidate is checked, measured in turn with the others, and then timed, or weighed, by itself.

The tests of a group stand side by side (``name`` varies first), and its tensors go when another group's turn comes.
"""

from __future__ import annotations

import functools
import gc
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
    parser.addoption("--quick", action="store_true", help="some groups of every kind, in few rounds: two minutes")
    parser.addoption("--peft-results", type=Path, help="results file that test_peft.py writes what it measured to")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[WEIGHED] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        left_out = [item for item in items if not _is_quick(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if _is_quick(item)]


def _is_quick(item: pytest.Item) -> bool:
    """RichBoyNet, with PEFT too, layers of a quick shape in the first dtype, and a model over 4 bits."""
    values = getattr(item, "callspec", None)
    if values is None:
        return False
    made, spec, shape, dtype = (values.params.get(name) for name in ("made", "spec", "shape", "dtype"))
    if made is not None:
        return made.model == "RichBoyNet" and not made.dropout
    if spec is not None:
        return spec.nf4
    if not {"compete", "weigh"} & set(getattr(item, "fixturenames", ())):
        return False
    return shape is None or ("quick" in shape.tags and dtype == ("bfloat16" if DEVICE.type == "cuda" else "float32"))


# the newest alone: a workload holds tensors
_workloads: dict[tuple[str, Shape | NetSpec | None, str], Workload] = {}


def _workload(pass_: str, shape: Shape | NetSpec | None, dtype: str) -> Workload:
    key = pass_, shape, dtype
    if key not in _workloads:
        release()
        _workloads[key] = _make(*key)
    return _workloads[key]


def release() -> None:
    """Let go of what the last group held: its tensors, and what was compiled for it."""
    _workloads.clear()
    torch.compiler.reset()
    gc.collect()


def _make(pass_: str, shape: Shape | NetSpec | None, dtype: str) -> Workload:
    if pass_ == TRAIN:
        return NetWorkload(dtype, DEVICE)
    if isinstance(shape, NetSpec):
        return ModelWorkload(shape, DEVICE)
    assert shape is not None
    return LayerWorkload(pass_, shape, dtype, DEVICE)


@functools.cache
def _measured(pass_: str, shape: Shape | NetSpec | None, dtype: str, quick: bool) -> Group:
    """Once for all the tests of a group."""
    plan = measure.plan_for(DEVICE, quick)
    return run_group(_workload(pass_, shape, dtype), replace(plan, seconds=min(plan.seconds, GROUP_SECONDS)))


def _row(name: str, group: Group) -> Row:
    """What was measured of a candidate. Skips where it can't run, with the reason, and fails where it is wrong."""
    if name in group.failed:
        pytest.fail(group.failed[name])
    for row in group.rows:
        if row.candidate == name:
            return row
    pytest.skip(group.absent.get(name, f"{group.short_title} has no candidate {name}"))


@pytest.fixture
def compete(benchmark, request: pytest.FixtureRequest) -> Callable[..., None]:
    """``compete(name, pass_, shape, dtype)``: fails if the candidate is wrong, skipped where it can't run."""

    def run(name: str, pass_: str, shape: Shape | NetSpec | None, dtype: str) -> None:
        if isinstance(shape, NetSpec) and (why := shape.why_not()) is not None:
            pytest.skip(why)
        row = _row(name, _measured(pass_, shape, dtype, request.config.getoption("--quick")))
        benchmark.group = f"{HEADINGS.get(pass_, pass_)}  {row.shape}  {dtype}"
        benchmark.extra_info.update(vars(Environment.here(DEVICE)) | row.as_json())
        call = _workload(pass_, shape, dtype).candidate(name).call
        call()
        rounds = int(min(max(MOST_MS / row.median, FEWEST), MOST))
        benchmark.pedantic(_until_done, setup=lambda: (tuple(measure.ready(call, 1)), {}), rounds=rounds)

    return run


@pytest.fixture
def weigh(benchmark, request: pytest.FixtureRequest) -> Callable[..., None]:
    """``weigh(name, pass_, shape, dtype)``: the bytes that it takes, for the table at the end; its time is one."""

    def run(name: str, pass_: str, shape: Shape, dtype: str) -> None:
        row = _row(name, _measured(pass_, shape, dtype, request.config.getoption("--quick")))
        benchmark.group = f"memory  {row.shape}  {dtype}"
        benchmark.extra_info.update(vars(Environment.here(DEVICE)) | row.as_json())
        request.config.stash[WEIGHED].setdefault(benchmark.group, []).append(row)
        benchmark.pedantic(_until_done, args=(_workload(pass_, shape, dtype).candidate(name).call,), rounds=1)

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
