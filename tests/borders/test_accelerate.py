"""accelerate's hooks put a forward on each module: adapters are computed whenever the hooks came, went or moved."""

import copy
import functools
import types

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_module,
    remove_hook_from_submodules,
)
from peft import LoraConfig, get_peft_model
from quantized_layers import KINDS
from torch import nn
from two_adapters import X, net, trained

from fused_lora import (
    FusedLoRALinear,
    add_adapter,
    apply_lora,
    base_state_dict,
    disable_adapters,
    load_adapter,
    lora_parameters,
    merge,
    merge_and_unload,
    quantize_base,
    save_adapter,
    set_adapter,
    summary,
    unmerge,
)
from fused_lora.integrations.peft import fuse, unfuse
from fused_lora.integrations.peft import summary as peft_summary


class Counting(ModelHook):
    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def values_of(model):
    """Draws every adapter tensor again, the same whatever the model went through."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def plain(**fields):
    """The same model without any hook."""
    return values_of(apply_lora(net(), rank=2, **fields))


def hooked(model):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    return model


FIELDS = {"both": {}, "head": {"target_modules": ["0"], "modules_to_save": ["2"], "bias": "lora_only"}}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize(
    "around",
    [
        "before", "after", "before and removed", "after and removed", "removed before", "twice", "parent", "sequential",
    ],
)  # fmt: skip
def test_adapters_compute_train_and_leave_whenever_hooks_come_and_go(around, fields, tmp_path):
    expected, model, counting = plain(**fields), net(), Counting()

    def add(module, append=False):
        add_hook_to_module(module, counting, append=append)

    if around in ("before", "before and removed", "removed before", "twice"):
        add(model[0])
        add(model[2])
    if around == "sequential":
        for module in (model[0], model[2]):
            add_hook_to_module(module, SequentialHook(AlignDevicesHook(execution_device="cpu"), ModelHook()))
            add(module, append=True)
    if around == "parent":
        add(model)
    if around == "removed before":
        remove_hook_from_submodules(model)
    apply_lora(model, rank=2, **fields)
    values_of(model)
    if around in ("after", "after and removed", "twice"):
        add(model[0])
        add(model[2])
    if around.endswith("and removed"):
        remove_hook_from_submodules(model)
    assert torch.equal(model(X), expected(X))
    assert (counting.calls > 0) == ("removed" not in around)
    with disable_adapters(model):
        assert torch.equal(model(X), net()(X))
    for each in (model, expected):
        each(X).sin().sum().backward()
    for ours, theirs in zip(lora_parameters(model), lora_parameters(expected), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(hooked(net()), tmp_path)(X), expected(X))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(X), expected(X))
    merge(model)
    assert torch.equal(model(X), merge(expected)(X))
    unmerge(model)
    merge_and_unload(model)
    assert type(model[0]) is type(model[2]) is nn.Linear
    assert torch.equal(model(X), merge_and_unload(expected)(X))
    remove_hook_from_submodules(model)
    assert torch.equal(model(X), expected(X))
    apply_lora(model, rank=1)
    nn.init.normal_(model[2].lora_B)
    assert not torch.equal(model(X), expected(X))
    # a copy is another model
    assert not torch.equal(copied(X), expected(X)) or "head" not in str(fields)


def offloaded_to_cpu(model, tmp_path):
    cpu_offload(model, "cpu")


def offloaded_to_disk(model, tmp_path):
    disk_offload(model, tmp_path / "offload", "cpu")


def dispatched(model, tmp_path):
    device_map = {"0": "cpu", "1": "cpu", "2": "disk"}
    dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path / "offload", force_hooks=True)


WAYS = [offloaded_to_cpu, offloaded_to_disk, dispatched]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fields", [{}, {"bias": "lora_only"}, {"init": "gaussian", "alpha": 3.0}], ids=str)
def test_adapters_over_an_offloaded_base_are_real_trained_saved_and_loaded(way, fields, tmp_path):
    expected, model = plain(**fields), net()
    way(model, tmp_path)
    assert model[2].weight.is_meta
    apply_lora(model, rank=2, **fields)
    values_of(model)
    assert not any(parameter.is_meta for parameter in lora_parameters(model))
    assert "meta" not in str(summary(model))
    optimizers = [torch.optim.SGD(lora_parameters(each), lr=0.1) for each in (model, expected)]
    for _ in range(2):
        for each, optimizer in zip((model, expected), optimizers, strict=True):
            each(X).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(model(X), expected(X))
    with disable_adapters(model):
        assert torch.equal(model(X), net()(X))
    base, state = net().state_dict(), base_state_dict(model)
    assert [*state] == [*base]
    assert all(torch.equal(state[name], base[name]) for name in base)
    save_adapter(model, tmp_path / "adapter")
    other = net()
    way(other, tmp_path / "other")
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other(X), expected(X))
    add_adapter(other, "second", rank=3)
    set_adapter(other, "second")
    assert torch.equal(other(X), net()(X))
    assert model[2].weight.is_meta


@pytest.mark.parametrize("way", WAYS)
def test_adapters_that_are_offloaded_with_their_model_come_back_at_once(way, tmp_path):
    expected, model = plain(), plain()
    way(model, tmp_path)
    assert model[2].weight.is_meta
    assert not any(parameter.is_meta for parameter in lora_parameters(model))
    assert all(parameter.requires_grad for parameter in lora_parameters(model))
    assert torch.equal(model(X), expected(X))
    expected(X).sum().backward()
    model(X).sum().backward()
    for ours, theirs in zip(lora_parameters(model), lora_parameters(expected), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(load_adapter(net(), tmp_path / "adapter")(X), expected(X))
    remove_hook_from_submodules(model)
    assert torch.equal(model(X), expected(X))


@pytest.mark.parametrize("way", WAYS)
def test_an_offloaded_weight_is_not_merged_into_and_nothing_is_changed(way, tmp_path):
    expected, model = plain(), net()
    way(model, tmp_path)
    values_of(apply_lora(model, rank=2))
    for action in (merge, merge_and_unload):
        with pytest.raises(ValueError, match=r"[02]: a weight that accelerate offloads can't be merged into; call acc"):
            action(model)
        assert not any(layer.merged for layer in (model[0], model[2]))
        assert torch.equal(model(X), expected(X))
    remove_hook_from_submodules(model)
    assert torch.equal(merge_and_unload(model)(X), merge_and_unload(expected)(X))


@pytest.mark.parametrize("way", WAYS)
def test_an_offloaded_model_without_an_active_adapter_is_unloaded(way, tmp_path):
    model = net()
    way(model, tmp_path)
    set_adapter(apply_lora(model, rank=2), None)
    merge_and_unload(model)
    assert type(model[2]) is nn.Linear
    assert torch.equal(model(X), net()(X))


def test_copies_of_offloaded_modules_are_refused(tmp_path):
    model = net()
    cpu_offload(model, "cpu")
    for fields in ({"modules_to_save": ["2"]}, {"bias": "all"}):
        with pytest.raises(ValueError, match="must leave out what accelerate offloads, got '2'"):
            apply_lora(model, target_modules=["0"], **fields)
        assert type(model[0]) is nn.Linear
    assert torch.equal(model(X), net()(X))


@pytest.mark.parametrize("way", WAYS)
def test_copies_that_are_offloaded_with_their_model_compute_and_come_back_to_be_trained(way, tmp_path):
    fields = FIELDS["head"]
    expected, model = plain(**fields), plain(**fields)
    way(model, tmp_path)
    assert torch.equal(model(X), expected(X))
    with disable_adapters(model):
        assert torch.equal(model(X), net()(X))
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(load_adapter(net(), tmp_path / "adapter")(X), expected(X))
    parameters = lora_parameters(model)
    assert not any(parameter.is_meta for parameter in parameters)
    for each in (model, expected):
        each(X).sum().backward()
    for ours, theirs in zip(parameters, lora_parameters(expected), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    with pytest.raises(ValueError, match="a weight that accelerate offloads can't be "):
        merge_and_unload(model)
    assert torch.equal(model(X), expected(X))
    remove_hook_from_submodules(model)
    assert torch.equal(merge_and_unload(model)(X), merge_and_unload(expected)(X))


def test_adapters_that_a_block_offloads_with_the_rest_are_not_saved_without_values(tmp_path):
    model, expected = plain(), plain()
    add_hook_to_module(model, AlignDevicesHook("cpu", offload=True, place_submodules=True))
    assert torch.equal(model(X), expected(X))
    with pytest.raises(ValueError, match=r"0\.lora_A\.weight' must have values to be saved, got a tensor on meta"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    remove_hook_from_submodules(model)
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(load_adapter(net(), tmp_path / "adapter")(X), expected(X))


def test_a_block_that_is_offloaded_as_a_whole_is_refused():
    model = nn.Sequential(net(), net())
    add_hook_to_module(model[1], AlignDevicesHook("cpu", offload=True, place_submodules=True))
    before = model[0](X)
    with pytest.raises(ValueError, match=r"'1.0' must not be offloaded by accelerate as a part of '1'"):
        apply_lora(model, rank=2)
    assert type(model[0][0]) is nn.Linear
    assert torch.equal(model[0](X), before)


# ---------------------------------------------------------------- forwards of others


def a_function(module):
    module.forward = lambda x: x


def a_method_of_another(module):
    module.forward = types.MethodType(lambda self, x: x, module)


def a_wrapper(module):
    module.forward = functools.partial(nn.Linear.forward, module)


def of_another_module(module):
    module.forward = nn.Linear(module.in_features, module.out_features).forward


def hooked_over_a_function(module):
    a_function(module)
    add_hook_to_module(module, ModelHook())


UNKNOWN = [a_function, a_method_of_another, a_wrapper, of_another_module, hooked_over_a_function]


@pytest.mark.parametrize("put", UNKNOWN)
def test_a_layer_with_an_unknown_forward_is_refused_by_its_path(put, tmp_path):
    save_adapter(plain(), tmp_path)
    model = net()
    put(model[2])
    grads, before = [p.requires_grad for p in model.parameters()], vars(model[2])["forward"]
    for action in (
        lambda: apply_lora(model, rank=2),
        lambda: apply_lora(model, rank=2, target_modules=["0"], modules_to_save=["2"]),
        lambda: add_adapter(model, "other"),
        lambda: load_adapter(model, tmp_path),
    ):
        with pytest.raises(ValueError, match=r"'2' must have the forward of its class, got another"):
            action()
        assert type(model[0]) is type(model[2]) is nn.Linear
        assert [p.requires_grad for p in model.parameters()] == grads
        assert vars(model[2])["forward"] is before
    with pytest.raises(ValueError, match="must have the forward of its class"):
        FusedLoRALinear.adopt(model[2])


@pytest.mark.parametrize("put", UNKNOWN)
def test_a_forward_that_came_after_the_adapters_keeps_them_from_being_dropped(put):
    model = plain()
    weight = model[2].weight.clone()
    put(model[2])
    with pytest.raises(ValueError, match="'2' must have the forward of its class"):
        merge_and_unload(model)
    assert isinstance(model[0], FusedLoRALinear)
    assert torch.equal(model[2].weight, weight)


# ---------------------------------------------------------------- PEFT's layers, quantized ones


def test_fuse_computes_layers_that_were_hooked_before():
    torch.manual_seed(0)
    model = trained(get_peft_model(net(), LoraConfig(r=2, target_modules=["0", "2"])))
    expected, counting = model(X), Counting()
    layer = model.base_model.model[0]
    add_hook_to_module(layer, counting)
    fuse(model)
    assert {row.implementation for row in peft_summary(model).layers} == {"eager"}
    torch.testing.assert_close(model(X), expected)
    assert counting.calls == 1
    remove_hook_from_module(layer)
    torch.testing.assert_close(model(X), expected)
    assert {row.implementation for row in peft_summary(model).layers} == {"eager"}
    assert torch.equal(unfuse(model)(X), expected)


def test_fuse_refuses_a_layer_with_an_unknown_forward():
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0", "2"]))
    a_function(model.base_model.model[2])
    with pytest.raises(ValueError, match=r"'base_model.model.2' must have the forward of its class"):
        fuse(model)
    assert type(model.base_model.model[0]).__module__.startswith("peft")


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_layers_that_were_hooked_before_compute_their_adapters(kind):
    torch.manual_seed(0)
    layer = KINDS[kind](64, 64)
    model, x = nn.Sequential(layer), torch.randn(3, 64, dtype=torch.bfloat16)
    expected = values_of(apply_lora(copy.deepcopy(model), rank=2))(x)
    values_of(apply_lora(hooked(model), rank=2))
    assert torch.equal(model(x), expected)


def test_a_hooked_model_is_quantized_with_its_adapters_in_place():
    torch.manual_seed(0)
    model, x = values_of(apply_lora(hooked(nn.Sequential(nn.Linear(64, 64))), rank=2)), torch.randn(3, 64)
    same = values_of(apply_lora(nn.Sequential(copy.deepcopy(nn.Linear(64, 64))), rank=2))
    same[0].load_state_dict(model[0].state_dict())
    quantize_base(model, "nf4")
    quantize_base(same, "nf4")
    assert torch.equal(model(x), same(x))
    merge_and_unload(model, dequantize=True)
    assert torch.equal(model(x), merge_and_unload(same, dequantize=True)(x))


def test_a_hook_that_moves_an_adapted_head_moves_the_bases_own_values(monkeypatch):
    """As to another device, which a CPU can't show: there accelerate makes new Parameters of what it reads by name."""
    fields = FIELDS["head"]
    expected, model = plain(**fields), plain(**fields)
    monkeypatch.setattr("accelerate.utils.modeling.check_device_same", lambda *devices: False)
    add_hook_to_module(model[2], AlignDevicesHook(execution_device="cpu"))
    base = model[2]._parameters["weight"]
    assert not base.requires_grad
    assert torch.equal(base, net()[2].weight)
    assert torch.equal(model(X), expected(X))
    with disable_adapters(model):
        assert torch.equal(model(X), net()(X))
    add_hook_to_module(model[2], ModelHook(), append=True)
    assert torch.equal(model[2]._parameters["weight"], net()[2].weight)
    copied = copy.deepcopy(model)
    remove_hook_from_submodules(model)
    for each in (model, copied):
        assert torch.equal(each(X), expected(X))
        merge_and_unload(each)
        assert type(each[2]) is nn.Linear
    assert torch.equal(model(X), copied(X))
