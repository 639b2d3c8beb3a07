"""Weights of two modules."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from two_adapters import trained

from fused_lora import apply_lora, disable_adapters, merge, merge_and_unload


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(10, 12), nn.Linear(12, 12), nn.Linear(12, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.mid(self.embed(x)))


def test_a_shared_weight_is_said_and_not_merged():
    model, tokens = Tied(), torch.arange(10)
    with pytest.warns(UserWarning, match=r"embed.weight and head.weight are one tensor: the adapter acts on head"):
        apply_lora(model, rank=2)
    trained(model)
    tuned, weight = model(tokens), model.embed.weight.clone()
    for action in (merge, merge_and_unload):
        with pytest.raises(ValueError, match=r"head.weight must be its own to be merged into, and embed.weight"):
            action(model)
    assert torch.equal(model.embed.weight, weight)
    assert not model.mid.merged
    # as the message says
    model.head.weight = nn.Parameter(model.head.weight.detach().clone(), requires_grad=False)
    merge_and_unload(model)
    torch.testing.assert_close(model(tokens), tuned)
    assert torch.equal(model.embed.weight, weight)


def test_a_shared_weight_trained_whole_is_untied_and_not_put_into_the_other_module():
    model, tokens = Tied(), torch.arange(10)
    with pytest.warns(UserWarning, match=r"are one tensor: the adapter trains a copy for head alone"):
        apply_lora(model, rank=2, target_modules=["mid"], modules_to_save=["head"])
    with torch.no_grad():
        model.head.adapters["default"].weight.add_(1.0)
    with disable_adapters(model):
        assert torch.equal(model(tokens), F.linear(model.mid(model.embed(tokens)), model.embed.weight))
    tuned, weight = model(tokens), model.embed.weight.detach().clone()
    with pytest.warns(UserWarning, match="embed.weight and head.weight were one tensor, and are not after merging"):
        merge_and_unload(model)
    assert torch.equal(model(tokens), tuned)
    assert torch.equal(model.embed.weight, weight)
