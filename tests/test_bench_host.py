"""``fused-lora bench --host``: that it measures what it says, over Triton's real launcher; its times are not tested."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fused_lora import bench
from fused_lora.bench.host import parts, stub
from fused_lora.bench.results import Environment
from fused_lora.bench.shapes import FORWARD, STEP
from tools import host_page

ROOT = Path(__file__).parents[1]
KERNELS = (parts.DECODE, parts.TILE, parts.DESCRIPTORS)
needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None and "CC" not in os.environ, reason="no C compiler")


@pytest.fixture(scope="module")
def installed(tmp_path_factory, extension_library):
    """The package with its extension, as a wheel installs them: no checkout around it."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "fused_lora", site / "fused_lora", ignore=shutil.ignore_patterns("__pycache__"))
    if extension_library is not None:
        shutil.copy(extension_library, site / "fused_lora")
    return site


@pytest.fixture(scope="module")
def measured(installed):
    """Its output, and the file that it wrote."""
    out = installed / "host.json"
    command = [
        sys.executable,
        "-m",
        "fused_lora.cli",
        "bench",
        "--host",
        "--quick",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    # interpreted kernels have no launcher: what the tests are told must not reach it
    environment = {**os.environ, "PYTHONPATH": str(installed), "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=installed, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


@needs_compiler
def test_the_last_line_is_three_ratios(measured):
    stdout, results = measured
    ratios = json.loads(stdout.splitlines()[-1])
    assert list(ratios) == ["triton_forward", "triton_step", "native_forward"]
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios.values())
    assert ratios == parts.ratios(results)


@needs_compiler
def test_kernels_go_through_the_launcher_to_the_stub(measured):
    settings = measured[1]["settings"]
    assert settings["driver"] == "stub"
    assert settings["launches"] > 1000
    for kernel in KERNELS:
        assert settings["counted"][f"{kernel} {FORWARD}"]["launches"] == 1
        # of the forward, the gradient of x, and those of A and B
        assert settings["counted"][f"{kernel} {STEP}"]["launches"] == 3
        assert settings["counted"][f"{kernel} {FORWARD}"]["allocations"] >= 2


@needs_compiler
def test_every_part_has_its_time_and_the_path_is_the_whole_call(measured):
    results = measured[1]
    assert Environment(**results["environment"]).threads == 1
    for row in results["rows"]:
        assert 0 < row["p20"] <= row["median"] <= row["p80"] < math.inf
        assert all(0 < ratio["median"] < math.inf for ratio in row["ratios"].values())
    for kernel in KERNELS:
        path = parts.path(results, kernel)
        assert tuple(path) == parts.PATH
        assert sum(path.values()) == pytest.approx(parts.rows_of(results, FORWARD, kernel)[parts.LAYER]["median"])


@needs_compiler
def test_the_page_has_what_the_file_has(measured):
    results = measured[1]
    page = host_page.tables({"some.json": results})
    assert "a stub of the driver" in page
    assert "`host/some.json`" in page
    times = [parts.rows_of(results, STEP, kernel)[parts.FULL]["median"] for kernel in KERNELS]
    assert f"| the bare linear, W trained | {' | '.join(format(time, '.1f') for time in times)} |" in page


def some_results(jit_runs, operators):
    times = {"layer": 50, "lora_linear": 45, "operator": 38, "launch.lora_matmul": 30, "JITFunction.run": 14}
    times |= {"launcher": 2, "allocator": 3}
    row = {"pass": FORWARD, "shape": "tile (M=512)"}
    counted = {f"tile {FORWARD}": {"jit_runs": jit_runs, "operators": operators}}
    rows = [{**row, "candidate": part, "median": us} for part, us in times.items()]
    return {"rows": rows, "settings": {"counted": counted}}


def test_a_call_pays_only_for_what_it_goes_through():
    assert list(parts.path(some_results(1, 1), "tile").values()) == [5, 7, 8, 13, 3, 14]
    assert list(parts.path(some_results(0, 0), "tile").values()) == [5, 15, 0, 25, 3, 2]


def test_without_the_extension_its_ratio_is_null():
    baseline = {"three GEMMs": {"median": 2.0}, "eager": {"median": 3.0}, "F.linear": {"median": 1.0}}
    row = {"shape": "decode (M=1)", "candidate": "layer", "ratios": baseline}
    linear = {"pass": FORWARD, "shape": "native (M=32)", "candidate": "F.linear", "ratios": baseline}
    rows = [{**row, "pass": FORWARD}, {**row, "pass": STEP}, linear]
    expected = {"triton_forward": 2.0, "triton_step": 3.0, "native_forward": None}
    assert parts.ratios({"rows": rows}) == expected


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        (None, "without a GPU a C compiler must be installed, gcc or clang, or named by CC"),
        ("/nowhere/cc", "the C compiler '/nowhere/cc' does not start"),
        ("false", "the C compiler 'false' fails on the stub"),
    ],
)
def test_a_missing_compiler_is_named(compiler, message, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    if compiler is not None:
        monkeypatch.setenv("CC", compiler)
    assert run("--host", "--device", "cpu") == 2
    assert f"fused-lora bench: --host: {message}" in capsys.readouterr().err


def run(*options):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(options))


def test_options_of_the_other_benchmark_are_refused(capsys):
    assert run("--host", "--threads", "2", "--report", "page.html") == 2
    assert "--host goes with --quick, --device and --out alone, got --threads, --report" in capsys.readouterr().err


@needs_compiler
def test_a_process_that_fails_is_said(monkeypatch, capfd):
    monkeypatch.setattr(stub, "compile_library", lambda folder: None)
    assert run("--host", "--quick", "--device", "cpu") == 1
    assert "the process that measures failed" in capfd.readouterr().err
