"""Opacus and other hooks on adapters: gradients per sample, of A and B that lie in modules of their own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from two_adapters import trained

from fused_lora import add_adapter, apply_lora, lora_parameters, set_adapter
from fused_lora.quantized import kind_of

opacus = pytest.importorskip("opacus")

SHAPES = {"2-D": (6, 16), "3-D": (6, 3, 16)}


def net(**fields):
    torch.manual_seed(0)
    # in float64, so that only real differences show
    body = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 5)).double()
    return trained(apply_lora(body, **{"rank": 4, "alpha": 12} | fields))


def several(**fields):
    model = trained(add_adapter(net(**fields), "second", rank=2, alpha=3))
    return set_adapter(model, ["default", "second"])


def loss_of(model, x):
    return model(x).flatten(1).sin().sum()


KINDS = {
    "plain": net,
    "several": several,
    "biases": lambda: net(bias="lora_only"),
    "a head": lambda: net(target_modules=["0"], modules_to_save=["2"]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_per_sample_are_those_of_each_sample_alone(kind, shape):
    model, x = KINDS[kind](), torch.randn(*shape).double()
    plain = copy.deepcopy(model)
    sampled = opacus.GradSampleModule(model, loss_reduction="sum")
    loss_of(sampled, x).backward()
    wanted = dict(plain.named_parameters())
    checked = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert getattr(parameter, "grad_sample", None) is None
            continue
        for index in range(len(x)):
            (alone,) = torch.autograd.grad(loss_of(plain, x[index : index + 1]), wanted[name])
            torch.testing.assert_close(parameter.grad_sample[index], alone)
            assert alone.abs().max() > 0
        checked += 1
    assert checked >= 4


def test_a_private_step_without_noise_is_the_plain_step():
    model, x, target = net(), torch.randn(6, 16).double(), torch.arange(6) % 5
    plain = copy.deepcopy(model)
    F.cross_entropy(plain(x), target).backward()
    expected = torch.optim.SGD(lora_parameters(plain), lr=0.1)
    expected.step()
    private, optimizer, loader = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(lora_parameters(model), lr=0.1),
        data_loader=DataLoader(TensorDataset(x, target), batch_size=6),
        noise_multiplier=0.0,
        max_grad_norm=1e6,
        poisson_sampling=False,
    )
    for rows, labels in loader:
        F.cross_entropy(private(rows), labels).backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_on_adapters_run_and_change_no_value(kind):
    model, x = KINDS[kind](), torch.randn(6, 16).double()
    want = model(x)
    want.sin().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    seen = []
    handle = model[0].adapters["default"].register_forward_hook(lambda module, inputs, y: seen.append(y.shape))
    got = model(x)
    got.sin().sum().backward()
    assert seen == [(6, 24)]
    torch.testing.assert_close(got, want)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name])
    handle.remove()
    assert torch.equal(model(x), want)


def test_a_quantized_layer_calls_its_adapter_too_where_it_has_hooks():
    from fused_lora import quantize_base

    torch.manual_seed(0)
    model = quantize_base(nn.Sequential(nn.Linear(64, 32)), "int8")
    trained(apply_lora(model, rank=2, alpha=5, bias="lora_only"))
    assert kind_of(model[0]) is not None
    x = torch.randn(5, 64)
    want, seen = model(x), []
    with torch.no_grad():
        model[0].adapters["default"].bias.add_(1.0)
        shifted = model(x)
    torch.testing.assert_close(shifted, want + 1.0)
    model[0].adapters["default"].register_forward_hook(lambda *_: seen.append(True))
    torch.testing.assert_close(model(x), shifted)
    assert seen == [True]
