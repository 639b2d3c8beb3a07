"""Bad input: one clear error that names the argument, the rule and the value, before anything is changed."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.two_tensor import TwoTensor

from fused_lora import FusedLoRALinear, LoRAConfig, add_adapter, apply_lora, delete_adapter, lora_linear, set_adapter


def operands(**changes):
    inputs = oracle.draw(4, 6, 5, 2)
    named = {"x": inputs.x, "weight": inputs.weight, "lora_A": inputs.lora_A, "lora_B": inputs.lora_B, "scale": 1.0}
    return named | changes


BAD_CALLS = [
    ({"x": torch.ones(4, 7)}, ValueError, r"x must be \(\.\.\., K\) with K = 6, got shape \(4, 7\)"),
    ({"x": torch.ones(())}, ValueError, r"x must be \(\.\.\., K\)"),
    ({"x": [1.0]}, TypeError, "x must be a Tensor, got list"),
    ({"weight": torch.ones(5)}, ValueError, r"weight must be \(N, K\), got shape \(5,\)"),
    ({"lora_A": torch.ones(2, 5)}, ValueError, r"lora_A must be \(R, K\) with R >= 1 and K = 6, got shape \(2, 5\)"),
    ({"lora_A": torch.ones(0, 6), "lora_B": torch.ones(5, 0)}, ValueError, "R >= 1"),
    ({"lora_B": torch.ones(5, 3)}, ValueError, r"lora_B must be \(N, R\) = \(5, 2\), got shape \(5, 3\)"),
    ({"bias": torch.ones(4)}, ValueError, r"bias must be \(N,\) = \(5,\), got shape \(4,\)"),
    ({"bias": 1.0}, TypeError, "bias must be a Tensor or None, got float"),
    ({"x": torch.ones(4, 6).double()}, TypeError, "x must have weight's dtype, torch.float32, got torch.float64"),
    ({"weight": torch.ones(5, 6, dtype=torch.int8)}, TypeError, "weight must be float16"),
    ({"lora_A": torch.ones(2, 6).half()}, TypeError, "lora_A must have weight's dtype.* got torch.float16"),
    ({"bias": torch.ones(5).double()}, TypeError, "bias must have weight's dtype"),
    ({"lora_B": torch.ones(5, 2, device="meta")}, ValueError, "lora_B must be on x's device, cpu, got meta"),
    ({"scale": "2"}, TypeError, "scale must be a finite number, got '2'"),
    ({"scale": None}, TypeError, "scale must be a finite number, got None"),
    ({"scale": True}, TypeError, "scale must be a finite number, got True"),
    ({"scale": float("nan")}, ValueError, "scale must be a finite number, got nan"),
    ({"scale": float("inf")}, ValueError, "scale must be a finite number, got inf"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    ({"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\), got -0.1"),
    ({"weight": torch.quantize_per_tensor(torch.ones(5, 6), 0.1, 0, torch.qint8)}, TypeError,
     r"weight must be float16.* got torch\.qint8; a quantized weight must be dequantized"),
    ({"weight": TwoTensor(torch.ones(5, 6), torch.ones(5, 6))}, TypeError,
     "weight must be a Tensor or a DTensor, got TwoTensor.* dequantize it to a plain Tensor"),
    ({"weight": torch.ones(5, 6).to_sparse()}, TypeError,
     r"weight must be a dense Tensor, got layout torch\.sparse_coo; call to_dense\(\) on it"),
    ({"lora_B": torch.ones(5, 2).to_sparse_csr()}, TypeError, r"lora_B must be a dense Tensor.* to_dense\(\)"),
    ({"x": torch.nested.nested_tensor([torch.ones(2, 6), torch.ones(3, 6)], layout=torch.jagged)}, TypeError,
     r"x must be a dense Tensor, got layout torch\.jagged; pass x\.values\(\)"),
    ({"impl": "cuda"}, ValueError, "impl must be one of 'auto', 'triton', 'native', 'eager', got 'cuda'"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CALLS, ids=lambda v: str(v)[:60])
def test_lora_linear_names_what_is_wrong(changes, error, message):
    with pytest.raises(error, match=message):
        lora_linear(**operands(**changes))


@pytest.mark.parametrize("scale", [2, np.float32(2), np.float64(2), np.int64(2)])
def test_every_kind_of_number_is_a_scale(scale):
    named = operands()
    assert torch.equal(lora_linear(**named | {"scale": scale}), lora_linear(**named | {"scale": 2.0}))


BAD_FIELDS = [
    ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
    ({"rank": -3}, ValueError, "rank must be at least 1, got -3"),
    ({"rank": 2.0}, TypeError, "rank must be an int of at least 1, got 2.0"),
    ({"rank": True}, TypeError, "rank must be an int"),
    ({"alpha": float("nan")}, ValueError, "alpha must be a finite number, got nan"),
    ({"alpha": "16"}, TypeError, "alpha must be a finite number, got '16'"),
    ({"dropout": 1}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    ({"use_rslora": "yes"}, TypeError, "use_rslora must be True or False, got 'yes'"),
    ({"init": "zeros"}, ValueError, "init must be 'kaiming', 'gaussian' or 'normal', got 'zeros'"),
    ({"r": 4}, TypeError, "has no field 'r'; did you mean 'rank'?"),
    ({"lora_alpha": 4}, TypeError, "has no field 'lora_alpha'; did you mean 'alpha'?"),
    ({"lora_dropout": 0.1}, TypeError, "has no field 'lora_dropout'; did you mean 'dropout'?"),
    ({"init_lora_weights": True}, TypeError, "has no field 'init_lora_weights'; did you mean 'init'?"),
    ({"rnak": 4}, TypeError, "has no field 'rnak'; did you mean 'rank'?"),
    ({"width": 4}, TypeError, "has no field 'width'; fields: rank, alpha"),
]
BAD_CONFIGS = [
    *BAD_FIELDS,
    ({"target_modules": "("}, ValueError, "target_modules must hold regular expressions"),
    ({"target_modules": []}, ValueError, "target_modules must name at least one module"),
    ({"target_modules": 3}, TypeError, "target_modules must be a regular expression or a list of names, got 3"),
    ({"exclude_modules": [""]}, TypeError, "exclude_modules must be"),
    ({"rank_pattern": {"a": 0}}, ValueError, r"rank_pattern\['a'\] must be at least 1, got 0"),
    ({"alpha_pattern": {"a": float("inf")}}, ValueError, r"alpha_pattern\['a'\] must be a finite number"),
    ({"modules_to_save": "head"}, TypeError, "modules_to_save must be a list of names, got 'head'"),
    ({"modules_to_save": [3]}, TypeError, "modules_to_save must be a regular expression or a list of names"),
    ({"bias": "some"}, ValueError, "bias must be 'none', 'lora_only' or 'all', got 'some'"),
    ({"rank_pattern": [1]}, TypeError, r"rank_pattern must be a mapping of regular expressions, got \[1\]"),
    ({"alpha": 10**400}, ValueError, "alpha must be a finite number"),
    ({"adapter_dtype": torch.int8}, TypeError, "adapter_dtype must be a floating point"),
]


@pytest.mark.parametrize(("fields", "error", "message"), BAD_CONFIGS, ids=lambda v: str(v)[:60])
def test_config_and_apply_lora_name_the_field(fields, error, message):
    with pytest.raises(error, match=message):
        LoRAConfig(**fields)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    with pytest.raises(error, match=message):
        apply_lora(model, **fields)
    assert type(model[0]) is torch.nn.Linear
    assert model[0].weight.requires_grad


@pytest.mark.parametrize(("fields", "error", "message"), BAD_FIELDS, ids=lambda v: str(v)[:60])
def test_layer_names_the_field(fields, error, message):
    linear = torch.nn.Linear(3, 4)
    with pytest.raises(error, match=message):
        FusedLoRALinear.from_linear(linear, **fields)
    assert linear.weight.requires_grad
    with pytest.raises(error, match=message):
        FusedLoRALinear(3, 4, **fields)
    layer = FusedLoRALinear(3, 4)
    with pytest.raises(error, match=message):
        layer.add_adapter("other", **fields)
    assert list(layer.adapters) == ["default"]


def test_unknown_impl_and_unmatched_target_change_nothing():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    for call, error, message in [
        (lambda: apply_lora(model, impl="fast"), ValueError, "impl must be one of"),
        (lambda: apply_lora(model, target_modules=["q_proj"]), ValueError, r"got \['q_proj'\]; linear layers here"),
        (lambda: apply_lora(torch.nn.ReLU()), ValueError, "the model has no linear layer"),
        (lambda: FusedLoRALinear.from_linear(model[0], impl="fast"), ValueError, "impl must be one of"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    assert type(model[0]) is torch.nn.Linear
    assert model[0].weight.requires_grad


def test_near_names_are_offered():
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(3, 3), "out": torch.nn.Linear(3, 3)})
    with pytest.raises(ValueError, match="linear layers here: 'q_proj'"):
        apply_lora(model, target_modules=["qproj"])


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "keys", "training", "forward"])
def test_adapter_names_that_a_module_cannot_bear(name):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="adapter name must"):
        apply_lora(model, adapter=name)
    assert type(model[0]) is torch.nn.Linear


def test_unknown_and_taken_adapter_names():
    model = apply_lora(torch.nn.Sequential(torch.nn.Linear(3, 3)), adapter="cats")
    for call in (set_adapter, delete_adapter):
        with pytest.raises(ValueError, match="adapter 'dogs' is not here; adapters: 'cats'"):
            call(model, "dogs")
    with pytest.raises(ValueError, match="adapter 'cats' is in '0' already"):
        add_adapter(model, "cats")
    assert model[0].active_adapter == "cats"


SMALL = st.integers(1, 6)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 5), SMALL, SMALL, SMALL, st.sampled_from(["x", "weight", "lora_A", "lora_B", "bias"]), SMALL, SMALL
)
def test_any_wrong_shape_is_refused_by_name_and_any_right_one_is_computed(M, K, N, R, which, rows, cols):
    inputs = oracle.draw(M, K, N, R)
    named = {
        "x": inputs.x,
        "weight": inputs.weight,
        "lora_A": inputs.lora_A,
        "lora_B": inputs.lora_B,
        "bias": inputs.bias,
    }
    right = named[which].shape
    named[which] = torch.ones(cols) if which == "bias" else torch.ones(rows, cols)
    fits = named[which].shape == right or (which == "x" and cols == K)
    if fits:
        assert lora_linear(**named, scale=1.0).shape == (named["x"].shape[0], N)
    else:
        with pytest.raises(ValueError, match=r"(x|weight|lora_A|lora_B|bias) must be"):
            lora_linear(**named, scale=1.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 70), st.integers(1, 40), st.integers(1, 20), st.floats(-8, 8), st.booleans())
def test_any_shape_is_within_the_bound_that_no_correct_forward_exceeds(M, K, N, R, scale, bias):
    inputs = oracle.draw(M, K, N, R, bias=bias, scale=scale)
    exact = oracle.results(inputs.to(torch.float64), lora_linear)["y"]
    for impl in ("eager", "triton"):
        y = lora_linear(inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, scale, inputs.bias, impl=impl)
        assert bool(((y.double() - exact).abs() <= oracle.forward_bound(inputs)).all())
