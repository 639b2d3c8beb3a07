"""The benchmark of whole models: every candidate takes the same step, and a wrong one gets no time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import bitsandbytes
import pytest
import torch
from peft.tuners import lora

from fused_lora.bench import baselines, measure, nets, runner
from fused_lora.bench.results import ResultsFile
from fused_lora.demo.net import RichBoyNet
from fused_lora.integrations.peft import FusedLinear
from fused_lora.layer import FusedLoRALinear
from fused_lora.quantized import KINDS, kind_of
from fused_lora.quantized.layer import FusedLoRAQuantized
from tools import models

CPU = torch.device("cpu")
HASTY = measure.Plan(0.0, 2, 2, 0.0)
BLOCK = nets.NetSpec("block", partial(nets.Block, 32, 48, 4, 2), (2, 6, 32), 3, "float32")
MIXED = nets.NetSpec("block", partial(nets.Block, 32, 48, 4, 2), (2, 6, 32), 3, "bfloat16+float32")
NF4 = nets.NetSpec("block", partial(nets.Block, 64, 128, 4, 2), (2, 6, 64), 3, "bfloat16+float32").over_nf4()
ENCODER = nets.NetSpec("encoder", partial(nets.EncoderLayer, 32, 48, 4), (2, 6, 32), 3, "float32")


@pytest.mark.parametrize(
    "spec", [BLOCK, MIXED, ENCODER, NF4, replace(NF4, dtype="float32")], ids=lambda spec: f"{spec.name}-{spec.dtype}"
)
def test_every_candidate_is_right(spec):
    workload = models.ModelWorkload(spec, CPU)
    group = runner.run_group(workload, HASTY)
    assert group.failed == {}
    # those that compute with plain weights
    dense = {"eager", "full"} if spec.nf4 else set()
    assert {row.candidate for row in group.rows} | set(group.absent) == set(models.NAMES)
    assert dense <= set(group.absent) <= {"ours-auto", "ours-triton", "ours-native"} | dense
    assert all("kept in 4 bits" in group.absent[name] for name in dense)


def test_every_step_is_the_same_step_and_the_base_is_not_written():
    workload = models.ModelWorkload(BLOCK, CPU)
    before = {path: weights.weight.clone() for path, weights in workload.weights.items()}
    for name in ("frozen", workload.ours(), "ours-in-peft", "peft", "eager", "full"):
        candidate = workload.candidate(name)
        first, second = candidate.call(), candidate.call()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(torch.equal(workload.weights[path].weight, weight) for path, weight in before.items())


def test_full_fine_tuning_trains_every_weight_and_lora_none():
    workload = models.ModelWorkload(BLOCK, CPU)
    weights = [w.weight for w in workload.weights.values()]
    full = list(workload.build("full")[0].parameters())
    assert all(p.requires_grad for p in full)
    assert sum(p.numel() for p in full) == sum(p.numel() for p in workload.net.parameters())
    assert not {p.data_ptr() for p in full} & {w.data_ptr() for w in weights}
    for name in (workload.ours(), "ours-in-peft", "peft", "eager"):
        lora = {id(p): p for p in workload.candidate(name).parameters if p.requires_grad}
        assert len(lora) == 2 * len(weights)
        assert max(p.numel() for p in lora.values()) < min(w.numel() for w in weights)


def test_no_weight_counts_as_kept_for_the_backward():
    workload = models.ModelWorkload(BLOCK, CPU)
    kept = {}
    for name in ("frozen", workload.ours(), "ours-in-peft", "peft", "eager", "full"):
        candidate = workload.candidate(name)
        kept[name] = measure.saved_bytes(candidate.call, candidate.parameters)
    # in float32 and without a bias all of these keep x and h
    assert kept[workload.ours()] == kept["ours-in-peft"] == kept["peft"] == kept["eager"]
    weights = sum(w.weight.nbytes for w in workload.weights.values())
    assert kept["frozen"] < kept["eager"] < kept["full"] < kept["frozen"] + weights


def test_the_candidates_are_made_as_a_user_makes_them_and_share_what_is_frozen():
    workload = models.ModelWorkload(MIXED, CPU)
    made = {name: workload.build(name)[0] for name in (workload.ours(), "ours-in-peft", "peft", "eager")}
    assert type(made[workload.ours()].q_proj) is FusedLoRALinear
    assert workload.build("ours-auto")[0].q_proj.impl == "auto"
    assert type(made["peft"].get_base_model().q_proj) is lora.Linear
    assert type(made["ours-in-peft"].get_base_model().q_proj) is FusedLinear
    frozen = workload.net.q_proj.weight.data_ptr()
    for model in made.values():
        layer = getattr(model, "q_proj", None)
        weight = layer.weights.weight if isinstance(layer, baselines.EagerLoRA) else None
        assert frozen in {p.data_ptr() for p in (*model.parameters(), weight) if p is not None}
    adapters = workload.build("peft")[1]
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    same = nets.NetSpec("block", BLOCK.make, BLOCK.shape, 3, "bfloat16")
    assert {p.dtype for p in models.ModelWorkload(same, CPU).build("peft")[1].values()} == {torch.bfloat16}


def test_over_nf4_all_are_made_as_a_user_makes_them_and_share_the_bytes_that_are_kept():
    workload = models.ModelWorkload(NF4, CPU)
    made = {name: workload.build(name)[0] for name in ("frozen", workload.ours(), "ours-in-peft", "peft")}
    assert type(made["frozen"].q_proj) is bitsandbytes.nn.Linear4bit
    assert isinstance(made[workload.ours()].q_proj, FusedLoRAQuantized)
    layers = [made["frozen"].q_proj, made[workload.ours()].q_proj]
    for name in ("peft", "ours-in-peft"):
        assert isinstance(made[name].get_base_model().q_proj, lora.bnb.Linear4bit)
        layers.append(made[name].get_base_model().q_proj.base_layer)
    first, *others = [
        [part.data_ptr() for part in kind_of(layer).packed(layer).tensors] for layer in layers
    ]  # fmt: skip
    assert all(pointers == first for pointers in others)
    # 4 bits of 16, and scales
    assert layers[0].weight.nbytes * 4 == layers[0].in_features * layers[0].out_features * 2
    # as over plain weights: nothing of W is kept for the backward, and what is kept of it anyhow does not count
    ours, plain = (one.candidate(one.ours()) for one in (workload, models.ModelWorkload(replace(NF4, nf4=False), CPU)))
    assert measure.saved_bytes(ours.call, ours.parameters) == measure.saved_bytes(plain.call, plain.parameters)


def test_what_needs_a_library_that_is_missing_is_not_timed_and_said_not_to_be(monkeypatch, capsys):
    monkeypatch.setattr(type(KINDS["4-bit"]), "problem", lambda self: "bitsandbytes must be 0.50 or newer")
    assert nets.runnable([BLOCK, NF4]) == [BLOCK]
    assert "not timed: block-over-NF4: bitsandbytes must be 0.50 or newer" in capsys.readouterr().out


def test_a_wrong_model_gets_no_time(monkeypatch):
    build = models.ModelWorkload.build

    def wrong(workload, name):
        net, adapters = build(workload, name)
        if name == "peft":
            net.register_forward_hook(lambda module, args, y: y * 1.01)
        return net, adapters

    monkeypatch.setattr(models.ModelWorkload, "build", wrong)
    group = runner.run_group(models.ModelWorkload(BLOCK, CPU), HASTY)
    assert list(group.failed) == ["peft"]
    assert "is off by" in group.failed["peft"]


def test_minilm_is_the_real_one_where_it_is_installed_and_its_name_says_where_not(monkeypatch):
    spec = nets.minilm((2, 7, 384), "float32")
    assert (spec.name, spec.make) == ("MiniLM", nets.MiniLM)
    group = runner.run_group(models.ModelWorkload(spec, CPU), HASTY)
    assert group.failed == {}
    monkeypatch.setattr(nets.importlib.util, "find_spec", lambda name: None)
    spec = nets.minilm((2, 7, 384), "float32")
    assert spec.name == "MiniLM-random-weights"
    assert spec.make()(torch.zeros(spec.shape)).shape == spec.shape


def test_richboynet_is_the_demos_and_the_llama_blocks_have_llamas_sizes():
    assert nets.NETS["cpu"][0].make is RichBoyNet
    with torch.device("meta"):
        blocks = [spec for spec in nets.NETS["cpu"] if "Llama" in spec.name]
        llama = [sum(p.numel() for p in spec.make().parameters()) for spec in blocks]
        stand_in = sum(p.numel() for p in nets.encoder_of_minilms_size().parameters())
    # of the released models: a layer of Llama 3.2 1B, of Llama 3 8B, 6 layers of all-MiniLM-L6-v2
    assert (*llama, stand_in) == (60_821_504, 218_112_000, 10_646_784)


def test_the_command_writes_a_results_file(tmp_path, monkeypatch):
    monkeypatch.setitem(nets.NETS, "cpu", (BLOCK,))
    monkeypatch.setattr(measure, "plan_for", lambda device, quick: HASTY)
    path = tmp_path / "models.json"
    assert models.main(["--device", "cpu", "--seconds", "0", "--out", str(path)]) == 0
    assert {row.pass_ for row in ResultsFile.load(path).rows} == {"model"}


def test_make_gpu_times_blocks_of_llamas_size_at_four_lengths():
    cases = nets.SPEED_NETS["cuda"]
    for nf4, tokens in ((False, [256, 1024, 4096, 8192]), (True, [256, 4096])):
        assert sorted(spec.shape[0] * spec.shape[1] for spec in cases if spec.nf4 == nf4) == tokens
    with torch.device("meta"):
        assert {sum(p.numel() for p in spec.make().parameters()) for spec in cases} == {2 * 218_112_000}
    for dry in nets.SPEED_NETS["cpu"]:
        assert runner.run_group(models.ModelWorkload(dry, CPU, models.LORA_NAMES), HASTY).failed == {}
