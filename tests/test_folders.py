"""Everything an adapter trains, on disk: PEFT's files both ways."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from saved_models import WAYS, X, net, shaken
from torch import nn

from fused_lora import (
    LoRAConfig,
    add_adapter,
    apply_lora,
    disable_adapters,
    load_adapter,
    lora_parameters,
    save_adapter,
    set_adapter,
)
from fused_lora.checkpoint import CONFIG_FILE, WEIGHTS_FILE


@pytest.mark.parametrize("way", WAYS)
def test_what_is_trained_is_saved_and_loads_into_a_plain_copy(way, tmp_path):
    model = shaken(apply_lora(net(), rank=2, **WAYS[way]))
    save_adapter(model, tmp_path)
    other = load_adapter(net(), tmp_path, "mine")
    assert torch.equal(other(X), model(X))
    assert len(lora_parameters(other)) == len(lora_parameters(model))
    with disable_adapters(other):
        assert torch.equal(other(X), net()(X))
    save_adapter(other, tmp_path / "again", "mine")
    assert load_file(tmp_path / "again" / WEIGHTS_FILE).keys() == load_file(tmp_path / WEIGHTS_FILE).keys()
    assert (tmp_path / "again" / CONFIG_FILE).read_bytes() == (tmp_path / CONFIG_FILE).read_bytes()


@pytest.mark.parametrize("way", WAYS)
def test_peft_reads_ours(way, tmp_path):
    model = shaken(apply_lora(net(), rank=2, **WAYS[way]))
    save_adapter(model, tmp_path)
    peft = PeftModel.from_pretrained(net(), str(tmp_path)).eval()
    torch.testing.assert_close(peft(X), model(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_we_read_what_peft_trained(way, tmp_path):
    fields = {"target_modules": ["fc1", "fc2"]} | WAYS[way]
    peft = get_peft_model(net(), LoraConfig(r=2, lora_alpha=3, **fields)).eval()
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    peft.save_pretrained(str(tmp_path))
    model = load_adapter(net(), tmp_path)
    torch.testing.assert_close(model(X), peft(X), rtol=1e-5, atol=1e-5)
    with disable_adapters(model):
        assert torch.equal(model(X), net()(X))


def test_a_gaussian_folder_of_pefts_draws_what_peft_draws_and_stays_one(tmp_path):
    peft = get_peft_model(net(), LoraConfig(r=5, init_lora_weights="gaussian", target_modules=["fc1"]))
    peft.save_pretrained(str(tmp_path))
    adapter = load_adapter(net(), tmp_path).fc1.adapter("default")
    theirs = peft.base_model.model.fc1
    assert torch.equal(adapter.lora_A, theirs.lora_A["default"].weight)
    torch.manual_seed(1)
    adapter.reset_parameters()
    torch.manual_seed(1)
    theirs.reset_lora_parameters("default", "gaussian")
    assert torch.equal(adapter.lora_A, theirs.lora_A["default"].weight)
    for init, written in (("gaussian", "gaussian"), ("normal", True), ("kaiming", True)):
        save_adapter(apply_lora(net(), init=init), tmp_path)
        assert json.loads((tmp_path / CONFIG_FILE).read_text())["init_lora_weights"] == written


def test_layers_that_differ_in_what_the_format_holds_once_are_not_saved(tmp_path):
    model = apply_lora(net(), rank=2)
    model.fc1.adapter("default").dropout = 0.5
    with pytest.raises(ValueError, match=r"has one dropout for all its layers, got \[0.0, 0.5\]"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_two_heads_of_two_folders_take_turns(tmp_path):
    outputs = {}
    for seed, name in enumerate(("cats", "dogs")):
        torch.manual_seed(seed)
        model = apply_lora(net(), rank=2, adapter=name, **WAYS["head"])
        with torch.no_grad():
            for parameter in lora_parameters(model):
                parameter.normal_()
        save_adapter(model, tmp_path / name, name)
        outputs[name] = model(X)
    model = load_adapter(net(), tmp_path / "cats", "cats")
    load_adapter(model, tmp_path / "dogs", "dogs")
    for name in ("cats", "dogs", "cats"):
        set_adapter(model, name)
        assert torch.equal(model(X), outputs[name])
    set_adapter(model, None)
    assert torch.equal(model(X), net()(X))


def test_a_lora_over_a_layer_that_another_adapter_trains_whole_is_refused(tmp_path):
    save_adapter(apply_lora(net(), rank=2, target_modules=["head.0"]), tmp_path)
    model = apply_lora(net(), rank=2, adapter="other", **WAYS["head"])
    with pytest.raises(ValueError, match=r"needs a linear layer 'head.0', and the model has none"):
        load_adapter(model, tmp_path)
    assert model.fc1.active_adapter == "other"


def test_values_that_the_models_dtype_cannot_hold_are_refused(tmp_path):
    model = apply_lora(net(), rank=2, **WAYS["head"])
    with torch.no_grad():
        model.head[0].adapters["default"].weight[0, 0] = 1e6
    save_adapter(model, tmp_path)
    other = net().half()
    with pytest.raises(ValueError, match=r"'base_model.model.head.0.weight' must be finite"):
        load_adapter(other, tmp_path)
    assert all(p.requires_grad for p in other.parameters())


def test_only_one_adapter_of_several_is_written(tmp_path):
    model = shaken(apply_lora(net(), rank=2, adapter="cats", bias="lora_only"))
    add_adapter(model, "dogs", LoRAConfig(rank=3))
    save_adapter(model, tmp_path, "dogs")
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["bias"] == "none"
    assert {t.shape[0] for k, t in load_file(tmp_path / WEIGHTS_FILE).items() if "lora_A" in k} == {3}


# ---------------------------------------------------------------- names


class Headed(nn.Module):
    """As Transformers builds them: a bare model under ``base_model_prefix``, and a head."""

    base_model_prefix = "model"

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.model, self.score = Bare(), nn.Linear(12, 3)

    def forward(self, x):
        return self.score(self.model(x))


class Bare(nn.Module):
    base_model_prefix = "model"

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_an_adapter_of_a_bare_transformers_model_loads_into_one_with_a_head_and_back(tmp_path):
    headed = Headed()
    bare = headed.model
    shaken(apply_lora(headed, rank=2, target_modules=["layers.0", "layers.1"], rank_pattern={"layers.1": 3}))
    expected = bare(X)
    save_adapter(bare, tmp_path / "bare")
    save_adapter(headed, tmp_path / "headed")
    assert torch.equal(load_adapter(Headed(), tmp_path / "bare").model(X), expected)
    plain = Headed().model
    assert torch.equal(load_adapter(plain, tmp_path / "headed")(X), expected)


def test_compiled_and_parallel_models_save_and_load_by_the_models_own_names(tmp_path):
    model = shaken(apply_lora(net(), rank=2))
    save_adapter(torch.compile(nn.DataParallel(model), backend="eager"), tmp_path)
    other = net()
    wrapped = torch.compile(other, backend="eager")
    assert load_adapter(wrapped, tmp_path) is wrapped
    assert torch.equal(other(X), model(X))


def test_a_saved_module_that_ends_anothers_name_is_said(tmp_path):
    model = nn.ModuleDict({"head": nn.Linear(12, 4), "ahead": nn.Linear(12, 4), "fc": nn.Linear(12, 4)})
    apply_lora(model, rank=2, target_modules=["fc"], modules_to_save=["head"])
    with pytest.warns(UserWarning, match="modules_to_save: PEFT will take 'ahead' too, as it ends in 'head'"):
        save_adapter(model, tmp_path)
    torch.manual_seed(0)
    plain = nn.ModuleDict({"head": nn.Linear(12, 4), "ahead": nn.Linear(12, 4), "fc": nn.Linear(12, 4)})
    load_adapter(plain, tmp_path)
    assert type(plain["ahead"]) is nn.Linear
    assert torch.equal(plain["head"].adapters["default"].weight, model["head"].adapters["default"].weight)


def test_strict_refuses_and_not_strict_reports(tmp_path):
    model = shaken(apply_lora(net(), rank=2, bias="lora_only", modules_to_save=["head"]))
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    del tensors["base_model.model.fc1.base_layer.bias"], tensors["base_model.model.head.0.bias"]
    tensors["base_model.model.fc9.lora_A.weight"] = torch.ones(2, 12)
    tensors["base_model.model.odd"] = torch.ones(2)
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    other = net()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: '"):
        load_adapter(other, tmp_path)
    assert all(p.requires_grad for p in other.parameters())
    with pytest.warns(UserWarning, match="ignored: .*; missing: ") as caught:
        load_adapter(other, tmp_path, strict=False)
    (message,) = [str(w.message) for w in caught]
    for name in ("fc9.lora_A.weight", "base_model.model.odd", "fc1.base_layer.bias", "head.0.bias"):
        assert name in message
    assert torch.equal(other.fc1.adapters["default"].bias, other.fc1.bias)
    assert torch.equal(other.head[0].adapters["default"].weight, model.head[0].adapters["default"].weight)
