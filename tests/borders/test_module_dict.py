"""``layer.adapters`` is an ``nn.ModuleDict``: what is put into it is what is computed, saved, copied and compiled."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from fused_lora import FusedLoRALinear, apply_lora, load_adapter, save_adapter, set_adapter
from fused_lora.adapter import AdapterOptions, LoRAAdapter

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def layer_of_two():
    layer = FusedLoRALinear(8, 8, rank=2)
    layer.add_adapter("idle", rank=2)
    for adapter in layer.adapters.values():
        nn.init.normal_(adapter.lora_B)
    return layer


def another(rank=2):
    adapter = LoRAAdapter(8, 8, AdapterOptions(rank=rank))
    nn.init.normal_(adapter.lora_B)
    return adapter


def expected(layer, *adapters):
    y = nn.functional.linear(X, layer.weight, layer.bias)
    return y + sum(a.scale * X @ a.lora_A.t() @ a.lora_B.t() for a in adapters)


def register(layer, new):
    layer.adapters.register_module("default", new)


def set_submodule(layer, new):
    layer.set_submodule("adapters.default", new)


WAYS = {
    "item": lambda layer, new: layer.adapters.__setitem__("default", new),
    "update": lambda layer, new: layer.adapters.update({"default": new}),
    "attribute": lambda layer, new: setattr(layer.adapters, "default", new),
    "add_module": lambda layer, new: layer.adapters.add_module("default", new),
    "register_module": register,
    "set_submodule": set_submodule,
    "install": lambda layer, new: layer.install("default", new),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_put_in_the_place_of_an_active_one_is_computed_trained_and_saved(way, tmp_path):
    model = nn.Sequential(layer_of_two())
    layer, new = model[0], another(rank=3)
    layer(X)
    WAYS[way](layer, new)
    assert layer.active_adapter == "default"
    assert (layer.lora_A, layer.lora_B) == (new.lora_A, new.lora_B)
    y = layer(X)
    torch.testing.assert_close(y, expected(layer, new))
    y.sum().backward()
    assert new.lora_B.grad is not None
    save_adapter(model, tmp_path)
    loaded = load_adapter(nn.Sequential(nn.Linear(8, 8)), tmp_path)
    assert torch.equal(loaded[0].lora_B, new.lora_B)
    layer.merge()
    torch.testing.assert_close(layer(X), expected_base(layer) + new.scale * X @ new.lora_A.t() @ new.lora_B.t())


def expected_base(layer):
    weight, bias = layer._base()
    return nn.functional.linear(X, weight, bias)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "install"])
def test_no_other_takes_the_place_of_an_adapter_that_is_merged(way):
    layer = layer_of_two()
    before = layer.adapter("default")
    layer.merge()
    merged = layer(X)
    with pytest.raises(ValueError, match="adapter 'default' is merged into the weight; unmerge before another"):
        WAYS[way](layer, another())
    assert layer.adapter("default") is before
    assert torch.equal(layer(X), merged)
    layer.adapters.update({"idle": another()})
    layer.unmerge()
    WAYS[way](layer, another())
    torch.testing.assert_close(layer(X), expected(layer, layer.adapter("default")))


def test_installing_over_a_merged_adapter_unmerges_first():
    layer, new = layer_of_two(), another()
    weight = layer.weight.clone()
    layer.merge()
    layer.install("default", new)
    assert torch.equal(layer.weight, weight)
    torch.testing.assert_close(layer(X), expected(layer, new))


def test_installing_in_the_place_of_a_frozen_or_an_idle_adapter_trains_nothing():
    layer, new, idle = layer_of_two(), another(), another()
    layer.set_adapter("default", trainable=False)
    layer.install("default", new)
    layer.install("idle", idle)
    assert not any(parameter.requires_grad for parameter in (*new.parameters(), *idle.parameters()))
    torch.testing.assert_close(layer(X), expected(layer, new))


TAKEN_AWAY = {
    "del": lambda adapters: adapters.__delitem__("default"),
    "pop": lambda adapters: adapters.pop("default"),
    "clear": lambda adapters: adapters.clear(),
    "delattr": lambda adapters: delattr(adapters, "default"),
}


@pytest.mark.parametrize("way", TAKEN_AWAY)
def test_an_active_adapter_is_not_taken_away_unsaid(way):
    layer = layer_of_two()
    before = layer(X)
    with pytest.raises(ValueError, match="adapter 'default' is active; delete it by delete_adapter"):
        TAKEN_AWAY[way](layer.adapters)
    assert [*layer.adapters] == ["default", "idle"]
    assert torch.equal(layer(X), before)
    layer.set_adapter(None)
    TAKEN_AWAY[way](layer.adapters)
    assert "default" not in layer.adapters
    assert torch.equal(layer(X), expected_base(layer))


def test_an_idle_adapter_is_taken_away_and_replaced_freely():
    layer = layer_of_two()
    before = layer(X)
    layer.adapters["idle"] = another()
    del layer.adapters["idle"]
    assert torch.equal(layer(X), before)
    with pytest.raises(ValueError, match="adapter 'idle' is not here"):
        layer.set_adapter("idle")


def saved_and_loaded(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("names", ["default", ["idle", "default"], None], ids=str)
def test_a_copy_computes_with_adapters_of_its_own(way, names):
    layer = layer_of_two()
    layer.set_adapter(names)
    copied = COPIES[way](layer)
    assert torch.equal(copied(X), layer(X))
    assert copied.active_adapters == layer.active_adapters
    before = layer(X)
    with torch.no_grad():
        for adapter in copied.adapters.values():
            adapter.lora_B.zero_()
    assert torch.equal(copied(X), expected_base(layer))
    assert torch.equal(layer(X), before)
    copied.adapters["default"] = new = another()
    copied.set_adapter("default")
    torch.testing.assert_close(copied(X), expected(copied, new))


def test_functional_call_computes_with_the_tensors_given_to_it():
    layer, new = layer_of_two(), another()
    given = {f"adapters.default.{name}": tensor.detach() for name, tensor in new.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(layer, given, (X,)), expected(layer, new))


def test_a_compiled_layer_computes_what_was_put_in_without_compiling_again():
    torch._dynamo.reset()
    layer = layer_of_two()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    compiled(X)
    with torch._dynamo.config.patch(error_on_recompile=True):
        layer.adapters["default"] = new = another()
        torch.testing.assert_close(compiled(X), expected(layer, new))
        layer.set_adapter("idle")
        torch.testing.assert_close(compiled(X), expected(layer, layer.adapter("idle")))
    torch._dynamo.reset()


def test_a_head_put_in_the_place_of_another_is_called():
    model = apply_lora(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), rank=2, modules_to_save=["1"])
    head = nn.Linear(8, 8)
    model[1].adapters["default"] = head
    torch.testing.assert_close(model(X), head(model[0](X)))
    with pytest.raises(ValueError, match="adapter 'default' is active"):
        del model[1].adapters["default"]
    set_adapter(model, None)
    del model[1].adapters["default"]
    assert torch.equal(model(X), model[1](expected_base(model[0])))


def test_names_and_printing_are_those_of_a_module_dict():
    layer = layer_of_two()
    assert isinstance(layer.adapters, nn.ModuleDict)
    assert "(adapters): ModuleDict(" in repr(layer)
    assert [*layer.state_dict()] == [
        "weight", "bias", "adapters.default.lora_A", "adapters.default.lora_B",
        "adapters.idle.lora_A", "adapters.idle.lora_B",
    ]  # fmt: skip
