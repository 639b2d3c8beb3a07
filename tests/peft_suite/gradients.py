"""Fused against unfused over the models and LoRA configurations of PEFT's own suite: the output, and the gradient of
every parameter that wants one, in float64.

``run.py`` runs this with ``--fuse`` beside PEFT's tests, in whose package the models are. Dropout is off.
"""

import copy

import plugin
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fused_lora.integrations.peft import summary, unfuse
from tests import test_custom_models as peft_tests

X = torch.arange(90).view(9, 10)

ONE = [pytest.param(*case[1:], id=case[0]) for case in peft_tests.TEST_CASES if case[2] is LoraConfig]
TWO = [
    pytest.param(case[1], *case[3:], id=case[0])
    for case in peft_tests.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES
    # PEFT does not have two adapters on parameters
    if case[2] is LoraConfig and not any("target_parameters" in fields for fields in case[3:])
]

UNFIT = {
    "Block": "a part of DeepMLP",
    "DeepMLP": "its forward raises",
    "MLP_2x_same_shape": "casts its input to float32",
    "MlpUsingParameters": "has no nn.Linear",
    "_LinearUsingParameter": "has no nn.Linear",
}
NETS = [
    kind for name, kind in vars(peft_tests).items()
    if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == peft_tests.__name__
    and name not in UNFIT
]  # fmt: skip


@pytest.mark.parametrize("kind", NETS)
def test_lora_of_every_linear_with_the_base_trained_too(kind):
    net = kind()
    targets = [name for name, module in net.named_modules() if type(module) is nn.Linear]
    model = get_peft_model(net, LoraConfig(target_modules=targets))
    _same_as_unfused(model.requires_grad_(True))


@pytest.mark.parametrize(("model_id", "config_class", "fields"), ONE)
def test_one_adapter(model_id, config_class, fields):
    net = peft_tests.MockTransformerWrapper.from_pretrained(model_id)
    _same_as_unfused(get_peft_model(net, config_class(**fields)))


@pytest.mark.parametrize(("method", "first", "second"), TWO)
def test_two_adapters_at_once(method, first, second):
    suite = peft_tests.TestMultipleActiveAdapters()
    torch.manual_seed(0)
    model = get_peft_model(suite.resolve_model_cls(method), LoraConfig(**first), adapter_name="first")
    model.add_adapter("second", LoraConfig(**second))
    suite.set_multiple_active_adapters(model, ["first", "second"])
    _same_as_unfused(model)


def _same_as_unfused(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                # a fresh B is zero, and so would be the gradient of A
                parameter.add_(0.3 * torch.randn_like(parameter))
    pefts = unfuse(copy.deepcopy(model))
    low = copy.deepcopy(pefts)
    fused = [row.path for row in summary(model).layers if row.implementation != "peft"]
    expected = _results(pefts, torch.float64)
    got = _results(model, torch.float64)
    assert plugin.calls["fused"]["lora_linear"] == len(fused)
    assert got.keys() == expected.keys()
    if not fused:
        # PEFT's own code on both sides
        assert all(torch.equal(got[name], expected[name]) for name in expected)
        return
    assert any(name.startswith(fused[0]) for name in expected)
    rounded = _results(low, torch.float32)
    for name, exact in expected.items():
        assert exact.any() or "lora_" not in name, f"{name}: a gradient of zeros shows nothing"
        # PEFT's own rounding error in float32, brought to float64 by the ratio of their roundings: PEFT errs by that
        # here, ours by at most twice that, and one rounding of the largest value
        budget = 3 * (rounded[name].double() - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
        budget *= torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        error = (got[name] - exact).abs().max()
        assert error <= budget, f"{name} differs by {error:.1e}, may by {budget:.1e}"


def _results(model, dtype):
    """{"y": the output, name: gradient}, of the model in ``dtype``."""
    model.to(dtype)
    # PEFT's nets cast their input to it
    model.get_base_model().dtype = dtype
    torch.manual_seed(1)
    y = model(X)
    y.backward(torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype))
    return {"y": y.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
