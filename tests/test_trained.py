"""What an adapter trains beside A and B: ``modules_to_save`` and biases, copies of the base's."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fused_lora import (
    FusedLoRALinear,
    LoRAConfig,
    add_adapter,
    apply_lora,
    delete_adapter,
    disable_adapters,
    lora_parameters,
    merge,
    merge_and_unload,
    set_adapter,
    summary,
    unmerge,
)

X = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.out = nn.Linear(16, 16), nn.Linear(16, 5, bias=False)

    def forward(self, x):
        return self.out(torch.tanh(self.dense(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 16)
        self.head = Head()

    def forward(self, x):
        return self.head(self.fc2(self.norm(self.fc1(x))))


def net(seed=3):
    torch.manual_seed(seed)
    return Net()


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def base_of(model, name):
    """The base's own parameter: an attribute is the active adapter's."""
    return dict(model.named_parameters())[name]


def train(model, steps=3):
    """A few steps of what is trained; every trained parameter must have moved."""
    parameters = lora_parameters(model)
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    return model


WAYS = {
    "head": {"modules_to_save": ["head"]},
    "norm": {"modules_to_save": ["norm"], "rank": 3},
    "lora_only": {"bias": "lora_only"},
    "all biases": {"bias": "all", "target_modules": ["fc1"]},
    "head and all biases": {"bias": "all", "modules_to_save": ["head"], "target_modules": ["fc2"]},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_adapter_trains_its_own_and_the_base_comes_back_bit_for_bit(way):
    base = net()
    expected, before = copy.deepcopy(base).eval()(X), state(base)
    model = apply_lora(base, **WAYS[way])
    assert torch.equal(copy.deepcopy(model).eval()(X), expected)
    train(model).eval()
    tuned = model(X)
    assert not torch.equal(tuned, expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)
    with disable_adapters(model):
        assert torch.equal(model(X), expected)
    assert torch.equal(model(X), tuned)
    set_adapter(model, None)
    assert torch.equal(model(X), expected)
    assert not any(p.requires_grad for p in model.parameters())
    set_adapter(model, "default")
    assert torch.equal(model(X), tuned)
    delete_adapter(model, "default")
    assert torch.equal(model(X), expected)
    assert set(model.state_dict()) == set(before)


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("head", {"head.dense.weight", "head.dense.bias", "head.out.weight"}),
        ("norm", {"norm.weight", "norm.bias"}),
        ("lora_only", {"fc1.bias", "fc2.bias", "head.dense.bias"}),
        ("all biases", {"fc1.bias", "fc2.bias", "norm.bias", "head.dense.bias"}),
        (
            "head and all biases",
            {"fc1.bias", "fc2.bias", "norm.bias", "head.dense.weight", "head.dense.bias", "head.out.weight"},
        ),
    ],
)
def test_what_is_trained_is_what_was_asked_for(way, expected):
    model = apply_lora(net(), **WAYS[way])
    trained = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert {name.replace("adapters.default.", "") for name in trained} == expected
    assert {p for p in model.parameters() if p.requires_grad} == set(lora_parameters(model))
    if "modules_to_save" in WAYS[way]:
        assert not any(isinstance(m, FusedLoRALinear) for m in model.head.modules()) or way == "norm"


def test_gradients_are_those_of_the_same_module_trained_in_place():
    model, other = apply_lora(net(), modules_to_save=["head"], bias="lora_only"), net()
    model(X).sin().sum().backward()
    other(X).sin().sum().backward()
    torch.testing.assert_close(model.head.dense.adapters["default"].weight.grad, other.head.dense.weight.grad)
    torch.testing.assert_close(model.head.out.adapters["default"].weight.grad, other.head.out.weight.grad)
    torch.testing.assert_close(model.fc1.adapters["default"].bias.grad, other.fc1.bias.grad, rtol=1e-4, atol=1e-5)
    assert base_of(model, "head.dense.weight").grad is None
    assert model.fc1.bias.grad is None


def test_training_batch_statistics_leaves_the_bases_alone():
    model = net()
    model.norm = nn.BatchNorm1d(16)
    train(apply_lora(model, bias="all"))
    assert torch.equal(dict(model.named_buffers())["norm.running_mean"], torch.zeros(16))
    assert not torch.equal(model.norm.adapters["default"].running_mean, torch.zeros(16))


def test_a_copy_of_biases_shares_the_rest_with_the_base():
    model = apply_lora(net(), bias="all", target_modules=["fc1"])
    clone = model.fc2.adapters["default"]
    assert clone.weight is base_of(model, "fc2.weight")
    assert clone.bias is not base_of(model, "fc2.bias")
    assert summary(model).adapters == sum(p.numel() for p in lora_parameters(model))
    assert summary(model).base == sum(p.numel() for p in Net().parameters())
    assert set(summary(model).trained) == {"fc1.bias", "fc2.bias", "norm.bias", "head.dense.bias"}
    assert "trained beside A and B: fc1.bias, norm.bias, fc2.bias, head.dense.bias" in str(summary(model))


def test_two_adapters_keep_a_head_each_and_take_turns_alone():
    model = apply_lora(net(), modules_to_save=["head"], adapter="cats")
    add_adapter(model, "dogs", LoRAConfig(rank=2, modules_to_save=["head"]))
    train(model)
    cats = copy.deepcopy(model).eval()(X)
    set_adapter(model, "dogs")
    train(model).eval()
    assert not torch.equal(model(X), cats)
    with pytest.raises(ValueError, match=r"only one active adapter may train modules_to_save or biases, got \['cats'"):
        set_adapter(model, ["cats", "dogs"])
    assert model.fc1.active_adapters == ("dogs",)
    set_adapter(model, "cats")
    assert torch.equal(model(X), cats)
    add_adapter(model, "plain", LoRAConfig(target_modules=["fc1"]))
    set_adapter(model, ["plain", "cats"])
    torch.testing.assert_close(model(X), cats)


def test_two_adapters_with_biases_are_not_active_together():
    model = apply_lora(net(), bias="lora_only", adapter="cats")
    add_adapter(model, "dogs", LoRAConfig(bias="lora_only"))
    with pytest.raises(ValueError, match="only one active adapter may train"):
        set_adapter(model, ["cats", "dogs"])
    assert model.fc1.active_adapters == ("cats",)


@pytest.mark.parametrize("way", WAYS)
def test_merge_unmerge_unload_and_copies(way):
    base = net()
    expected = copy.deepcopy(base).eval()(X)
    model = train(apply_lora(base, **WAYS[way])).eval()
    tuned, before, names = model(X), state(model), set(Net().state_dict())
    merge(model)
    torch.testing.assert_close(model(X), tuned)
    with disable_adapters(model):
        assert torch.equal(model(X), expected)
    unmerge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(X), tuned)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(duplicate(X), tuned)
        set_adapter(duplicate, None)
        assert torch.equal(duplicate(X), expected)
    classes = {type(m) for m in Net().modules()}
    merge_and_unload(model)
    torch.testing.assert_close(model(X), tuned)
    assert {type(m) for m in model.modules()} == classes
    assert set(model.state_dict()) == names
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(X), tuned)


def test_unloading_refuses_what_is_not_finite_and_changes_nothing():
    model = train(apply_lora(net(), modules_to_save=["head"]))
    with torch.no_grad():
        model.head.out.adapters["default"].weight[0, 0] = float("nan")
    before = state(model)
    with pytest.raises(ValueError, match=r"head.out: adapter 'default' must be finite, got NaN or infinity in"):
        merge_and_unload(model)
    assert all(torch.equal(v.nan_to_num(), before[k].nan_to_num()) for k, v in model.state_dict().items())
    assert not model.fc1.merged


def test_moving_and_casting_take_the_copies_along():
    model = apply_lora(net(), bias="all", modules_to_save=["head"]).double()
    assert model(X.double()).dtype == torch.float64
    assert model.norm.adapters["default"].weight is base_of(model, "norm.weight")


def test_hooks_run_once():
    model, calls = net(), []
    model.head.out.register_forward_hook(lambda *_: calls.append(1))
    apply_lora(model, modules_to_save=["head"])(X)
    assert calls == [1]


def test_a_plain_checkpoint_loads_into_the_base():
    model, other = apply_lora(net(), bias="all", modules_to_save=["head"]), net(5)
    missing, unexpected = model.load_state_dict(other.state_dict(), strict=False)
    assert not unexpected
    assert all(".adapters." in name for name in missing)
    with disable_adapters(model.eval()):
        assert torch.equal(model(X), other.eval()(X))


def test_attention_trains_the_bias_that_it_reads_past_its_projection():
    layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, dropout=0.0)
    x = torch.randn(2, 5, 12)
    expected = copy.deepcopy(layer).eval()(x)
    model = apply_lora(layer, bias="all")
    model(x).sin().sum().backward()
    assert all(p.grad is not None for p in lora_parameters(model))
    assert model.self_attn.out_proj.bias is model.self_attn.out_proj.adapters["default"].bias
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and name.endswith("bias"):
                p.add_(1.0)
        tuned = model.eval()(x)
    assert not torch.allclose(tuned, expected)
    torch.testing.assert_close(model(x).detach(), tuned)
    with disable_adapters(model):
        torch.testing.assert_close(model(x), expected)


def test_tied_parameters_are_one_in_the_copies_too():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.decoder = nn.Linear(12, 12), nn.Linear(12, 12)
            self.bias = self.decoder.bias

        def forward(self, x):
            return self.decoder(self.fc(x)) + self.bias

    model = Tied()
    expected = model(X)
    with pytest.warns(UserWarning, match=r"bias and decoder.bias are one tensor"):
        apply_lora(model, bias="all", target_modules=["fc"])
    assert torch.equal(model(X), expected)
    assert model.adapters["default"].bias is model.decoder.adapters["default"].bias
    model(X).sum().backward()
    assert len(lora_parameters(model)) == 4
    with torch.no_grad():
        model.decoder.adapters["default"].bias.add_(1)
    torch.testing.assert_close(model(X), expected + 2)
    merge_and_unload(model)
    torch.testing.assert_close(model(X), expected + 2)
    assert model.bias is model.decoder.bias


def test_modules_that_cannot_be_trained_are_refused_before_anything_changes():
    model = net()
    with pytest.raises(ValueError, match=r"modules_to_save must name modules, got \['haed'\]; modules here: 'head'"):
        apply_lora(model, modules_to_save=["haed"])
    model.act = nn.Tanh()
    with pytest.raises(ValueError, match="must name modules with parameters, got 'act', which has none"):
        apply_lora(model, modules_to_save=["act"])
    with pytest.raises(TypeError, match="modules_to_save must be a list of names, got 'head'"):
        apply_lora(model, modules_to_save="head")
    with pytest.raises(ValueError, match="bias must be 'none', 'lora_only' or 'all', got 'some'"):
        apply_lora(model, bias="some")
    assert all(p.requires_grad for p in model.parameters())
    with pytest.warns(UserWarning, match="modules_to_save: no module is called 'score'"):
        apply_lora(model, modules_to_save=["head", "score"])
    apply_lora(other := net(), adapter="cats")
    with pytest.raises(ValueError, match=r"must leave out layers with A and B of others, got 'head.dense'"):
        add_adapter(other, "dogs", LoRAConfig(target_modules=["fc1"], modules_to_save=["head"]))
    assert "dogs" not in other.fc1.adapters
    with pytest.raises(ValueError, match=r"matches head.dense \(TrainedLinear, another adapter's\), which can't take"):
        add_adapter(model, "dogs", LoRAConfig(target_modules=["dense"]))


def test_a_second_copy_keeps_what_is_the_same_object_everywhere():
    model = net()
    model.head.dense.nothing = ()
    apply_lora(model, modules_to_save=["head"])
    set_adapter(model, None)
    add_adapter(model, "second", LoRAConfig(modules_to_save=["head"]))
    assert model.head.dense.adapters["second"].nothing == ()
    set_adapter(model, "second")
    assert torch.equal(model(X), net()(X))
