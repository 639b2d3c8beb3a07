"""Several adapters at once, and nothing paid for those that are not active."""

import copy
import math

import oracle
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from two_adapters import X, net, trained, two

from fused_lora import (
    FusedLoRALinear,
    LoRAConfig,
    add_adapter,
    add_weighted_adapter,
    apply_lora,
    delete_adapter,
    disable_adapters,
    hotswap_adapter,
    load_adapter,
    lora_parameters,
    merge,
    merge_and_unload,
    save_adapter,
    set_adapter,
    summary,
    unmerge,
)


def by_hand(layer, x, names):
    """The sum of what the adapters add, one by one, in float64."""
    y = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    for adapter in map(layer.adapter, names):
        y = y + adapter.scale * (x.double() @ adapter.lora_A.double().t()) @ adapter.lora_B.double().t()
    return y


def product(adapter):
    return adapter.scale * adapter.lora_B @ adapter.lora_A


# ---------------------------------------------------------------- several at once


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_active_adapters_add_up_within_the_budget_of_one_of_all_their_ranks(dtype):
    layer = trained(FusedLoRALinear(40, 30, rank=2, alpha=3, dtype=dtype))
    layer.add_adapter("other", rank=5, alpha=-1)
    trained(layer)
    layer.set_adapter(["default", "other"])
    x = torch.randn(64, 40).to(dtype)
    exact = by_hand(layer, x, ["default", "other"])
    eager = nn.functional.linear(x, layer.weight, layer.bias)
    for adapter in layer.active_modules():
        eager = eager + (x @ adapter.lora_A.t()) @ adapter.lora_B.t() * adapter.scale
    oracle.within("y", layer(x).detach(), eager.detach(), exact.detach())


def test_each_active_adapter_gets_the_gradients_of_its_own():
    model = two()
    set_adapter(model, ["cats", "dogs"])
    model(X).sin().sum().backward()
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    y = by_hand(exact[0], X, ["cats", "dogs"]).tanh()
    by_hand(exact[2], y, ["cats", "dogs"]).sin().sum().backward()
    for ours, truth in zip(lora_parameters(model), lora_parameters(exact), strict=True):
        torch.testing.assert_close(ours.grad.double(), truth.grad, rtol=1e-4, atol=1e-4)


def test_several_are_one_call_and_idle_ones_none(monkeypatch):
    from fused_lora import layer

    calls = []
    real = layer.lora_linear
    monkeypatch.setattr(layer, "lora_linear", lambda *a, **k: calls.append(a[2].shape[0]) or real(*a, **k))
    model = two()
    model(X)
    assert calls == [2, 2]
    set_adapter(model, ["dogs", "cats"])
    model(X)
    assert calls == [2, 2, 5, 5]
    assert [row.rank for row in summary(model).layers] == [5, 5]
    assert "dogs+cats" in str(summary(model))
    set_adapter(model, None)
    model(X)
    assert calls == [2, 2, 5, 5]


def test_peft_computes_the_same_with_both_active():
    torch.manual_seed(0)
    peft = get_peft_model(net(), LoraConfig(r=2, lora_alpha=2, target_modules=["0", "2"]), "cats")
    peft.add_adapter("dogs", LoraConfig(r=3, lora_alpha=5, target_modules=["0"]))
    trained(peft).eval()
    model = two(target_modules=["0"]).eval()
    with torch.no_grad():
        for place, name in (("0", "cats"), ("2", "cats"), ("0", "dogs")):
            theirs, ours = peft.base_model.model.get_submodule(place), model.get_submodule(place).adapter(name)
            ours.lora_A.copy_(theirs.lora_A[name].weight)
            ours.lora_B.copy_(theirs.lora_B[name].weight)
    peft.base_model.set_adapter(["cats", "dogs"])
    set_adapter(model, ["cats", "dogs"])
    torch.testing.assert_close(model(X), peft(X), rtol=1e-5, atol=1e-5)
    assert model[2].active_adapters == ("cats",)


def test_one_that_is_deleted_leaves_the_others_active():
    model = two()
    set_adapter(model, ["cats", "dogs"])
    delete_adapter(model, "cats")
    assert model[0].active_adapters == ("dogs",)
    torch.testing.assert_close(model[0](X).double(), by_hand(model[0], X, ["dogs"]), rtol=1e-5, atol=1e-5)


def test_the_one_active_adapter_cannot_be_spoken_of_where_several_are():
    model = two()
    set_adapter(model, ["cats", "dogs"])
    for attribute in ("active_adapter", "lora_A", "lora_B", "scale"):
        with pytest.raises(RuntimeError, match=r"one adapter must be active .*, got \['cats', 'dogs'\]"):
            getattr(model[0], attribute)
    assert "active_adapter=['cats', 'dogs']" in repr(model[0])


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["cats", "cats"], ValueError, r"adapter names must differ, got \['cats', 'cats'\]"),
        (["cats", "birds"], ValueError, "adapter 'birds' is not here; adapters: 'cats', 'dogs'"),
        (3, TypeError, "adapter names must be a str, a list of them, a mapping of them to strengths, or None"),
        ([3], TypeError, "adapter names must be a str"),
        ({3: 1.0}, TypeError, "adapter names must be a str"),
        ({"dogs": 1.0, "birds": 1.0}, ValueError, "adapter 'birds' is not here"),
        ({"dogs": float("inf")}, ValueError, "strength of adapter 'dogs' must be a finite number, got inf"),
        ({"dogs": "1"}, TypeError, "strength of adapter 'dogs' must be a finite number, got '1'"),
    ],
)
def test_names_that_are_wrong_change_nothing(names, error, message):
    model = two()
    grads = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        set_adapter(model, names)
    assert model[0].active_adapters == ("cats",)
    assert [p.requires_grad for p in model.parameters()] == grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_merge_as_their_sum_rounded_once_and_unmerge_bit_for_bit(dtype):
    model = two().to(dtype)
    set_adapter(model, ["cats", "dogs"])
    layer = model[0]
    before = layer.weight.clone()
    exact = before.double() + sum(
        adapter.scale * adapter.lora_B.double() @ adapter.lora_A.double() for adapter in layer.active_modules()
    )
    merge(model)
    torch.testing.assert_close(layer.weight.double(), exact, rtol=torch.finfo(dtype).eps / 2 + 1e-6, atol=1e-5)
    merge(model)
    unmerge(model)
    assert torch.equal(layer.weight, before)
    plain = layer.to_linear()
    assert torch.equal(plain.weight, merge_and_unload(model)[0].weight)


def test_extending_an_adapter_to_more_layers_keeps_the_first_ones_training():
    model = apply_lora(net(), rank=2, target_modules=["0"])
    apply_lora(model, rank=3, target_modules=["2"])
    assert [p.requires_grad for p in lora_parameters(model)] == [True] * 4


def test_switching_allocates_no_tensor_and_keeps_every_parameter():
    model = two()
    before = [id(p) for p in model.parameters()]

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise AssertionError(f"{func} was called")

    with Spy():
        set_adapter(model, "dogs")
        set_adapter(model, ["dogs", "cats"])
        with disable_adapters(model):
            pass
        set_adapter(model, None)
    assert [id(p) for p in model.parameters()] == before


# ---------------------------------------------------------------- strengths


@pytest.mark.parametrize(
    "strengths", [{"cats": 0.5}, {"dogs": -2.0, "cats": 0.25}, {"cats": 0.0, "dogs": 1.0}], ids=str
)
def test_a_strength_is_a_factor_of_scale_in_forward_training_and_merging(strengths):
    model, same = two(), two()
    for layer in (same[0], same[2]):
        for name, strength in strengths.items():
            layer.adapter(name).alpha *= strength
    assert set_adapter(model, strengths) is model
    set_adapter(same, [*strengths])
    assert model[0].strengths == strengths
    assert torch.equal(model(X), same(X))
    for each in (model, same):
        each(X).sin().sum().backward()
    for ours, theirs in zip(lora_parameters(model), lora_parameters(same), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    merge(model)
    merge(same)
    assert torch.equal(model[0].weight, same[0].weight)


def test_another_strength_unmerges_and_none_is_one_again():
    model = two()
    whole, weight = model(X), model[0].weight.clone()
    set_adapter(model, {"cats": 0.5})
    assert (model[0].scale, model[0].adapter("cats").alpha) == (0.5, 2.0)
    assert "strength=0.5" in repr(model[0])
    assert "0.5·cats" in str(summary(model))
    merge(model)
    set_adapter(model, {"cats": 0.5})
    assert model[0].merged
    set_adapter(model, {"cats": 0.25})
    assert torch.equal(model[0].weight, weight)
    set_adapter(model, {"cats": 0.5, "dogs": 2})
    delete_adapter(model, "dogs")
    assert model[0].strengths == {"cats": 0.5}
    set_adapter(model, None)
    assert model[0].adapter("cats").strength == 1.0
    set_adapter(model, "cats")
    assert torch.equal(model(X), whole)


def test_strengths_are_neither_saved_nor_combined_nor_lost_in_a_swap(tmp_path):
    model = two()
    whole = model(X)
    set_adapter(model, {"cats": 0.5})
    half = model(X)
    save_adapter(model, tmp_path, "cats")
    assert torch.equal(load_adapter(net(), tmp_path)(X), whole)
    add_weighted_adapter(model, "copy", ["cats"], [1.0])
    hotswap_adapter(model, tmp_path, "cats")
    assert torch.equal(model(X), half)
    assert torch.equal(copy.deepcopy(model)(X), half)
    set_adapter(model, "copy")
    torch.testing.assert_close(model(X), whole)


def test_a_head_and_biases_count_whole_whatever_the_strength():
    model = trained(apply_lora(net(), rank=2, target_modules=["0"], modules_to_save=["2"], bias="lora_only"))
    with torch.no_grad():
        model[0].adapter("default").bias.add_(1.0)
        model[2].adapters["default"].weight.mul_(2.0)
    set_adapter(model, {"default": 0.0})
    layer, head = model[0], model[2].adapters["default"]
    expected = head(nn.functional.linear(X, layer.weight, layer.adapter("default").bias).tanh())
    torch.testing.assert_close(model(X), expected)


def test_active_adapters_may_be_frozen_for_inference():
    model = two()
    set_adapter(model, ["cats", "dogs"], trainable=False)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model(X).requires_grad
    delete_adapter(model, "dogs")
    assert not any(p.requires_grad for p in model.parameters())
    set_adapter(model, "cats")
    assert all(p.requires_grad for p in lora_parameters(model))


# ---------------------------------------------------------------- dropout of several


def test_adapters_of_one_dropout_share_a_mask_and_others_have_their_own():
    p = 0.5
    layer = FusedLoRALinear(2000, 2, bias=False, rank=1, dropout=p)
    layer.add_adapter("same", rank=1, dropout=p)
    layer.add_adapter("other", rank=1, dropout=0.25)
    with torch.no_grad():
        layer.weight.zero_()
        for index, adapter in enumerate(layer.adapters.values()):
            # each writes the kept elements of x, as a number in a base of its own
            adapter.lora_A.fill_(1.0)
            adapter.lora_B.zero_()
            adapter.lora_B[index % 2, 0] = 1.0
    eye = torch.eye(2000)
    layer.set_adapter(["default", "same"])
    y = layer(eye)
    assert torch.equal(y[:, 0], y[:, 1])
    assert set(y[:, 0].tolist()) == {0.0, 2.0}
    layer.set_adapter(["same", "other"])
    y = layer(eye)
    same, other = y[:, 1] > 0, y[:, 0] > 0
    # rates and independence, each within five standard deviations of a binomial count
    for kept, rate in ((same, 1 - p), (other, 0.75), (same & other, (1 - p) * 0.75)):
        assert abs(kept.sum().item() - 2000 * rate) < 5 * math.sqrt(2000 * rate * (1 - rate))
    assert y[other, 0].mean().item() == pytest.approx(1 / 0.75)
    layer.eval()
    assert torch.equal(layer(eye), torch.ones(2000, 2))


def test_gradients_through_several_dropouts_are_those_of_the_masks_drawn():
    layer = FusedLoRALinear(12, 5, rank=2, dropout=0.5, dtype=torch.float64)
    layer.add_adapter("other", rank=3, dropout=0.25)
    trained(layer)
    layer.set_adapter(["default", "other"])
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)

    def compute(x, *_):
        torch.manual_seed(7)
        return layer(x)

    parameters = [p for adapter in layer.active_modules() for p in adapter.parameters()]
    assert torch.autograd.gradcheck(compute, (x, *parameters))


# ---------------------------------------------------------------- weighted combinations


@pytest.mark.parametrize("weights", [(0.7, 0.3), (2.0, -1.5), (0.0, 1.0)])
def test_cat_is_exactly_the_weighted_sum(weights):
    model = two()
    add_weighted_adapter(model, "both", ["cats", "dogs"], weights)
    assert model[0].active_adapters == ("cats",)
    set_adapter(model, "both")
    layer = model[0]
    expected = sum(w * product(layer.adapter(n)) for n, w in zip(("cats", "dogs"), weights, strict=True))
    torch.testing.assert_close(product(layer.adapter("both")), expected)
    assert (layer.adapter("both").rank, layer.scale) == (5, 1.0)
    assert layer.lora_A.requires_grad
    delete_adapter(model, "both")


@pytest.mark.parametrize("kind", ["cat", "linear"])
@pytest.mark.parametrize("weights", [[0.7, 0.3], [2.0, -1.5]])
def test_peft_combines_the_same(kind, weights):
    peft = get_peft_model(net(), LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"]), "cats")
    peft.add_adapter("dogs", LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2"]))
    trained(peft).eval()
    model = apply_lora(net(), rank=3, alpha=6, adapter="cats")
    add_adapter(model, "dogs", LoRAConfig(rank=3, alpha=5))
    for place in ("0", "2"):
        for name in ("cats", "dogs"):
            theirs, ours = peft.base_model.model.get_submodule(place), model.get_submodule(place).adapter(name)
            ours.load_state_dict({"lora_A": theirs.lora_A[name].weight, "lora_B": theirs.lora_B[name].weight})
    peft.add_weighted_adapter(["cats", "dogs"], weights, "both", combination_type=kind)
    peft.set_adapter("both")
    add_weighted_adapter(model, "both", ["cats", "dogs"], weights, kind)
    set_adapter(model, "both")
    torch.testing.assert_close(model.eval()(X), peft(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("cats", ["cats"], [1]), ValueError, "adapter 'cats' is here already"),
        (("both", ["cats", "birds"], [1, 1]), ValueError, "adapter 'birds' is not here"),
        (("both", ["cats", "dogs"], [1]), ValueError, "weights must be one for each of at least one adapter"),
        (("both", [], []), ValueError, "weights must be one for each of at least one adapter"),
        (("both", ["cats"], [float("nan")]), ValueError, "weights must be a finite number, got nan"),
        (("both", ["cats"], [1], "svd"), ValueError, "combination_type must be 'cat' or 'linear', got 'svd'"),
        (("both", ["cats", "dogs"], [1, 1], "linear"), ValueError, r"'linear' needs one rank, got \[2, 3\] in '0'"),
        (("saved", ["head"], [1]), ValueError, "adapters to combine must train A and B alone"),
    ],
)
def test_combinations_that_cannot_be_made_change_nothing(arguments, error, message):
    model = two()
    add_adapter(model, "head", LoRAConfig(target_modules=["0"], bias="lora_only"))
    names = list(model.state_dict())
    with pytest.raises(error, match=message):
        add_weighted_adapter(model, *arguments)
    assert list(model.state_dict()) == names
