"""Small PEFT models, and what binds a fused one to PEFT's own: output and every gradient within the budget."""

import copy

import torch
from oracle import within
from peft import LoraConfig, get_peft_model
from torch import nn

from fused_lora.integrations import peft as integration
from fused_lora.integrations.peft import fuse, unfuse

K, HIDDEN, N, M = 24, 40, 16, 17
TARGETS = ["first", "second"]


class Net(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.first = nn.Linear(K, HIDDEN, bias)
        self.second = nn.Linear(HIDDEN, N, bias)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def config(r=4, **fields):
    """LoRA whose B is not zero, so that every gradient counts."""
    return LoraConfig(**({"r": r, "lora_alpha": 2 * r, "target_modules": TARGETS, "init_lora_weights": False} | fields))


def peft_model(net=None, **fields):
    return get_peft_model(net if net is not None else Net(), config(**fields))


def fused_model(net=None, **fields):
    # "auto" would leave dropout on so little data to PEFT
    return fuse(peft_model(net, **fields), impl="eager" if fields.get("lora_dropout") else "auto")


def layer(model, name="first"):
    return model.get_submodule(f"base_model.model.{name}")


def unfused(model):
    """PEFT's own copy of ``model``."""
    return unfuse(copy.deepcopy(model))


def draw_x(*shape, dtype=torch.float32):
    return torch.randn(*(shape or (M, K))).to(dtype)


def results(model, x, dy=None, **kwargs):
    """y, dx and the gradient of every parameter that wants one, by name."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    y = model(x, **kwargs)
    if dy is None:
        # as wide a range as a loss gives, and the same for every caller
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    y.backward(dy.to(y.dtype))
    found = {"y": y.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found if x.grad is None else found | {"dx": x.grad}


def twins(model, low_dtype=None):
    """PEFT's own model in the same dtype (or all in ``low_dtype``), and in float64."""
    low = unfused(model)
    return (low if low_dtype is None else low.to(low_dtype)), unfused(model).double()


def same_as_peft(model, x, low_dtype=None, autocast=None, **kwargs):
    """Assert that model's output and gradients err at most as the budget allows, PEFT's own computation being eager.

    Each draws from the same state of the generator: a mask of nn.Dropout's is the same in all.
    """
    low, exact = twins(model, low_dtype)

    def drawn(module, x):
        torch.manual_seed(5)
        return results(module, x, **kwargs)

    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        got, eager = drawn(model, x), drawn(low, x)
    truth = drawn(exact, x.double() if x.is_floating_point() else x)
    assert got.keys() == truth.keys() == eager.keys()
    for name in truth:
        within(name, got[name], eager[name], truth[name])
    return got


def count_calls(monkeypatch):
    """A list that grows by one at every call that ``lora_linear`` computes for a fused layer."""
    calls, compute = [], integration.lora_linear

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return compute(*args, **kwargs)

    monkeypatch.setattr(integration, "lora_linear", counted)
    return calls
