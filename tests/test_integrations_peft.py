"""A fused PEFT model computes what PEFT's does, gradients included, in whatever state PEFT has put it."""

import copy

import pytest
import torch
from oracle import NAMES, Inputs, check
from peft_models import (
    HIDDEN,
    TARGETS,
    K,
    M,
    Net,
    config,
    count_calls,
    draw_x,
    fused_model,
    layer,
    peft_model,
    results,
    same_as_peft,
)
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from fused_lora.backends import environment
from fused_lora.bench.measure import saved_bytes
from fused_lora.dropout import dropout_mask
from fused_lora.integrations.peft import fuse, summary, unfuse


@pytest.fixture
def calls(monkeypatch):
    return count_calls(monkeypatch)


# ---------------------------------------------------------------- states: (model, calls that lora_linear computes)


def several(*names, **fields):
    model = fused_model(**fields)
    model.add_adapter("other", config(r=3, lora_alpha=1))
    model.add_adapter("third", config(r=8, use_rslora=True, target_modules=["second"]))
    model.base_model.set_adapter(list(names))
    return model


def scaled_by_tensors():
    model = fused_model()
    for name in TARGETS:
        layer(model, name).scaling["default"] = torch.tensor(0.7)
    return model


def with_scales(scales):
    model = several("default", "other")
    for name in TARGETS:
        layer(model, name).scaling.update(scales)
    return model


def after(change, model=None):
    model = model or fused_model()
    change(model)
    return model


def weighted(kind):
    model = fused_model()
    model.add_adapter("other", config(lora_alpha=1))
    model.add_weighted_adapter(["default", "other"], [0.6, -0.3], "mix", combination_type=kind, svd_rank=4)
    model.set_adapter("mix")
    return model


def train_only(*endings):
    model = fused_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(endings))
    return model


def conv1d_base():
    net = Net()
    net.first = Conv1D(HIDDEN, K)
    return fused_model(net, fan_in_fan_out=True)


def parametrized():
    net = Net()
    parametrize.register_parametrization(net.first, "weight", nn.Identity())
    return fused_model(net)


def scaled_layer(model):
    layer(model).scale_layer(3.0)
    layer(model).set_scale("default", 0.25)
    layer(model, "second").scale_layer(-2.0)
    layer(model, "second").unscale_layer(4)


STATES = {
    "plain": (fused_model, 2),
    "no bias": (lambda: fused_model(Net(bias=False)), 2),
    "rank 1": (lambda: fused_model(r=1), 2),
    "rank 100": (lambda: fused_model(r=100), 2),
    "rslora": (lambda: fused_model(use_rslora=True), 2),
    "rank and alpha patterns": (lambda: fused_model(rank_pattern={"first": 3}, alpha_pattern={"second": 1}), 2),
    "a fresh adapter": (lambda: fused_model(init_lora_weights=True), 2),
    "two adapters": (lambda: several("default", "other"), 2),
    "three adapters, one of them in one layer": (lambda: several("default", "other", "third"), 2),
    "the second adapter": (lambda: several("other"), 2),
    "an adapter of one layer": (lambda: several("third"), 1),
    "a zero and a negative scale": (lambda: with_scales({"default": 0.0, "other": -1.5}), 2),
    "all scales zero": (lambda: with_scales({"default": 0.0, "other": 0.0}), 2),
    "scales as tensors, several adapters": (lambda: with_scales({"other": torch.tensor(-2.0)}), 2),
    "scales as tensors": (scaled_by_tensors, 2),
    "scales changed": (lambda: after(scaled_layer), 2),
    "weighted, linear": (lambda: weighted("linear"), 2),
    "weighted, cat": (lambda: weighted("cat"), 2),
    "weighted, svd": (lambda: weighted("svd"), 2),
    "bias all": (lambda: fused_model(bias="all"), 2),
    "bias lora_only": (lambda: fused_model(bias="lora_only"), 2),
    "a trainable base": (lambda: train_only("weight", "bias"), 2),
    "only the base weight": (lambda: train_only("base_layer.weight"), 2),
    "A frozen": (lambda: train_only("lora_B.default.weight"), 2),
    "B frozen": (lambda: train_only("lora_A.default.weight"), 2),
    "modules to save": (lambda: fused_model(target_modules=["first"], modules_to_save=["second"]), 1),
    "merged": (lambda: after(lambda model: model.merge_adapter()), 0),
    "merged and unmerged": (lambda: after(lambda model: (model.merge_adapter(), model.unmerge_adapter())), 2),
    "disabled": (lambda: after(lambda model: model.base_model.disable_adapter_layers()), 0),
    "disabled and enabled": (
        lambda: after(lambda m: (m.base_model.disable_adapter_layers(), m.base_model.enable_adapter_layers())), 2,
    ),
    "one adapter deleted": (lambda: after(lambda model: model.delete_adapter("other"), several("default", "other")), 2),
    "DoRA": (lambda: fused_model(use_dora=True), 0),
    "DoRA beside plain": (lambda: after(lambda m: m.add_adapter("dora", config(use_dora=True))), 2),
    "lora_bias": (lambda: fused_model(lora_bias=True), 0),
    "Conv1D base": (conv1d_base, 2),
    "parametrized base": (parametrized, 1),
    "dropout, eval": (lambda: fused_model(lora_dropout=0.5).eval(), 2),
    "dropout of several, eval": (lambda: several("default", "other", lora_dropout=0.5).eval(), 2),
    "dropout of zero": (lambda: after(lambda m: setattr(layer(m).lora_dropout, "p", 0.0)), 2),
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_output_and_every_gradient_are_pefts(state, calls):
    build, expected = STATES[state]
    model = build()
    same_as_peft(model, draw_x())
    assert len(calls) == expected


@pytest.mark.parametrize("shape", [(K,), (0, K), (1, K), (2, 5, K), (2, 3, 4, K)])
def test_any_leading_shape(shape, calls):
    same_as_peft(fused_model(), draw_x(*shape))
    assert len(calls) == 2


@pytest.mark.parametrize(
    "x", [torch.randn(K, M).t(), torch.randn(M, 1, K).expand(M, 3, K), torch.randn(M, 2 * K)[:, ::2]]
)
def test_any_strides(x, calls):
    same_as_peft(fused_model(), x)
    assert len(calls) == 2


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_dtype(dtype, calls):
    same_as_peft(fused_model().to(dtype), draw_x(dtype=dtype))
    assert len(calls) == 2


@pytest.mark.parametrize("state", ["plain", "two adapters", "scales as tensors", "a trainable base"])
def test_first_and_second_derivatives_in_float64(state, calls):
    model = STATES[state][0]().double()
    wanted = [p for p in model.parameters() if p.requires_grad]
    x = draw_x(3, K, dtype=torch.float64).requires_grad_()
    names = [name for name, p in model.named_parameters() if p.requires_grad]

    def run(x, *parameters):
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    torch.autograd.gradcheck(run, (x, *wanted), fast_mode=True)
    torch.autograd.gradgradcheck(run, (x, *wanted), fast_mode=True)
    assert calls


@pytest.mark.parametrize("adapters", [("default",), ("default", "other")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_adapters_over_a_16_bit_base_are_rounded_once_and_get_float32_gradients(dtype, adapters, calls):
    model = fuse(peft_model(Net().to(dtype)))
    model.add_adapter("other", config(r=3))
    model.base_model.set_adapter(list(adapters))
    got = same_as_peft(model, draw_x(dtype=dtype), low_dtype=dtype)
    assert len(calls) == 2
    assert got["y"].dtype == dtype
    assert {value.dtype for name, value in got.items() if "lora_" in name} == {torch.float32}


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(base, calls):
    model = fuse(peft_model(Net().to(base)))
    got = same_as_peft(model, draw_x(), low_dtype=torch.bfloat16 if base != torch.float32 else None,
                       autocast=torch.bfloat16)  # fmt: skip
    assert len(calls) == 2
    assert got["y"].dtype == torch.bfloat16


def test_dtypes_that_lora_linear_does_not_take_are_pefts(calls):
    model = fused_model()
    layer(model).lora_A.to(torch.bfloat16)
    layer(model).lora_B.to(torch.bfloat16)
    assert "torch.bfloat16 and torch.bfloat16 over torch.float32" in str(summary(model))
    expected = unfuse(copy.deepcopy(model))(x := draw_x())
    assert torch.equal(model(x), expected)
    assert len(calls) == 1
    # an x of another dtype is PEFT's to refuse, or to cast
    for module in (model, unfuse(copy.deepcopy(model))):
        with pytest.raises(RuntimeError, match="dtype"):
            module(x.double())


# ---------------------------------------------------------------- dropout


def drawn_mask(rows, cols, p):
    """The mask that the next call of a fused layer will draw."""
    state = torch.get_rng_state()
    seed = torch.randint(torch.iinfo(torch.int64).max, (1,))
    torch.set_rng_state(state)
    return dropout_mask(seed, rows, cols, p)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_in_training_has_the_masks_own_gradients(p, dtype, calls):
    model = fused_model(lora_dropout=p, target_modules=["first"]).to(dtype)
    x, dy = draw_x(64, K, dtype=dtype), draw_x(64, HIDDEN, dtype=dtype)
    mask = drawn_mask(64, K, p)
    assert 0 < mask.float().mean() < 1
    base = layer(model).base_layer.requires_grad_()
    base.weight.requires_grad_(False)
    A, B = layer(model).lora_A["default"].weight, layer(model).lora_B["default"].weight
    operands = (tensor.detach() for tensor in (x, base.weight, A, B, base.bias))
    inputs = Inputs(*operands, dy, scale=2.0)
    got = results(layer(model), x, inputs.dy)
    assert len(calls) == 1
    names = ("y", "dx", "lora_A.default.weight", "lora_B.default.weight", "base_layer.bias")
    check(inputs, {name: got[ours] for name, ours in zip(NAMES, names, strict=True)}, mask, p)


def test_dropout_masks_are_new_at_every_call_and_repeat_with_the_seed():
    model, x = fused_model(lora_dropout=0.5), draw_x()
    first = model(x)
    assert not torch.equal(first, model(x))
    torch.manual_seed(3)
    again = model(x)
    torch.manual_seed(3)
    assert torch.equal(again, model(x))


def test_dropout_keeps_its_mean():
    """Over many calls the mean output is that without dropout, to five standard errors of the mean."""
    model, x = fused_model(lora_dropout=0.3, target_modules=["first"]), draw_x()
    with torch.no_grad():
        samples = torch.stack([layer(model)(x) for _ in range(600)]).double()
        exact = layer(model.eval())(x).double()
    standard_error = samples.std(0) / 600**0.5
    assert ((samples.mean(0) - exact).abs() <= 5 * standard_error).all()
    assert (standard_error > 0).all()


def test_dropout_follows_its_own_module_not_the_layer(calls):
    model = fused_model(lora_dropout=0.5)
    layer(model).lora_dropout.eval()
    model(draw_x())
    assert [call["dropout_p"] for call in calls] == [0.0, 0.5]


def test_dropout_of_several_adapters_is_pefts(calls):
    model = several("default", "other", lora_dropout=0.5)
    x = draw_x()
    outputs = []
    for module in (model, unfuse(copy.deepcopy(model))):
        torch.manual_seed(5)
        outputs.append(module(x))
    assert torch.equal(*outputs)
    assert not calls
    assert "each with a dropout mask of its own" in str(summary(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_the_extension_little_data_has_the_mask_of_nn_dropout(calls, monkeypatch, dtype):
    monkeypatch.setattr(environment, "EXTENSION_PROBLEM", "not built")
    model = fuse(peft_model(lora_dropout=0.5, target_modules=["first"])).to(dtype)
    little, much = draw_x(dtype=dtype), draw_x(-(-(1 << 16) // K), K, dtype=dtype)
    same_as_peft(model, little)
    if dtype == torch.float32:
        same_as_peft(model, little, low_dtype=torch.bfloat16, autocast=torch.bfloat16)
    models = (model, unfuse(copy.deepcopy(model)))
    kept, pefts = (saved_bytes(lambda m=m: layer(m)(little), m.parameters()) for m in models)
    assert kept <= pefts
    assert not calls
    model(much)
    model.eval()(little)
    fuse(model, impl="eager").train()(little)
    assert len(calls) == 3


def test_dropout_of_everything_is_pefts(calls):
    model = fused_model(lora_dropout=0.5)
    for name in TARGETS:
        layer(model, name).lora_dropout["default"].p = 1.0
    same_as_peft(model, draw_x())
    assert not calls
