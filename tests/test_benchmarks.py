"""``pytest benchmarks/``: what is said of a candidate without a time, what the short form runs, what a group holds."""

import gc
import importlib.util
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from fused_lora.bench.groups import Group
from fused_lora.bench.results import Row
from fused_lora.bench.shapes import BACKWARD, FORWARD, Shape

ROOT = Path(__file__).parents[1]
SHAPE = Shape("small", 4, 8, 12, 2, ("cpu",))


@pytest.fixture(scope="module")
def benchmarks():
    """benchmarks/conftest.py."""
    spec = importlib.util.spec_from_file_location("benchmarks_conftest", ROOT / "benchmarks" / "conftest.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def group(**fields):
    row = Row("step", "a shape (M=1)", "float32", "frozen", 3, 1.0, 0.9, 1.1)
    return Group("step", "a shape (M=1)", "float32", "ours-eager", [row], **fields)


def test_a_candidate_without_a_time_is_skipped_with_its_reason_and_a_wrong_one_fails(benchmarks):
    assert benchmarks._row("frozen", group()).candidate == "frozen"
    with pytest.raises(pytest.skip.Exception, match="PEFT does not import"):
        benchmarks._row("peft", group(absent={"peft": "PEFT does not import"}))
    with pytest.raises(pytest.skip.Exception, match="step  a shape  float32 has no candidate full"):
        benchmarks._row("full", group())
    with pytest.raises(pytest.fail.Exception, match="is off by"):
        benchmarks._row("peft", group(failed={"peft": "dA is off by 1"}))


def test_a_groups_tensors_go_before_the_next_groups_come(benchmarks):
    workload = benchmarks._workload(FORWARD, SHAPE, "float32")
    assert benchmarks._workload(FORWARD, SHAPE, "float32") is workload
    workload.candidate("ours-eager").call()
    held = weakref.ref(workload.weights.weight)
    del workload
    benchmarks._workload(BACKWARD, SHAPE, "float32")
    gc.collect()
    assert held() is None
    benchmarks.release()


def test_the_short_form_has_groups_of_every_kind():
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--quick", "--collect-only", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in ("test_forward", "test_backward", "test_step", "test_decode", "test_memory", "NF4", "test_peft.py",
                 "test_richboynet.py"):  # fmt: skip
        assert kind in done.stdout, kind
    assert len(re.findall("::test_", done.stdout)) < 250
