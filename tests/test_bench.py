"""The plumbing of ``fused-lora bench``; what they measure is not tested here."""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import types
from pathlib import Path

import oracle
import pytest
import torch

from fused_lora import bench, reference
from fused_lora.bench import baselines, check, groups, measure, roofline, runner, series, shapes, table
from fused_lora.bench.results import Environment, ResultsFile, Row, Spread
from fused_lora.bench.shapes import BACKWARD, DECODE, FORWARD, STEP, Shape
from fused_lora.bench.workloads import Candidate, LayerWorkload, NetWorkload

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SMALL = Shape("small", 6, 20, 12, 3, ("cpu",), bias=True)
HASTY = measure.Plan(seconds=0.0, min_rounds=2, max_rounds=2, sample_ms=0.0)
ENVIRONMENT = Environment("Some GPU (80 GB)", "2.13.0", "3.7.1", "13.0", "3.11.7", 2, "2026-01-31")


def arguments(*options):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(options)


def a_row(**fields):
    values = dict.fromkeys(("median", "p20", "p80"), 2.0)
    values |= {"pass_": STEP, "shape": "s", "dtype": "float32", "candidate": "eager", "rounds": 3, "saved_bytes": 0}
    values |= {"ratios": {"frozen": Spread(1.0, 1.0, 1.0)}}
    return Row(**values | fields)


def a_group(rows, **fields):
    return groups.Group(STEP, "s", "float32", "ours-eager", rows, **fields)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Compiling C++ for every group takes long; what is compiled has a test of its own."""
    monkeypatch.setitem(
        baselines.CANDIDATES, "compiled", baselines.Recipe(baselines._compiled, lambda weights: "not in these tests")
    )


# ---------------------------------------------------------------- checking


@pytest.mark.parametrize("dtype", bench.KNOWN_DTYPES)
@pytest.mark.parametrize("pass_", [FORWARD, BACKWARD, STEP])
def test_every_candidate_is_right(pass_, dtype):
    group = runner.run_group(LayerWorkload(pass_, SMALL, dtype, CPU), HASTY)
    assert group.failed == {}
    assert {row.candidate for row in group.rows} | set(group.absent) == set(baselines.CANDIDATES)
    assert next(row for row in group.rows if row.candidate == "frozen").ratio.median == 1.0


def test_every_candidate_takes_the_same_training_step():
    group = runner.run_group(NetWorkload("float32", CPU), HASTY)
    assert group.failed == {}
    assert group.ours in {row.candidate for row in group.rows}


class WrongScale(baselines.EagerLoRA):
    def forward(self, x):
        return super().forward(x) * 1.001


class NotANumber(baselines.EagerLoRA):
    def forward(self, x):
        return super().forward(x) * float("nan")


class NoGradient(baselines.EagerLoRA):
    def forward(self, x):
        with torch.no_grad():
            update = super().forward(x) - x @ self.weights.weight.t()
        return x @ self.weights.weight.t() + update


class Raises(baselines.EagerLoRA):
    def forward(self, x):
        raise RuntimeError("out of luck")


@pytest.mark.parametrize(
    ("wrong", "why"),
    [(WrongScale, "is off by"), (NotANumber, "nan"), (NoGradient, "is off|missing"), (Raises, "RuntimeError: out of")],
)
def test_a_wrong_candidate_gets_no_time(monkeypatch, wrong, why):
    monkeypatch.setitem(baselines.CANDIDATES, "addmm", baselines.Recipe(wrong))
    group = runner.run_group(LayerWorkload(STEP, SMALL, "float32", CPU), HASTY)
    assert list(group.failed) == ["addmm"]
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(group.failed["addmm"])
    assert "addmm" not in {row.candidate for row in group.rows}
    assert {row.candidate for row in group.rows} >= {"frozen", "eager", "ours-eager"}
    assert "FAILED" in "\n".join(table.lines(group))


def test_what_may_be_wrong_is_the_tests_budget_and_what_one_chain_of_float32_sums_rounds():
    workload = LayerWorkload(FORWARD, SMALL, "float32", CPU)
    truth, plain = (made.candidate("eager").call()["y"] for made in (workload.exact(), workload))
    chain = math.sqrt(workload.longest_sum) * torch.finfo(torch.float32).eps / 2 * truth.abs().max().item()
    allowed = oracle.budget(plain, truth) + chain
    assert check.allowance(plain, truth, torch.float32, workload.longest_sum) == pytest.approx(allowed)
    judge = check.Judge(workload)
    for part, wrong in ((0.99, False), (1.01, True)):
        y = truth.clone()
        y[-1, -1] += part * allowed
        verdict = judge.verdict("addmm", Candidate(lambda y=y: {"y": y}, ()))
        assert (verdict is not None) == wrong, verdict


# ---------------------------------------------------------------- the command


@pytest.fixture
def hasty(monkeypatch):
    """One small shape, a few rounds."""
    monkeypatch.setattr(measure, "plan_for", lambda device, quick: HASTY)
    monkeypatch.setattr(runner, "select", lambda place, quick: [SMALL])


def test_a_run_prints_ratios_and_writes_its_file(tmp_path, hasty, capsys):
    path = tmp_path / "results.json"
    options = ("--device", "cpu", "--quick", "--pass", "forward", "--dtype", "float32,bfloat16", "--out", str(path))
    assert bench.run(arguments(*options)) == 0
    data = json.loads(path.read_text())
    assert data["environment"]["threads"] == torch.get_num_threads()
    assert {(row["shape"], row["dtype"]) for row in data["rows"]} == {(str(SMALL), "float32"), (str(SMALL), "bfloat16")}
    out = capsys.readouterr().out
    assert "÷ frozen" in out
    assert "in 2 groups" in out
    assert f"saved: {path}" in out


def test_an_interrupted_run_keeps_what_it_measured(tmp_path, monkeypatch):
    made = []

    def run_group(workload, plan, peak, dry):
        if made:
            raise KeyboardInterrupt
        made.append(workload)
        return a_group([a_row()])

    monkeypatch.setattr(runner, "run_group", run_group)
    path = tmp_path / "results.json"
    assert bench.run(arguments("--device", "cpu", "--quick", "--out", str(path))) == 130
    assert ResultsFile.load(path).rows == [a_row()]


def test_a_wrong_candidate_fails_the_run(monkeypatch, capsys):
    group = a_group([], failed={"ours-eager": "dx is off"})
    monkeypatch.setattr(runner, "run_group", lambda workload, plan, peak, dry: group)
    assert bench.run(arguments("--device", "cpu", "--quick", "--pass", "forward")) == 1
    assert "FAILED, so without a time: step  s  float32: ours-eager: dx is off" in capsys.readouterr().out


def test_a_loss_is_printed_as_one_and_noise_as_noise():
    def verdict(ours, baseline):
        rows = [
            a_row(candidate=name, ratios={"frozen": Spread(median, median - 0.01, median + 0.01)})
            for name, median in (("ours-eager", ours), ("peft", baseline), ("frozen", 1.0))
        ]
        return str(groups.standing(a_group(rows)))

    assert verdict(1.1, 1.0) == "ours-eager is 10.0% SLOWER than peft, the fastest baseline"
    assert verdict(1.0, 1.25) == "ours-eager is 20.0% faster than peft, the fastest baseline"
    assert verdict(1.01, 1.0) == "ours-eager is level with peft, the fastest baseline (-1.0%, within the noise)"


def test_a_table_has_no_column_that_no_candidate_fills():
    def heads(**fields):
        rows = [a_row(**fields), a_row(candidate="frozen", tflops=None)]
        return table.lines(a_group(rows))[2].split()

    assert heads() == ["candidate", "÷", "frozen", "p20–p80", "ms", "p20–p80,", "ms", "rounds", "saved"]
    assert heads(tflops=1.5)[-2:] == ["TFLOP/s", "saved"]
    lines = table.lines(a_group([a_row(tflops=1.5), a_row(candidate="frozen")]))
    assert len({len(line) for line in lines[2:5]}) == 1
    # what one candidate lacks is a dash in a column that another fills
    assert "–" in lines[4].split()


def test_reasons_are_given_once(capsys):
    groups = [a_group([], absent={"a": "no GPU", "b": "no GPU", "c": "none"}) for _ in range(2)]
    series.conclude(groups, None)
    out = capsys.readouterr().out
    assert "not timed: a, b: no GPU\nnot timed: c: none\n" in out


@pytest.mark.parametrize(
    ("options", "why"),
    [(("--pass", "train", "--dtype", "bfloat16"), "nothing to time"), (("--threads", "0"), "--threads must be")],
)
def test_what_cannot_be_run_is_refused(options, why, capsys):
    assert bench.run(arguments("--device", "cpu", *options)) == 2
    assert why in capsys.readouterr().err


def test_unknown_names_are_refused_by_the_parser(capsys):
    # --work as it was called before
    for option in ("--dtype", "--pass", "--work"):
        with pytest.raises(SystemExit):
            arguments(option, "float8")
        assert "got 'float8'" in capsys.readouterr().err


def test_shapes_have_names_of_their_own_and_the_most_valuable_comes_first():
    names = [shape.name for shape in shapes.SHAPES]
    assert len(set(names)) == len(names)
    assert all({"cpu", "gpu", "dry"} & set(shape.tags) for shape in shapes.SHAPES)
    headline = shapes.select("gpu", quick=True)[0]
    assert (headline.M, headline.K, headline.N, headline.R) == (8192, 4096, 4096, 16)


def test_a_run_out_of_time_starts_nothing_more_and_says_so(tmp_path, hasty, monkeypatch, capsys):
    path = tmp_path / "results.json"
    options = ("--device", "cpu", "--quick", "--pass", "forward,step", "--dtype", "float32", "--minutes", "1e-9")
    assert bench.run(arguments(*options, "--out", str(path))) == 0
    assert "INCOMPLETE: 2 of 2 groups were not measured" in capsys.readouterr().out
    assert not path.exists()
    now = iter([0.0, 100.0])
    monkeypatch.setattr(series, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
    agenda = runner.agenda(CPU, ["float32"], [FORWARD, STEP], quick=True)
    assert series.compete(agenda, ResultsFile("layers", "", ENVIRONMENT), path, HASTY, deadline=50.0) == 0
    assert "INCOMPLETE: 1 of 2" in capsys.readouterr().out
    assert not ResultsFile.load(path).complete
    assert {row.pass_ for row in ResultsFile.load(path).rows} == {"forward"}


# ---------------------------------------------------------------- what a GPU's table adds


def test_interpreted_kernels_compete_in_a_dry_run_alone():
    workload = LayerWorkload(FORWARD, Shape("s", 17, 128, 40, 3, ("dry",)), "float32", CPU)
    group = runner.run_group(workload, HASTY, dry=True)
    assert group.failed == {}
    assert {"ours-triton", "ours-publish", "ours-produce", "ours-recompute"} <= {row.candidate for row in group.rows}
    assert runner.run_group(workload, HASTY).absent["ours-publish"] == "interpreted kernels say nothing about time"


def test_the_compiled_baseline_is_right_and_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    monkeypatch.setitem(baselines.CANDIDATES, "compiled", baselines.Recipe(baselines._compiled, first=True))
    # a compiled backward may free its inputs, so it can run but once
    for pass_ in (STEP, BACKWARD):
        group = runner.run_group(LayerWorkload(pass_, SMALL, "float32", CPU), HASTY)
        assert group.failed == {}
        assert "compiled" in {row.candidate for row in group.rows}


def test_the_compiled_baseline_competes_in_the_first_shapes_of_a_gpu_and_where_a_compiler_is(monkeypatch):
    monkeypatch.setitem(baselines.CANDIDATES, "compiled", baselines.Recipe(baselines._compiled, first=True))
    weights = LayerWorkload(STEP, SMALL, "float32", CPU).weights
    assert baselines._why_no_compiler(weights) is None
    monkeypatch.setattr(baselines.shutil, "which", lambda name: None)
    assert "needs a C++ compiler" in baselines._why_no_compiler(weights)
    later = types.SimpleNamespace(device=torch.device("cuda"), first=False)
    assert "first shapes alone" in runner._why_absent(later, "compiled", dry=False)


def test_the_share_of_the_roofline_is_the_larger_least_time_over_the_time():
    peak = roofline.Peak(tflops=1000.0, gb_per_s=2000.0)
    assert peak.share(flops=2 * 10**12, moved_bytes=10**9, ms=4.0) == pytest.approx(0.5)
    assert peak.share(flops=10**9, moved_bytes=4 * 10**9, ms=4.0) == pytest.approx(0.5)
    group = runner.run_group(LayerWorkload(FORWARD, SMALL, "bfloat16", CPU), HASTY, peak)
    row = next(row for row in group.rows if row.candidate == "eager")
    assert row.roofline == pytest.approx(max(row.tflops / 1000.0, row.gb_per_s / 2000.0))
    assert roofline.peak_of("NVIDIA H100 80GB HBM3", "bfloat16+float32") is roofline.PEAKS["NVIDIA H100 80GB HBM3"]
    assert roofline.peak_of("NVIDIA H100 80GB HBM3", "float32") is None
    assert roofline.peak_of("Some GPU", "bfloat16") is None


def test_on_a_gpu_the_targets_come_first_in_every_dtype_and_llama_covers_tokens_and_ranks(monkeypatch):
    monkeypatch.setattr(runner, "LayerWorkload", lambda *args: args)
    passes = [FORWARD, STEP, DECODE]
    made = [make() for make in runner.agenda(CPU, ["bfloat16", "float16"], passes, quick=False, place="gpu")]
    first = [(shape.name, dtype) for _, shape, dtype, _ in made[:10]]
    assert first[0] == ("headline", "bfloat16")
    assert {name for name, _ in first} == {f"decode-4096-m{m}" for m in (1, 4, 16)} | {"headline"}
    assert {dtype for _, dtype in first} == {"bfloat16", "float16"}
    assert {shape.M for _, shape, _, _ in made} >= {1, 16, 64, 128, 512, 2048, 4096, 8192, 16384}
    assert {shape.R for _, shape, _, _ in made} >= {8, 16, 32, 64, 128}
    for name in ("llama-7b", "llama-8b", "llama-70b"):
        assert any(shape.name.startswith(name) for _, shape, _, _ in made)


# ---------------------------------------------------------------- LoRAFusion's kernels


@pytest.fixture
def lorafusion(monkeypatch):
    """A stand-in with the names and the signature of LoRAFusion 0.1.0; ``get_hardware_config`` may be replaced."""

    def fused_linear_lora(x, linear_w, lora_a, lora_b, alpha, seed=None, dropout_p=0.0, linear_bias=None):
        # theirs cannot shape the result of two dimensions
        batch, tokens, _ = x.shape
        y = reference.eager_lora_linear(x, linear_w, lora_a, lora_b, alpha, linear_bias)
        return y.reshape(batch, tokens, -1)

    known = types.SimpleNamespace(get_hardware_config=lambda: None)
    kernels = types.SimpleNamespace(fused_linear_lora=fused_linear_lora)
    ops = types.SimpleNamespace(lora_v1=kernels)
    for name, module in (
        ("lorafusion", types.SimpleNamespace(ops=ops)),
        ("lorafusion.ops", ops),
        ("lorafusion.ops.lora_v1", kernels),
        ("lorafusion.ops.triton_ops", types.SimpleNamespace(config=known)),
        ("lorafusion.ops.triton_ops.config", known),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    return known


def test_lorafusion_is_called_as_it_wants_and_held_to_the_truth(monkeypatch, lorafusion):
    monkeypatch.setitem(baselines.CANDIDATES, "lorafusion", baselines.Recipe(baselines.LoRAFusionLoRA))
    group = runner.run_group(LayerWorkload(STEP, SMALL, "float32", CPU), HASTY)
    assert group.failed == {}
    assert "lorafusion" in {row.candidate for row in group.rows}


def test_lorafusion_is_timed_where_its_kernels_run_and_nowhere_else(monkeypatch, lorafusion):
    def why(device="cuda", dtype=torch.bfloat16, adapter=torch.bfloat16, rank=16):
        weight = types.SimpleNamespace(device=torch.device(device), dtype=dtype)
        lora_A = types.SimpleNamespace(dtype=adapter)
        return baselines._why_no_lorafusion(types.SimpleNamespace(weight=weight, lora_A=lora_A, rank=rank))

    assert why() is None
    assert "CUDA devices alone" in why(device="cpu")
    assert "16 bits" in why(dtype=torch.float32, adapter=torch.float32)
    assert "the base's dtype" in why(adapter=torch.float32)
    assert "powers of two from 16 on, not 8" in why(rank=8)
    assert "not 48" in why(rank=48)

    def refuse():
        raise ValueError("GPU h300 not supported")

    lorafusion.get_hardware_config = refuse
    assert why() == "LoRAFusion cannot run here: GPU h300 not supported"
    monkeypatch.setitem(sys.modules, "lorafusion.ops.lora_v1", None)
    monkeypatch.delattr(sys.modules["lorafusion.ops"], "lora_v1")
    assert why().startswith("LoRAFusion cannot run here: ")


def test_a_group_whose_truth_does_not_fit_is_left_out_and_the_run_goes_on(monkeypatch):
    def too_large(workload):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runner, "Judge", too_large)
    group = runner.run_group(LayerWorkload(STEP, SMALL, "float32", CPU), HASTY)
    assert (group.rows, group.failed) == ([], {})
    assert group.absent["frozen"] == "the float64 truth does not fit in memory"
    assert "step" in "\n".join(table.lines(group))
