"""``make gpu`` without a GPU: its parts, their time, and what it says and writes of them."""

import sys

import pytest
import torch

from fused_lora.bench import commands, gpu, sanitized, subjects
from fused_lora.bench.results import Results


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
    monkeypatch.setattr(gpu, "_speed", lambda *args: calls.append(args) or "green")
    monkeypatch.setattr(gpu, "_sanitizer", lambda *args: "green")
    return calls


@pytest.mark.parametrize(("red", "names"), [("tests", "tests"), ("races", "races"), (None, None)])
def test_red_tests_and_races_fail_it_and_withhold_the_times(tmp_path, hasty_speed, capsys, red, names):
    parts = Parts(tmp_path, **({red: "assert False"} if red else {}))
    assert parts("--quick") == (1 if red else 0)
    out = capsys.readouterr().out
    assert len(hasty_speed) == (0 if red else 1)
    if red:
        assert f"{red:<10} RED (exit code 1) after" in out
        assert f"speed      absent: nothing is timed while {names} are red" in out
    else:
        assert "tests      green after" in out
        assert "1 passed" in out


def test_the_kernels_are_interpreted_on_a_cpu(tmp_path, hasty_speed, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert Parts(tmp_path, "assert os.environ['TRITON_INTERPRET'] == '1'")("--only", "tests") == 0
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_parts_are_chosen_and_skipped_by_name(tmp_path, monkeypatch):
    done = []
    for part in gpu.PARTS:
        monkeypatch.setattr(gpu, f"_{part}", lambda *args, part=part: done.append(part) or "green")
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
    # no test was red, and every candidate is checked before it is timed
    assert len(hasty_speed) == 1
    results = Results.load(path)
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


def test_the_sanitizer_watches_our_kernels_with_every_tool(tmp_path, monkeypatch, capsys):
    """A stand-in tool that writes down how it was called."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "$@" >>calls\ncase "$2" in synccheck) echo found; exit 9;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setattr(gpu, "sanitizer_path", lambda: str(tool))
    monkeypatch.setattr(gpu.sys, "executable", "echo")
    outcome = gpu._sanitizer(tmp_path, 100.0, "cuda", False)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[1] for call in calls] == ["memcheck", "racecheck", "synccheck"]
    for call in calls:
        assert call.endswith("echo -m fused_lora.bench.sanitized --device cuda")
        assert "--kernel-name kns=_decode_kernel" in call
    assert outcome.startswith("RED: script green after")
    assert "synccheck RED (exit code 9) after 0 s: found" in outcome


def test_an_absent_sanitizer_is_said_to_be_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda *args, **options: None)
    assert gpu._sanitizer(tmp_path, 1.0, "cuda", False).startswith("absent: compute-sanitizer is neither on the PATH")


def test_the_script_for_the_sanitizer_is_right_and_sees_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(sanitized, "DTYPES", ("bfloat16",))
    assert sanitized.main(["--device", "cpu"]) == 0
    assert "7 kinds of launch in every form: all right" in capsys.readouterr().out
    monkeypatch.setattr(
        subjects.ReductionSubject, "call", lambda subject, choice: (torch.zeros(20, 72), torch.zeros(104, 20))
    )
    assert sanitized.main(["--device", "cpu"]) == 1
    assert "RED: adapter gradients" in capsys.readouterr().out


def test_its_speed_part_walks_the_whole_way_with_interpreted_kernels(tmp_path, capsys):
    path = tmp_path / "results.json"
    assert gpu.main(["--device", "cpu", "--quick", "--only", "speed", "--out", str(path)], tmp_path) == 0
    results = Results.load(path)
    assert results.environment.device.endswith(", kernels interpreted")
    assert results.complete
    assert {(row.work, row.shape.split()[0]) for row in results.rows} == {
        ("forward", "dry"), ("step", "dry"), ("decode", "dry-decode")
    }  # fmt: skip
    ours = {f"ours-{name}" for name in ("triton", "publish", "produce", "recompute", "eager")}
    assert {row.candidate for row in results.rows} >= {"frozen", "eager", "addmm", "parametrize"} | ours
    assert "not timed: compiled: " in capsys.readouterr().out
