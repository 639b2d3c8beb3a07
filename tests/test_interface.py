"""What every function of whole models has in common: names, fields, what it returns, what a plain model is to it."""

import pytest
import torch
from two_adapters import X, net, trained, two

from fused_lora import (
    FusedLoRALinear,
    LoRAConfig,
    add_adapter,
    add_weighted_adapter,
    apply_lora,
    delete_adapter,
    disable_adapters,
    merge,
    merge_and_unload,
    set_adapter,
    set_impl,
    unmerge,
)

BY_KEYWORD = {
    "add_adapter": lambda model, **name: add_adapter(model, config=LoRAConfig(rank=1), **name),
    "set_adapter": set_adapter,
    "delete_adapter": delete_adapter,
    "add_weighted_adapter": lambda model, **name: add_weighted_adapter(model, adapters=["cats"], weights=[2.0], **name),
}


@pytest.mark.parametrize("function", BY_KEYWORD)
def test_an_adapter_is_called_adapter_and_its_old_keyword_is_taken_with_a_warning(function):
    call, value = BY_KEYWORD[function], "new" if "add" in function else "dogs"
    model, old = two(), two()
    assert call(model, adapter=value) is model
    with pytest.warns(DeprecationWarning, match="name is called adapter now") as told:
        call(old, name=value)
    assert told[0].filename == __file__
    assert [*old.state_dict()] == [*model.state_dict()]
    assert old[0].active_adapters == model[0].active_adapters
    with pytest.raises(TypeError, match=f"{function} takes adapter or its old name name, got both"):
        call(two(), adapter=value, name=value)


def test_a_layers_own_functions_too():
    layer = FusedLoRALinear(4, 3, rank=2)
    layer.add_adapter(adapter="other", rank=1)
    with pytest.warns(DeprecationWarning, match="name is called adapter now"):
        layer.add_adapter(name="third")
    with pytest.warns(DeprecationWarning, match="names is called adapter now"):
        layer.set_adapter(names=["other", "third"])
    with pytest.warns(DeprecationWarning, match="name is called adapter now"):
        layer.delete_adapter(name="third")
    assert layer.active_adapters == ("other",)


def test_add_adapter_takes_fields_as_apply_lora_does():
    model = apply_lora(net(), rank=2)
    add_adapter(model, "dogs", rank=3, target_modules=["0"])
    add_adapter(model, "birds", LoRAConfig(rank=4, alpha=6), rank=1)
    assert (model[0].adapter("dogs").rank, [*model[2].adapters]) == (3, ["default", "birds"])
    assert (model[0].adapter("birds").rank, model[0].adapter("birds").alpha) == (1, 6.0)
    for function in (lambda **fields: apply_lora(net(), **fields), lambda **fields: add_adapter(model, "x", **fields)):
        with pytest.raises(TypeError, match=r"LoRAConfig has no field 'r'; did you mean 'rank'\?"):
            function(r=4)
    assert "x" not in model[0].adapters


IN_PLACE = {
    "apply_lora": lambda model: apply_lora(model, adapter="new"),
    "add_adapter": lambda model: add_adapter(model, "new"),
    "set_adapter": lambda model: set_adapter(model, "dogs"),
    "delete_adapter": lambda model: delete_adapter(model, "dogs"),
    "add_weighted_adapter": lambda model: add_weighted_adapter(model, "new", ["cats"], [1.0]),
    "set_impl": lambda model: set_impl(model, "eager"),
    "merge": merge,
    "unmerge": unmerge,
    "merge_and_unload": merge_and_unload,
}


@pytest.mark.parametrize("function", IN_PLACE)
def test_what_changes_a_model_in_place_returns_it(function):
    model = two()
    assert IN_PLACE[function](model) is model


def test_a_plain_model_is_what_set_adapter_none_and_disable_adapters_leave():
    model = net()
    expected = model(X)
    for nothing in (None, [], {}):
        assert set_adapter(model, nothing) is model
    with disable_adapters(model):
        assert torch.equal(model(X), expected)
    assert merge(unmerge(model)) is model
    assert all(p.requires_grad for p in model.parameters())
    for call in (set_adapter, delete_adapter):
        with pytest.raises(ValueError, match="adapter 'default' is not here; adapters: none; call apply_lora"):
            call(model, "default")
    with pytest.raises(ValueError, match="model must have adapted layers, got none"):
        set_impl(model, "eager")


def test_set_impl_reaches_every_layer_and_is_checked_first():
    model = trained(apply_lora(net(), rank=2))
    expected = model(X)
    set_impl(model, "eager")
    assert [layer.impl for layer in model if isinstance(layer, FusedLoRALinear)] == ["eager"] * 2
    torch.testing.assert_close(model(X), expected)
    with pytest.raises(ValueError, match="impl must be one of"):
        set_impl(model, "fast")
    assert model[0].impl == "eager"
