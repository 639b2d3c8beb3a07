"""``load_state_dict`` of a base model's own checkpoint into a model with adapters, and of other ones."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fused_lora import FusedLoRALinear, add_adapter, apply_lora, base_state_dict, set_adapter


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))


X = torch.randn(5, 6)


def net(seed=0):
    torch.manual_seed(seed)
    return Net().eval()


def adapted(seed=0):
    """A model with two adapters, one of which trains more than A and B."""
    model = apply_lora(net(seed), rank=2, bias="all", modules_to_save=["head", "2"], target_modules=["0"])
    add_adapter(model, "other", rank=3, target_modules=["0"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters" in name:
                parameter.add_(torch.randn_like(parameter))
    return model.eval()


def adapters_of(model):
    return {key: value.clone() for key, value in model.state_dict().items() if "adapters." in key}


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_checkpoint_loads_strictly_and_leaves_the_adapters(assign):
    model, checkpoint = adapted(), net(1).state_dict()
    before, kept = adapters_of(model), copy.copy(checkpoint)
    parameters = {name: p for name, p in model.named_parameters() if "adapters" in name}
    wants = {name: p.requires_grad for name, p in model.named_parameters()}
    result = model.load_state_dict(checkpoint, assign=assign)
    assert result == ([], [])
    assert [*checkpoint] == [*kept]
    same(adapters_of(model), before)
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wants
    same(base_state_dict(model), checkpoint)
    # the base is the new one: without adapters it computes what that does
    set_adapter(model, None)
    assert torch.equal(model(X), net(1)(X))


def test_from_a_file(tmp_path):
    save_file(net(1).state_dict(), tmp_path / "base.safetensors")
    model = adapted()
    model.load_state_dict(load_file(tmp_path / "base.safetensors"))
    same(base_state_dict(model), net(1).state_dict())


def test_inside_a_larger_model_and_a_compiled_one():
    model = nn.ModuleDict({"one": adapted(), "two": nn.Linear(2, 2), "three": adapted(2)})
    plain = nn.ModuleDict({"one": net(3), "two": nn.Linear(2, 2), "three": net(4)})
    before = adapters_of(model)
    assert model.load_state_dict(plain.state_dict()) == ([], [])
    same(adapters_of(model), before)
    same(base_state_dict(model), plain.state_dict())
    compiled = torch.compile(model["one"], backend="eager")
    assert compiled.load_state_dict({f"_orig_mod.{k}": v for k, v in net(5).state_dict().items()}) == ([], [])
    same(base_state_dict(model["one"]), net(5).state_dict())


def test_a_layer_of_ones_own_making():
    layer = FusedLoRALinear(6, 8, rank=2)
    linear = nn.Linear(6, 8)
    assert layer.load_state_dict(linear.state_dict()) == ([], [])
    assert torch.equal(layer.weight, linear.weight)


def test_a_whole_checkpoint_loads_as_ever():
    model, other = adapted(), adapted(1)
    assert model.load_state_dict(other.state_dict()) == ([], [])
    same(model.state_dict(), other.state_dict())


def broken(model):
    """Checkpoints with some of the adapters: what is left out of each, by a name of it."""
    whole = model.state_dict()
    names = [key for key in whole if "adapters." in key]
    for left_out in (names[0], names[-1], "body.0.adapters", "head.adapters", "adapters.other"):
        yield left_out, {key: value for key, value in whole.items() if left_out not in key}


@pytest.mark.parametrize("number", range(5))
def test_some_adapters_and_not_others_is_an_error(number):
    model = adapted()
    left_out, checkpoint = [*broken(adapted(1))][number]
    lacking = {key for key in model.state_dict() if key not in checkpoint}
    assert lacking
    with pytest.raises(RuntimeError, match="Missing key") as error:
        model.load_state_dict(checkpoint)
    assert all(key in str(error.value) for key in lacking), left_out
    assert {*model.load_state_dict(checkpoint, strict=False).missing_keys} == lacking


def test_what_else_is_missing_or_too_much_is_told():
    model, checkpoint = adapted(), net(1).state_dict()
    del checkpoint["body.0.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "body.0.weight". $'):
        model.load_state_dict(checkpoint)
    checkpoint = net(1).state_dict() | {"body.0.adapters.third.lora_A": torch.zeros(2, 6)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*third"):
        model.load_state_dict(checkpoint)
    # one load's findings are not the next one's
    assert model.load_state_dict(net(1).state_dict()) == ([], [])


def test_a_quantized_base():
    pytest.importorskip("bitsandbytes")
    from fused_lora import quantize_base

    def quantized(seed):
        torch.manual_seed(seed)
        return quantize_base(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)), "int8")

    model, other = apply_lora(quantized(0), rank=2), quantized(1)
    before = adapters_of(model)
    assert model.load_state_dict(other.state_dict()) == ([], [])
    same(adapters_of(model), before)
    assert torch.equal(model[0].weight, other[0].weight)
