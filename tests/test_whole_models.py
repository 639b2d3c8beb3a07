"""The benchmark of whole models: every candidate takes the same step, and a wrong one gets no time."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fused_lora.bench import measure, models, peers, runner
from fused_lora.bench.results import Results
from fused_lora.demo.net import RichBoyNet

CPU = torch.device("cpu")
HASTY = measure.Plan(0.0, 2, 2, 0.0)
BLOCK = models.Case("block", partial(models.Block, 32, 48, 4, 2), (2, 6, 32), 3, "float32")
MIXED = models.Case("block", partial(models.Block, 32, 48, 4, 2), (2, 6, 32), 3, "bfloat16+float32")
ENCODER = models.Case("encoder", partial(models._EncoderLayer, 32, 48, 4), (2, 6, 32), 3, "float32")


@pytest.mark.parametrize("case", [BLOCK, MIXED, ENCODER], ids=lambda case: f"{case.name}-{case.dtype}")
def test_every_candidate_is_right(case):
    problem = models.ModelProblem(case, CPU)
    group = runner.run_group(problem, HASTY)
    assert group.red == {}
    assert {row.candidate for row in group.rows} == {*models.WANTED, problem.ours()}


def test_every_step_is_the_same_step_and_the_base_is_not_written():
    problem = models.ModelProblem(BLOCK, CPU)
    before = {path: weights.weight.clone() for path, weights in problem.weights.items()}
    for name in (*models.WANTED, problem.ours()):
        candidate = problem.candidate(name)
        first, second = candidate.call(), candidate.call()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(torch.equal(problem.weights[path].weight, weight) for path, weight in before.items())


def test_full_fine_tuning_trains_every_weight_and_lora_none():
    problem = models.ModelProblem(BLOCK, CPU)
    sizes = {path: weights.weight.numel() for path, weights in problem.weights.items()}
    full = [p for p in problem.candidate("full").parameters if p.requires_grad and p.numel() in sizes.values()]
    assert sum(p.numel() for p in full) == sum(sizes.values())
    lora = [p for p in problem.candidate("eager").parameters if p.requires_grad]
    assert len(lora) == 2 * len(sizes)
    assert max(p.numel() for p in lora) < min(sizes.values())


def test_a_wrong_model_gets_no_time(monkeypatch):
    class Wrong(peers.EagerLoRA):
        def forward(self, x):
            return super().forward(x) * 1.01

    monkeypatch.setitem(peers.PEERS, "peft", peers.Peer(Wrong))
    group = runner.run_group(models.ModelProblem(BLOCK, CPU), HASTY)
    assert list(group.red) == ["peft"]
    assert "is off by" in group.red["peft"]


def test_richboynet_is_the_demos_and_the_llama_blocks_have_llamas_sizes():
    assert models.CASES["cpu"][0].make is RichBoyNet
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in case.make().parameters()) for case in models.CASES["cpu"][1:]]
    # of the released models: 6 layers of all-MiniLM-L6-v2, a layer of Llama 3.2 1B, of Llama 3 8B
    assert sizes == [10_646_784, 60_821_504, 218_112_000]


def test_the_command_writes_a_results_file(tmp_path, monkeypatch):
    monkeypatch.setitem(models.CASES, "cpu", (BLOCK,))
    monkeypatch.setattr(measure, "plan_for", lambda device, quick: HASTY)
    path = tmp_path / "models.json"
    assert models.main(["--device", "cpu", "--seconds", "0", "--out", str(path)]) == 0
    assert {row.work for row in Results.load(path).rows} == {"model"}
