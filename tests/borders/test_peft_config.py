"""PEFT's ``LoraConfig`` handed to our functions."""

import copy

import pytest
import torch
from torch import nn

from fused_lora import LoRAConfig, add_adapter, apply_lora
from fused_lora.models.apply import lora_layers

peft = pytest.importorskip("peft")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 12), nn.Linear(12, 4))


KINDS = {
    "plain": {"target_modules": ["0", "3"]},
    "numbers": {"target_modules": ["0", "2"], "lora_alpha": 16, "lora_dropout": 0.25, "use_rslora": True},
    "regex": {"target_modules": "[02]", "rank_pattern": {"2": 3}, "alpha_pattern": {"0": 5}},
    "all": {"target_modules": "all-linear", "exclude_modules": ["2"]},
    "saved": {
        "target_modules": ["0"],
        "modules_to_save": ["3"],
        "task_type": "FEATURE_EXTRACTION",
        "fan_in_fan_out": False,
    },
    "bias": {"target_modules": ["0"], "bias": "all", "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["positional", "keyword", "add_adapter"])
def test_it_makes_the_adapters_that_get_peft_model_makes(kind, way):
    config = peft.LoraConfig(r=2, **KINDS[kind])
    # PEFT writes into the config that it gets
    theirs = peft.get_peft_model(net(), copy.deepcopy(config))
    if way == "positional":
        model = apply_lora(net(), config)
    elif way == "keyword":
        model = apply_lora(net(), config=config)
    else:
        model = add_adapter(net(), "default", config)
    layers = {path: m for path, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    adapters = {path: layer.adapter("default") for path, layer in lora_layers(model)}
    assert {*adapters} == {*layers}
    for path, layer in layers.items():
        assert adapters[path].lora_A.shape == layer.lora_A["default"].weight.shape
        assert adapters[path].scale == pytest.approx(layer.scaling["default"])
        assert adapters[path].dropout == getattr(layer.lora_dropout["default"], "p", 0.0)
        assert adapters[path].init == ("gaussian" if kind == "bias" else "kaiming")
    if way != "add_adapter":
        ours = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert ours == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


def test_keywords_win_over_it():
    model = apply_lora(net(), peft.LoraConfig(r=2, target_modules=["0", "2"]), rank=5, target_modules=["2"])
    assert type(model[0]) is nn.Linear
    assert model[2].adapter("default").rank == 5


REFUSED = [
    ({"use_dora": True}, "use_dora=True, which is not supported yet"),
    ({"lora_bias": True}, "lora_bias=True, which is not supported yet"),
    ({"layers_to_transform": [0]}, r"layers_to_transform=\[0\], which is not supported yet"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which is not supported yet"),
    ({"init_lora_weights": False}, "init_lora_weights=False, which is not supported yet"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices="),
    ({"target_modules": None}, "target_modules of PEFT's LoraConfig must be given"),
    ({"r": 0}, "rank must be at least 1, got 0"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_it_asks_for_beyond_a_plain_lora_is_named(fields, message):
    model = net()
    config = peft.LoraConfig(**{"target_modules": ["0"], **{k: v for k, v in fields.items() if k != "r"}})
    config.r = fields.get("r", 8)
    with pytest.raises(ValueError, match=message):
        apply_lora(model, config)
    assert [type(module) for module in model] == [type(module) for module in net()]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_other_configs_of_peft_and_things_that_are_none():
    with pytest.raises(ValueError, match="config must be a LoRAConfig or PEFT's LoraConfig, got peft_type 'IA3'"):
        apply_lora(net(), peft.IA3Config(target_modules=["0"], feedforward_modules=[]))
    for call in (lambda: apply_lora(net(), 8), lambda: add_adapter(net(), "b", 8)):
        with pytest.raises(TypeError, match=r"config must be a LoRAConfig.*got 8; fields are keywords: rank=8"):
            call()
    with pytest.raises(TypeError, match=r"got \{'rank': 8\}; pass its items as keywords"):
        apply_lora(net(), {"rank": 8})
    assert apply_lora(net(), LoRAConfig(rank=2))[0].adapter("default").rank == 2
