"""A fused PEFT model in files and copies: PEFT's own files, copies that stay fused, pickles of PEFT's own."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft_models import TARGETS, K, Net, config, count_calls, draw_x, fused_model, layer, peft_model, unfused
from peft_models import same_as_peft as assert_same_as_peft
from torch import nn

from fused_lora.integrations.peft import FusedLinear, fuse


@pytest.fixture
def calls(monkeypatch):
    return count_calls(monkeypatch)


def test_a_fused_model_saves_the_very_files_of_an_unfused_one(tmp_path):
    model = fused_model()
    model.save_pretrained(tmp_path / "fused")
    unfused(model).save_pretrained(tmp_path / "peft")
    file = "adapter_model.safetensors"
    assert (tmp_path / "fused" / file).read_bytes() == (tmp_path / "peft" / file).read_bytes()
    fused, pefts = (json.loads((tmp_path / of / "adapter_config.json").read_text()) for of in ("fused", "peft"))
    # PEFT writes a set, in the order that it happens to have
    assert fused | {"target_modules": set(TARGETS)} == pefts | {"target_modules": set(TARGETS)}
    assert set(fused["target_modules"]) == set(pefts["target_modules"]) == set(TARGETS)
    state, other = get_peft_model_state_dict(model), get_peft_model_state_dict(unfused(model))
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_from_pretrained_then_fuse_gives_the_same_model(tmp_path, low_cpu_mem_usage, calls):
    net, x = Net(), draw_x()
    model = fused_model(copy.deepcopy(net))
    model.save_pretrained(tmp_path)
    again = fuse(PeftModel.from_pretrained(net, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True))
    assert torch.equal(again(x), model(x))
    assert len(calls) == 4
    assert_same_as_peft(again, x)


def test_loading_replaces_parameters_that_the_layer_must_not_remember(tmp_path, calls):
    model, x = fused_model(), draw_x()
    model(x)
    other = peft_model(copy.deepcopy(unfused(model).unload()))
    other.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default")
    assert torch.allclose(model(x), other(x), atol=1e-5)
    layer(model).lora_A["default"].weight = nn.Parameter(torch.zeros(4, K))
    assert_same_as_peft(model, x)
    model.to(torch.bfloat16)
    assert_same_as_peft(model, draw_x(dtype=torch.bfloat16))


def test_a_deep_copy_is_whole_fused_and_independent(calls):
    model, x = fuse(fused_model(target_modules=["first"]), impl="eager"), draw_x()
    other = copy.deepcopy(model)
    assert type(other) is type(model)
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert not {id(module) for module in other.modules()} & {id(module) for module in model.modules()}
    assert torch.equal(other(x), model(x))
    assert [call["impl"] for call in calls] == ["eager"] * 2
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same_as_peft(other, x)
    other.add_adapter("later", config(target_modules=["second"]))
    assert type(layer(other, "second")) is FusedLinear
    assert layer(other, "second").impl == "eager"


def test_a_shallow_copy_is_fused_and_shares_what_it_holds():
    model = fused_model()
    for module in (layer(model), model.base_model):
        other = copy.copy(module)
        assert type(other) is type(module)
        assert vars(other) == vars(module)


def _pickled(protocol):
    return lambda model, file: pickle.dump(model, file, protocol)


PICKLERS = {f"protocol {protocol}": _pickled(protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)} | {
    "torch.save": torch.save
}
LOAD_WITHOUT_US = """
import sys, pickle, torch
sys.modules["fused_lora"] = None  # importing it raises
x, expected, *paths = sys.argv[1:]
for path in paths:
    model = torch.load(path, weights_only=False) if path.endswith("torch.save") else pickle.load(open(path, "rb"))
    model.add_adapter("other", model.peft_config["default"])
    assert torch.equal(model(torch.load(x)), torch.load(expected)), path
assert not [name for name in sys.modules if name.startswith("fused_lora.")]
"""


def test_a_pickle_holds_pefts_own_model_and_loads_without_us(tmp_path, calls):
    model, x = fuse(peft_model(nn.Sequential(nn.Linear(K, 5), nn.Linear(5, 3)), target_modules=["0", "1"])), draw_x()
    expected = unfused(model)(x)
    paths = []
    for name, save in PICKLERS.items():
        paths.append(tmp_path / name)
        with paths[-1].open("wb") as file:
            save(model, file)
    again = torch.load(paths[-1], weights_only=False)
    assert [type(module) for module in again.modules()] == [type(module) for module in unfused(model).modules()]
    assert [vars(module).keys() for module in again.modules()] == [vars(m).keys() for m in unfused(model).modules()]
    assert torch.equal(again(x), expected)
    assert not calls
    assert torch.equal(fuse(again)(x), model(x))
    assert len(calls) == 4
    torch.save(x, tmp_path / "x")
    torch.save(expected.detach(), tmp_path / "expected")
    files = (tmp_path / "x", tmp_path / "expected", *paths)
    subprocess.run([sys.executable, "-c", LOAD_WITHOUT_US, *map(str, files)], check=True)
