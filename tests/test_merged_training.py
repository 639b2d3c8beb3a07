"""A merged model that is trained, or that a base's checkpoint is loaded into."""

import copy
import warnings

import pytest
import torch
from torch import nn
from two_adapters import trained

from fused_lora import apply_lora, base_state_dict, merge, quantize_base, set_adapter, unmerge

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))


def adapted():
    return trained(apply_lora(net(), rank=2, alpha=6))


def quantized():
    return trained(apply_lora(quantize_base(net(), "int8"), rank=2))


@pytest.mark.parametrize("make", [adapted, quantized])
@pytest.mark.filterwarnings("ignore:merging into a weight")
def test_a_forward_in_training_mode_says_that_the_adapter_is_merged(make):
    model = merge(make())
    with pytest.warns(UserWarning, match=r"adapter 'default' is merged .* call fused_lora.unmerge"):
        y = model(X)
    assert not y.requires_grad
    unmerge(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(X).requires_grad


def test_inference_with_merged_weights_is_silent():
    model = merge(adapted())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            model(X)
        model.eval()(X)
        unmerge(model)
        merge(set_adapter(model, "default", trainable=False).train())
        model(X)


@pytest.mark.parametrize("assign", [False, True])
def test_a_bases_checkpoint_that_is_loaded_while_merged_is_the_base(assign):
    model, other = merge(adapted()), net(seed=1)
    model.load_state_dict(other.state_dict(), assign=assign)
    assert not model[0].merged
    for ours, theirs in (
        (base_state_dict(model), other.state_dict()),
        (base_state_dict(unmerge(model)), other.state_dict()),
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    expected = trained(apply_lora(copy.deepcopy(other), rank=2, alpha=6))
    expected.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(X), expected(X))


def test_a_merged_models_own_state_dict_comes_back_merged():
    model = merge(adapted())
    base, state, y = net().state_dict(), copy.deepcopy(model.state_dict()), model.eval()(X)
    model.load_state_dict(state)
    assert model[0].merged
    assert torch.equal(model(X), y)
    assert all(torch.equal(base_state_dict(unmerge(model))[name], base[name]) for name in base)
