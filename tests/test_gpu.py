"""``make gpu`` without a GPU: its parts, their time, and what it says and writes of them."""

import sys

import pytest
import torch

from fused_lora.bench import subjects
from fused_lora.bench.results import ResultsFile
from tools import commands, gpu, sanitized


def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert "finds no CUDA device" in capsys.readouterr().err


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="walks the way of a machine without a GPU")


class Parts:
    """A checkout with tests of its own, and ``make gpu`` in it."""

    def __init__(self, folder, tests="assert True", races="assert True"):
        self.folder = folder
        kernels = folder / "tests" / "kernels"
        kernels.mkdir(parents=True)
        for name, body in (("it", tests), ("device", races), ("codegen", "assert False")):
            (kernels / f"test_{name}.py").write_text(f"import os, time\ndef test_it():\n    {body}\n")

    def __call__(self, *options):
        return gpu.main(["--device", "cpu", *options], self.folder)


@pytest.fixture
def hasty_speed(monkeypatch):
    """Instead of the speed part, what it was called with."""
    calls = []
    monkeypatch.setattr(gpu, "_speed", lambda *args: calls.append(args) or "passed")
    monkeypatch.setattr(gpu, "_sanitizer", lambda *args: "passed")
    return calls


@pytest.mark.parametrize("failing", ["tests", "races", None])
def test_failed_tests_and_races_fail_it_and_withhold_the_times(tmp_path, hasty_speed, capsys, failing):
    parts = Parts(tmp_path, **({failing: "assert False"} if failing else {}))
    assert parts("--quick") == (1 if failing else 0)
    out = capsys.readouterr().out
    assert len(hasty_speed) == (0 if failing else 1)
    if failing:
        assert f"{failing:<10} failed (exit code 1) after" in out
        assert f"speed      absent: nothing is timed while {failing} fail" in out
    else:
        assert "tests      passed after" in out
        assert "1 passed" in out


def test_the_kernels_are_interpreted_on_a_cpu(tmp_path, hasty_speed, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert Parts(tmp_path, "assert os.environ['TRITON_INTERPRET'] == '1'")("--only", "tests") == 0
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_parts_are_chosen_and_skipped_by_name(tmp_path, monkeypatch):
    done = []
    for part in gpu.PARTS:
        monkeypatch.setattr(gpu, f"_{part}", lambda *args, part=part: done.append(part) or "passed")
    for options, expected in (
        ((), list(gpu.PARTS)),
        (("--only", "speed,tests"), ["speed", "tests"]),
        (("--skip", "sanitizer,races"), ["tests", "speed"]),
    ):
        done.clear()
        assert gpu.main(["--device", "cpu", *options], tmp_path) == 0
        assert done == expected
    for option in ("--only", "--skip"):
        with pytest.raises(SystemExit):
            gpu.main([option, "everything"])


def test_a_part_that_outlasts_its_time_is_stopped_and_said_to_be_unfinished(tmp_path, hasty_speed, monkeypatch, capsys):
    monkeypatch.setitem(gpu.SHARE, "tests", 0.1)
    path = tmp_path / "results.json"
    parts = Parts(tmp_path, "time.sleep(300)")
    assert parts("--only", "tests,speed", "--minutes", "0.5", "--out", str(path)) == 1
    assert "tests      unfinished after" in capsys.readouterr().out
    # no test failed, and every candidate is checked before it is timed
    assert len(hasty_speed) == 1
    results = ResultsFile.load(path)
    assert results.checks["tests"].startswith("unfinished")
    assert not results.complete


def test_a_command_that_ignores_the_interrupt_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "GRACE_S", 1.0)
    stubborn = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('on', flush=True); time.sleep(300)"
    )
    ended = commands.run([sys.executable, "-c", stubborn], tmp_path, 3.0)
    assert ended.timed_out
    assert ended.code != 0
    assert ended.seconds < 100


def test_another_results_file_is_refused_before_any_part_runs(tmp_path, capsys):
    path = tmp_path / "notes.json"
    path.write_text("[]")
    assert gpu.main(["--device", "cpu", "--out", str(path)], tmp_path) == 2
    assert "must be a results file" in capsys.readouterr().err


@pytest.fixture
def sanitizer(tmp_path, monkeypatch):
    """``sanitizer(shell)``: the outcome of a stand-in tool that does so, its tool's name in $2; how it was called."""

    def run(shell):
        tool = tmp_path / "compute-sanitizer"
        tool.write_text(f'#!/bin/sh\necho "$@" >>calls\ncase "$*" in {shell} esac\n')
        tool.chmod(0o755)
        monkeypatch.setattr(gpu, "sanitizer_path", lambda: str(tool))
        monkeypatch.setattr(gpu.sys, "executable", "echo")
        outcome = gpu._sanitizer(tmp_path, 100.0, "cuda", False)
        return outcome, (tmp_path / "calls").read_text().splitlines()

    return run


def test_the_sanitizer_watches_our_kernels_with_every_tool(sanitizer):
    outcome, calls = sanitizer("*synccheck*) echo found; exit 9;;")
    kernels = list(sanitized.KERNELS.values())
    assert [call.split()[1] for call in calls] == ["memcheck", "synccheck", *["racecheck"] * len(kernels)]
    for call in calls[:2]:
        assert call.endswith("echo -m tools.sanitized --device cuda")
        assert all(f"--kernel-name kns={kernel}" in call for kernel in kernels)
    for call, kernel in zip(calls[2:], kernels, strict=True):
        assert call.endswith(f"--kernel-name kns={kernel} echo -m tools.sanitized --device cuda --kernel {kernel}")
        assert call.count("--kernel-name") == 1
    assert outcome.startswith("failed: script passed after")
    assert "synccheck failed (exit code 9) after 0 s: found" in outcome
    assert outcome.count("racecheck") == outcome.count("racecheck _") + 1 == len(kernels)


BROKEN = "echo '========= Internal Sanitizer Error: out of luck'; echo '========= ERROR SUMMARY: 0 errors'"


def test_a_sanitizer_that_breaks_is_neither_passed_nor_failed_and_loses_no_other_check(sanitizer):
    outcome, _ = sanitizer(f"*racecheck*_decode_kernel*) {BROKEN}; exit 1;;")
    assert outcome.startswith("tool failed: script passed after")
    assert "racecheck _decode_kernel tool failed after 0 s" in outcome
    assert "Internal Sanitizer Error: out of luck" in outcome
    for name in ("memcheck", "synccheck", "racecheck _lora_matmul_kernel", "racecheck _adapter_grad_kernel"):
        assert f"{name} passed after" in outcome
    # the tool's own exit status does not make it pass either
    outcome, _ = sanitizer(f"*memcheck*) {BROKEN}; exit 0;;")
    assert "memcheck tool failed after" in outcome


def test_what_a_sanitizer_found_before_it_broke_counts(sanitizer):
    found = "echo '========= Error: Race reported between Write access at k+0x10'"
    outcome, _ = sanitizer(f"*racecheck*_decode_kernel*) {found}; {BROKEN}; exit 9;;")
    assert outcome.startswith("failed: ")
    assert "racecheck _decode_kernel failed (exit code 9)" in outcome


def test_a_broken_tool_does_not_fail_make_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "_sanitizer", lambda *args: "tool failed: racecheck tool failed after 1 s")
    assert gpu.main(["--device", "cpu", "--only", "sanitizer"], tmp_path) == 0
    assert "sanitizer  tool failed" in capsys.readouterr().out


def test_an_absent_sanitizer_is_said_to_be_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda *args, **options: None)
    assert gpu._sanitizer(tmp_path, 1.0, "cuda", False).startswith("absent: compute-sanitizer is neither on the PATH")


def test_the_script_for_the_sanitizer_is_right_and_sees_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(sanitized, "DTYPES", ("bfloat16",))
    assert sanitized.main(["--device", "cpu"]) == 0
    # a decode kernel, four products in four schedules or more, two reductions in three
    assert "launches of every kernel: all right" in capsys.readouterr().out
    monkeypatch.setattr(
        subjects.ReductionSubject, "call", lambda subject, choice: (torch.zeros(20, 72), torch.zeros(104, 20))
    )
    assert sanitized.main(["--device", "cpu"]) == 1
    assert "failed: adapter gradients" in capsys.readouterr().out
    monkeypatch.setattr(sanitized, "dequantize_4bit", lambda bits, out: out.zero_())
    assert sanitized.main(["--device", "cpu", "--kernel", "_dequantize_4bit_kernel"]) == 1
    assert "failed: dequantize: 104×72, blocksize=32, double=True" in capsys.readouterr().out


def test_its_speed_part_walks_the_whole_way_with_interpreted_kernels(tmp_path, capsys):
    path = tmp_path / "results.json"
    assert gpu.main(["--device", "cpu", "--quick", "--only", "speed", "--out", str(path)], tmp_path) == 0
    results = ResultsFile.load(path)
    assert results.environment.device.endswith(", kernels interpreted")
    assert results.complete
    assert {(row.pass_, row.shape.split()[0]) for row in results.rows} == {
        ("model", "dry-blocks"), ("dequantize", "nf4-64x128"),
        ("forward", "dry"), ("step", "dry"), ("decode", "dry-decode"),
    }  # fmt: skip
    assert results.rows[0].pass_ == "model"
    blocks = {row.candidate for row in results.rows if row.pass_ == "model"}
    assert blocks == {"frozen", "eager", "peft", "ours-triton", "ours-eager", "ours-in-peft"}
    ours = {f"ours-{name}" for name in ("triton", "publish", "produce", "recompute", "eager")}
    assert {row.candidate for row in results.rows} >= {"frozen", "eager", "addmm", "parametrize"} | ours
    assert "not timed: compiled: " in capsys.readouterr().out


def test_the_races_that_name_the_extension_run_it(extension_library):
    """As on a GPU with the extension installed: hidden from all tests but those that name it."""
    script = (
        "import sys, pytest, torch; library = sys.argv[1]; library and torch.ops.load_library(library);"
        "from fused_lora.backends import environment; environment.EXTENSION_PROBLEM = None;"
        "sys.exit(pytest.main(['tests/kernels/test_device.py', '-q', '-k', 'native']))"
    )
    command = [sys.executable, "-c", script, str(extension_library or "")]
    ended = commands.run(command, gpu.CHECKOUT, 300.0, {"PYTHONPATH": str(gpu.CHECKOUT)})
    assert ended.code == 0, ended.lines
    # a step, two streams and a graph, in two sizes each
    assert ended.last.startswith("6 passed")
