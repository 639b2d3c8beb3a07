"""Linear layers whose weight PyTorch computes anew at every call: weight_norm, spectral_norm, prune, parametrize."""

import copy
from collections import OrderedDict

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from fused_lora import FusedLoRALinear, apply_lora, lora_parameters, merge, merge_and_unload, summary

WAYS = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


def base(way):
    torch.manual_seed(0)
    layers = OrderedDict(first=nn.Linear(6, 6), second=WAYS[way](nn.Linear(6, 4)))
    return nn.Sequential(layers).double().eval()


def values(model, of):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in of:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(2)).double()


@pytest.mark.parametrize("way", WAYS)
def test_outputs_and_gradients_are_pefts(way):
    ours = apply_lora(base(way), rank=2)
    theirs = get_peft_model(base(way), LoraConfig(r=2, lora_alpha=2, target_modules=["first", "second"])).double()
    values(ours, lora_parameters(ours))
    values(theirs, [parameter for parameter in theirs.parameters() if parameter.requires_grad])
    torch.testing.assert_close(ours(X), theirs(X))
    ours(X).sin().sum().backward()
    theirs(X).sin().sum().backward()
    wanted = [parameter.grad for parameter in theirs.parameters() if parameter.requires_grad]
    for parameter, grad in zip(lora_parameters(ours), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    assert [parameter.grad for parameter in ours.parameters() if not parameter.requires_grad] == [None] * sum(
        not parameter.requires_grad for parameter in ours.parameters()
    )
    assert len(summary(ours).layers) == 2
    assert torch.equal(copy.deepcopy(ours)(X), ours(X))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("merging", [merge, merge_and_unload])
def test_merging_refuses_a_weight_that_is_computed(way, merging):
    model = apply_lora(base(way), rank=2)
    values(model, lora_parameters(model))
    y = model(X)
    with pytest.raises(ValueError, match="second: weight must be a Parameter to merge into, got one that is computed"):
        merging(model)
    assert torch.equal(model(X), y)
    assert not model[0].merged


@pytest.mark.parametrize("way", ["weight_norm", "prune", "parametrized weight_norm"])
def test_a_layer_that_gets_it_after_its_adapter(way):
    model = apply_lora(nn.Sequential(nn.Linear(6, 4)), rank=2).double()
    values(model, lora_parameters(model))
    WAYS[way](model[0])
    y = model(X)
    with pytest.raises(ValueError, match="0: weight must be a Parameter to merge into"):
        merge(model)
    assert torch.equal(model(X), y)


@pytest.mark.parametrize("way", WAYS)
def test_from_linear_keeps_what_computes_the_weight(way):
    linear = base(way)[1]
    layer = FusedLoRALinear.from_linear(linear, rank=2)
    torch.testing.assert_close(layer(X), linear(X))
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(layer(X), linear(X))
    assert not isinstance(linear, FusedLoRALinear)


def test_a_parametrization_comes_off_when_the_adapter_is_gone():
    model = apply_lora(base("parametrized weight_norm"), rank=2)
    model[1].set_adapter(None)
    merge_and_unload(model)
    y = model(X)
    parametrize.remove_parametrizations(model[1], "weight")
    assert type(model[1]) is nn.Linear
    torch.testing.assert_close(model(X), y)
