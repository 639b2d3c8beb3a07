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
from fused_lora.bench.results import Environment, ResultsFile, Row, Spread
from fused_lora.bench.shapes import FORWARD, STEP
from tools.tables import host

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
    return done.stdout, ResultsFile.load(out)


@needs_compiler
def test_the_last_line_is_three_ratios(measured):
    stdout, file = measured
    ratios = json.loads(stdout.splitlines()[-1])
    assert list(ratios) == ["triton_forward", "triton_step", "native_forward"]
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios.values())
    assert ratios == parts.ratios(file)


@needs_compiler
def test_kernels_go_through_the_launcher_to_the_stub(measured):
    settings = measured[1].settings
    assert settings["driver"] == "stub"
    assert settings["launches"] > 1000
    for kernel in KERNELS:
        assert settings["counted"][f"{kernel} {FORWARD}"]["launches"] == 1
        # of the forward, the gradient of x, and those of A and B
        assert settings["counted"][f"{kernel} {STEP}"]["launches"] == 3


@needs_compiler
def test_every_part_has_its_time_and_the_path_is_the_whole_call(measured):
    file = measured[1]
    assert file.environment.threads == 1
    assert all(row.unit == "us" and row.p20 > 0 for row in file.rows)
    assert all(ratio.p20 > 0 for row in file.rows for ratio in row.ratios.values())
    for kernel in KERNELS:
        path = parts.path(file, kernel)
        assert tuple(path) == parts.PATH
        assert sum(path.values()) == pytest.approx(parts.rows_of(file, FORWARD, kernel)[parts.LAYER].median)


@needs_compiler
def test_the_page_has_what_the_file_has(measured):
    file = measured[1]
    page = host.tables({"host": {"some.json": file}})
    assert "a stub of the driver" in page
    assert "/host/some.json`" in page
    times = [parts.rows_of(file, STEP, kernel)[parts.FULL].median for kernel in KERNELS]
    assert f"| the bare linear, W trained | {' | '.join(format(time, '.1f') for time in times)} |" in page


def test_a_page_without_a_file_says_so():
    assert host.tables({"host": {}}) == "**not measured**.\n"


@needs_compiler
def test_a_call_like_one_before_allocates_its_results_alone(measured):
    counted = measured[1].settings["counted"]
    for did in counted.values():
        assert (did["jit_runs"], did["descriptors"], did["operators"]) == (0, 0, 0)
    assert [counted[f"{kernel} {FORWARD}"]["allocations"] for kernel in KERNELS] == [1, 1, 1]
    # y and h, dx and g, dA and dB
    assert [counted[f"{kernel} {STEP}"]["allocations"] for kernel in KERNELS] == [6, 6, 6]


def some_file(*rows, jit_runs=0):
    environment = Environment("Some CPU", "2.13.0", "3.7.1", None, "3.11.7", 1, "2026-01-31")
    return ResultsFile(
        "host", "make host", environment, [*rows], {"counted": {f"tile {FORWARD}": {"jit_runs": jit_runs}}}
    )


def row(part, us, pass_=FORWARD, group="tile", **ratios):
    ratios = {name.replace("_", "."): Spread(ratio, ratio, ratio) for name, ratio in ratios.items()}
    return Row(pass_, f"{group} (M=512)", "bfloat16", part, 7, us, us, us, unit="us", ratios=ratios)


@pytest.mark.parametrize(("jit_runs", "expected"), [(0, [5, 15, 25, 3, 2]), (1, [5, 15, 13, 3, 14])])
def test_a_launch_is_that_which_a_call_makes(jit_runs, expected):
    times = {"layer": 50, "lora_linear": 45, "plan": 30, "launcher": 2, "allocator": 3, "JITFunction.run": 14}
    file = some_file(*(row(part, us) for part, us in times.items()), jit_runs=jit_runs)
    assert list(parts.path(file, "tile").values()) == expected


def test_ratios_are_those_of_the_kernel_further_behind_and_null_without_the_extension():
    file = some_file(
        row("layer", 9, group="decode", **{parts.GEMMS: 2.0}), row("layer", 9, group="tile", **{parts.GEMMS: 2.5}),
        row("layer", 9, STEP, "decode", eager=3.0), row("layer", 9, STEP, "tile", eager=2.0),
        row("F.linear", 9, group="native", F_linear=1.0),
    )  # fmt: skip
    assert parts.ratios(file) == {"triton_forward": 2.5, "triton_step": 3.0, "native_forward": None}


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
