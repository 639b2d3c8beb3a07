"""The benchmark of whole models: every candidate takes the same step, and a wrong one gets no time."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from peft.tuners import lora

from fused_lora.bench import baselines, measure, nets, runner
from fused_lora.bench.results import Results
from fused_lora.demo.net import RichBoyNet
from fused_lora.integrations.peft import FusedLinear
from fused_lora.layer import FusedLoRALinear
from tools import models

CPU = torch.device("cpu")
HASTY = measure.Plan(0.0, 2, 2, 0.0)
BLOCK = nets.Case("block", partial(nets.Block, 32, 48, 4, 2), (2, 6, 32), 3, "float32")
MIXED = nets.Case("block", partial(nets.Block, 32, 48, 4, 2), (2, 6, 32), 3, "bfloat16+float32")
ENCODER = nets.Case("encoder", partial(nets.EncoderLayer, 32, 48, 4), (2, 6, 32), 3, "float32")


@pytest.mark.parametrize("case", [BLOCK, MIXED, ENCODER], ids=lambda case: f"{case.name}-{case.dtype}")
def test_every_candidate_is_right(case):
    problem = models.ModelProblem(case, CPU)
    group = runner.run_group(problem, HASTY)
    assert group.red == {}
    assert {row.candidate for row in group.rows} | set(group.absent) == set(models.NAMES)
    assert set(group.absent) <= {"ours-triton", "ours-native"}


def test_every_step_is_the_same_step_and_the_base_is_not_written():
    problem = models.ModelProblem(BLOCK, CPU)
    before = {path: weights.weight.clone() for path, weights in problem.weights.items()}
    for name in ("frozen", problem.ours(), "ours-in-peft", "peft", "eager", "full"):
        candidate = problem.candidate(name)
        first, second = candidate.call(), candidate.call()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(torch.equal(problem.weights[path].weight, weight) for path, weight in before.items())


def test_full_fine_tuning_trains_every_weight_and_lora_none():
    problem = models.ModelProblem(BLOCK, CPU)
    weights = [w.weight for w in problem.weights.values()]
    full = list(problem.build("full")[0].parameters())
    assert all(p.requires_grad for p in full)
    assert sum(p.numel() for p in full) == sum(p.numel() for p in problem.net.parameters())
    assert not {p.data_ptr() for p in full} & {w.data_ptr() for w in weights}
    for name in (problem.ours(), "ours-in-peft", "peft", "eager"):
        lora = {id(p): p for p in problem.candidate(name).parameters if p.requires_grad}
        assert len(lora) == 2 * len(weights)
        assert max(p.numel() for p in lora.values()) < min(w.numel() for w in weights)


def test_no_weight_counts_as_kept_for_the_backward():
    problem = models.ModelProblem(BLOCK, CPU)
    kept = {}
    for name in ("frozen", problem.ours(), "ours-in-peft", "peft", "eager", "full"):
        candidate = problem.candidate(name)
        kept[name] = measure.saved_bytes(candidate.call, candidate.parameters)
    # in float32 and without a bias all of these keep x and h
    assert kept[problem.ours()] == kept["ours-in-peft"] == kept["peft"] == kept["eager"]
    weights = sum(w.weight.nbytes for w in problem.weights.values())
    assert kept["frozen"] < kept["eager"] < kept["full"] < kept["frozen"] + weights


def test_the_candidates_are_made_as_a_user_makes_them_and_share_what_is_frozen():
    problem = models.ModelProblem(MIXED, CPU)
    made = {name: problem.build(name)[0] for name in (problem.ours(), "ours-in-peft", "peft", "eager")}
    assert type(made[problem.ours()].q_proj) is FusedLoRALinear
    assert type(made["peft"].get_base_model().q_proj) is lora.Linear
    assert type(made["ours-in-peft"].get_base_model().q_proj) is FusedLinear
    frozen = problem.net.q_proj.weight.data_ptr()
    for model in made.values():
        layer = getattr(model, "q_proj", None)
        weight = layer.weights.weight if isinstance(layer, baselines.EagerLoRA) else None
        assert frozen in {p.data_ptr() for p in (*model.parameters(), weight) if p is not None}
    adapters = problem.build("peft")[1]
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    same = nets.Case("block", BLOCK.make, BLOCK.shape, 3, "bfloat16")
    assert {p.dtype for p in models.ModelProblem(same, CPU).build("peft")[1].values()} == {torch.bfloat16}


def test_a_wrong_model_gets_no_time(monkeypatch):
    build = models.ModelProblem.build

    def wrong(problem, name):
        net, adapters = build(problem, name)
        if name == "peft":
            net.register_forward_hook(lambda module, args, y: y * 1.01)
        return net, adapters

    monkeypatch.setattr(models.ModelProblem, "build", wrong)
    group = runner.run_group(models.ModelProblem(BLOCK, CPU), HASTY)
    assert list(group.red) == ["peft"]
    assert "is off by" in group.red["peft"]


def test_minilm_is_the_real_one_where_it_is_installed_and_its_name_says_where_not(monkeypatch):
    case = nets.minilm((1, 3, 384), "float32")
    assert (case.name, case.make) == ("MiniLM", nets.MiniLM)
    group = runner.run_group(models.ModelProblem(case, CPU), HASTY)
    assert group.red == {}
    monkeypatch.setattr(nets.importlib.util, "find_spec", lambda name: None)
    case = nets.minilm((2, 7, 384), "float32")
    assert case.name == "MiniLM-random-weights"
    assert case.make()(torch.zeros(case.shape)).shape == case.shape


def test_richboynet_is_the_demos_and_the_llama_blocks_have_llamas_sizes():
    assert nets.CASES["cpu"][0].make is RichBoyNet
    with torch.device("meta"):
        llama = [sum(p.numel() for p in case.make().parameters()) for case in nets.CASES["cpu"][2:]]
        stand_in = sum(p.numel() for p in nets.encoder_of_minilms_size().parameters())
    # of the released models: a layer of Llama 3.2 1B, of Llama 3 8B, 6 layers of all-MiniLM-L6-v2
    assert (*llama, stand_in) == (60_821_504, 218_112_000, 10_646_784)


def test_the_command_writes_a_results_file(tmp_path, monkeypatch):
    monkeypatch.setitem(nets.CASES, "cpu", (BLOCK,))
    monkeypatch.setattr(measure, "plan_for", lambda device, quick: HASTY)
    path = tmp_path / "models.json"
    assert models.main(["--device", "cpu", "--seconds", "0", "--out", str(path)]) == 0
    assert {row.work for row in Results.load(path).rows} == {"model"}


def test_make_gpu_times_blocks_of_llamas_size_at_four_lengths():
    cases = nets.SPEED_CASES["cuda"]
    assert sorted(case.shape[0] * case.shape[1] for case in cases) == [256, 1024, 4096, 8192]
    with torch.device("meta"):
        assert {sum(p.numel() for p in case.make().parameters()) for case in cases} == {2 * 218_112_000}
    (dry,) = nets.SPEED_CASES["cpu"]
    assert runner.run_group(models.ModelProblem(dry, CPU, models.LORA_NAMES), HASTY).red == {}
