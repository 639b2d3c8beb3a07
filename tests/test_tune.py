"""``fused-lora tune``: only right candidates are timed, only clear winners are kept, and nothing found is lost."""

import argparse
import itertools
import json

import pytest
import torch

from fused_lora import tuning
from fused_lora.backends.triton import launch, tuned
from fused_lora.backends.triton.choice import choice as chosen
from fused_lora.backends.triton.configs import (
    DecodeConfig,
    Device,
    Problem,
    ReductionProblem,
    Schedule,
    default_config,
    default_reduction,
    default_schedule,
)
from fused_lora.backends.triton.decode_configs import default_decode, takes_decode
from fused_lora.backends.triton.entries import Entry, Reduced, Tiled, class_of
from fused_lora.bench import subjects
from fused_lora.tuning.candidates import ROUNDS, fitting

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="made for the interpreter's device")


def arguments(*options):
    parser = argparse.ArgumentParser()
    tuning.add_arguments(parser)
    return parser.parse_args(["--device", "cpu", *options])


def timer(cost):
    """Milliseconds as ``cost`` says of a choice; nothing is launched."""
    return lambda call, count: cost(call.args[0])


def prefers(wanted):
    return timer(lambda choice: 1.0 if wanted(choice) else 2.0)


def is_middle_tile(choice):
    return isinstance(choice, Tiled) and choice.tile.BLOCK_P == 64


def saved(path):
    return list(tuned.read(path).entries.values())


ONE = ("--shapes", "32x40", "--tokens", "20", "--dtype", "float32", "--quick")


# ---------------------------------------------------------------- candidates

GPUS = [
    Device((8, 0), 163 * 1024, 108, "a"),
    Device((8, 6), 99 * 1024, 84, "b"),
    Device((9, 0), 227 * 1024, 132, "c"),
    Device((10, 0), 227 * 1024, 148, "d"),
    Device((99, 0), 48 * 1024, 100, "unknown"),
]


def rule(problem, device):
    if isinstance(problem, ReductionProblem):
        return Reduced(default_reduction(problem.R, problem.itemsize, device), 4)
    if takes_decode(problem, device):
        return default_decode(problem, device)
    tile = default_config(problem, device)
    return Tiled(tile, default_schedule(problem, tile, device))


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.name)
def test_candidates_are_many_fit_and_can_be_written_down(device):
    sizes = itertools.product((1, 100, 300, 8192), (16, 100), ((2, 2, True), (2, 4, True), (4, 4, True), (4, 4, False)))
    problems = [Problem(M, 4096, 4096, R, a, u, False, exact) for M, R, (a, u, exact) in sizes]
    problems += [ReductionProblem(8192, 8192, R, itemsize) for R in (16, 100) for itemsize in (2, 4)]
    for problem in problems:
        best = rule(problem, device)
        assert tuned.why_not(best, problem, device) is None
        tried = {best}
        for choose in ROUNDS:
            choices = fitting(choose, problem, device, best, tried)
            assert len(set(choices)) == len(choices)
            assert not tried.intersection(choices)
            tried |= set(choices)
        assert len(tried) >= 5, problem
        for choice in tried:
            assert tuned.why_not(choice, problem, device) is None
            entry = Entry(device.name, device.capability, class_of(problem), choice, 1.0, 2.0)
            assert Entry.from_json(json.loads(json.dumps(entry.as_json()))) == entry


def test_every_schedule_and_both_kernels_for_small_m_are_among_them():
    device = GPUS[2]
    problem = Problem(8192, 4096, 4096, 16, 2, 2)
    best = rule(problem, device)
    kinds = {choice.schedule.kind for choice in fitting(ROUNDS[2], problem, device, best, set())}
    assert kinds == {Schedule.PUBLISH, Schedule.RECOMPUTE, Schedule.PRODUCE}
    decode = Problem(4, 4096, 4096, 16, 2, 2)
    kinds = {type(choice) for choice in fitting(ROUNDS[0], decode, device, rule(decode, device), set())}
    assert kinds == {Tiled, DecodeConfig}


# ---------------------------------------------------------------- the search


def test_what_wins_is_written_and_the_next_process_computes_by_it(tmp_path, capsys, monkeypatch):
    path = tmp_path / "tuned.json"
    assert tuning.run(arguments(*ONE, "--out", str(path)), prefers(is_middle_tile)) == 0
    forward, backward = saved(path)
    assert is_middle_tile(forward.choice)
    assert (forward.ms, forward.heuristic_ms) == (1.0, 2.0)
    assert (forward.problem.M, forward.problem.along_p, backward.problem.along_p) == (32, False, True)
    out = capsys.readouterr().out
    assert "[1/3] forward  M=20 K=32 N=40 R=16  float32" in out
    assert "50.0% less time than the rule's choice" in out
    assert "none of" in out  # the adapter gradients have no such tile
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    for clear in (tuned.current.cache_clear, launch.forget_plans):
        clear()
    problem = Problem(20, 40, 32, 16, 4, 4, tensor_cores=False)
    try:
        assert chosen(problem, torch.device("cpu")) == forward.choice
    finally:
        for clear in (tuned.current.cache_clear, launch.forget_plans):
            clear()


def test_noise_is_no_win_and_an_old_entry_that_wins_no_more_goes(tmp_path):
    path = tmp_path / "tuned.json"
    tuning.run(arguments(*ONE, "--out", str(path)), prefers(is_middle_tile))
    turns = itertools.cycle((0.5, 2.0, 2.0))
    assert tuning.run(arguments(*ONE, "--out", str(path)), lambda call, count: next(turns)) == 0
    assert saved(path) == []


def test_later_rounds_go_on_from_the_best(tmp_path):
    """A tile of the list, then fewer stages of it, then another schedule of that."""
    path = tmp_path / "tuned.json"

    def cost(choice):
        if not isinstance(choice, Tiled):
            return 10.0
        ms = 10.0 - 2 * (choice.tile.BLOCK_P == 64)
        ms -= choice.tile.BLOCK_P == 64 and choice.tile.num_stages == 1
        return ms - (choice.tile.num_stages == 1 and choice.schedule == launch.ScheduleConfig(Schedule.PRODUCE, 2))

    options = ("--shapes", "64x40", "--tokens", "20", "--dtype", "float32", "--out", str(path))
    assert tuning.run(arguments(*options), timer(cost)) == 0
    choice = saved(path)[0].choice
    assert (choice.tile.BLOCK_P, choice.tile.num_stages) == (64, 1)
    assert choice.schedule == launch.ScheduleConfig(Schedule.PRODUCE, 2)


@pytest.mark.parametrize("fault", ["wrong", "nan", "raises"])
def test_a_wrong_candidate_is_not_timed_however_fast(tmp_path, monkeypatch, capsys, fault):
    path = tmp_path / "tuned.json"
    real = subjects.MatmulSubject.call

    def call(subject, choice):
        out, h = real(subject, choice)
        if is_middle_tile(choice):
            if fault == "raises":
                raise RuntimeError("out of shared memory\nand more")
            out[-1, -1] = out[-1, -1] * 1.01 + 0.01 if fault == "wrong" else float("nan")
        return out, h

    monkeypatch.setattr(subjects.MatmulSubject, "call", call)
    assert tuning.run(arguments(*ONE, "--out", str(path)), prefers(is_middle_tile)) == 0
    assert saved(path) == []
    expected = {"wrong": ": off by", "nan": ": off by nan", "raises": ": RuntimeError: out of shared memory\n"}
    assert expected[fault] in capsys.readouterr().out


def test_a_wrong_rule_fails_and_is_not_tuned(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        subjects.ReductionSubject, "call", lambda subject, choice: (torch.zeros(16, 32), torch.ones(40, 16))
    )
    path = tmp_path / "tuned.json"
    assert tuning.run(arguments(*ONE, "--out", str(path)), prefers(is_middle_tile)) == 1
    assert "FAILED, so not tuned: the rule's own choice is off by" in capsys.readouterr().out
    assert len(saved(path)) == 2


def test_an_interrupted_run_keeps_what_it_found_and_what_was_there(tmp_path, capsys):
    path = tmp_path / "tuned.json"
    tuning.run(arguments("--shapes", "16x24", *ONE[2:], "--out", str(path)), prefers(is_middle_tile))
    before = saved(path)
    assert len(before) == 2

    def cost(choice):
        # among the neighbours of the middle tile, which the first round found
        if is_middle_tile(choice) and choice.tile.num_stages == 1:
            raise KeyboardInterrupt
        return 1.0 if is_middle_tile(choice) else 2.0

    options = ("--shapes", "32x72", "--tokens", "20", "--dtype", "float32", "--out", str(path))
    assert tuning.run(arguments(*options), timer(cost)) == 130
    after = saved(path)
    assert after[:2] == before
    assert [entry.problem.P for entry in after[2:]] == [72]
    assert "interrupted" in capsys.readouterr().err


def test_layers_that_share_an_entry_are_tuned_once(capsys):
    options = ("--shapes", "16x24,24x16", "--tokens", "17,20", "--dtype", "float32", "--quick")
    assert tuning.run(arguments(*options), timer(lambda choice: 1.0)) == 0
    out = capsys.readouterr().out
    # 16x24 and 24x16 reduce as many columns, and 17 and 20 tokens are of one class
    assert out.count("shares an entry") == 12 - 5
    assert "not saved: --out FILE saves" in out


@pytest.mark.parametrize("dtype", ["float16", "bfloat16+float32"])
def test_dropout_and_mixed_dtypes_are_tuned_for_themselves(tmp_path, dtype):
    path = tmp_path / "tuned.json"
    options = ("--shapes", "32x40", "--tokens", "20", "--dtype", dtype, "--dropout", "--quick", "--out", str(path))
    assert tuning.run(arguments(*options), prefers(is_middle_tile)) == 0
    problem = saved(path)[0].problem
    assert problem.dropout
    assert (problem.itemsize, problem.adapter_itemsize) == ((2, 2) if dtype == "float16" else (2, 4))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "content", ["", '{"format": "something else"}', '{"format": "fused_lora tuned choices, 1", "entries": [1]}']
)
def test_a_file_that_cannot_be_read_whole_is_not_overwritten(tmp_path, content, capsys):
    path = tmp_path / "notes.json"
    path.write_text(content)
    assert tuning.run(arguments(*ONE, "--out", str(path)), prefers(is_middle_tile)) == 2
    assert f"{path} would be overwritten" in capsys.readouterr().err
    assert path.read_text() == content


def test_without_the_interpreter_a_cpu_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert tuning.run(arguments(*ONE)) == 2
    assert "needs a CUDA device (or TRITON_INTERPRET=1)" in capsys.readouterr().err
    assert tuning.run(arguments("--device", "cuda")) == 2
    assert "finds no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("--shapes", "4096", "must be in_features x out_features"),
        ("--shapes", "64x0", "must be in_features x out_features"),
        ("--tokens", "0", "whole numbers from 1"),
        ("--rank", "8,x", "whole numbers from 1, got 'x'"),
        ("--dtype", "int8", "must be among float32"),
        ("--model-like", "gpt", "invalid choice"),
    ],
)
def test_bad_arguments_are_refused_by_the_parser(option, value, why, capsys):
    with pytest.raises(SystemExit):
        arguments(option, value)
    assert why in capsys.readouterr().err
