"""Layers over a weight of four or eight bits: what they compute, and what they keep."""

import copy
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

import oracle
import quantized_layers as layers
from quantized_layers import KINDS, four_bit, net, parts, shaken, stored, values
from test_imports import run

from fused_lora import (
    FusedLoRALinear,
    add_adapter,
    apply_lora,
    delete_adapter,
    disable_adapters,
    lora_parameters,
    quantized,
    reference,
    set_adapter,
    summary,
)
from fused_lora.bench import measure
from fused_lora.dropout import dropout_mask
from fused_lora.functional import new_seed
from fused_lora.quantized.kind import plain_parts
from fused_lora.quantized.layer import FusedLoRAQuantized
from fused_lora.quantized.linear import quantized_lora_linear

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


def drawn(layer, M, R, dtype, adapter_dtype=None, bias=True):
    """Operands whose weight is what the layer's stands for."""
    N, K = values(layer).shape
    inputs = oracle.draw(M, K, N, R, dtype, adapter_dtype, bias)
    inputs.weight = values(layer, dtype)
    return inputs


def over(layer, **options):
    packed = quantized.kind_of(layer).packed(layer)

    def forward(x, weight, lora_A, lora_B, scale, bias):
        return quantized_lora_linear(x, packed, lora_A, lora_B, scale, bias, **options)

    return forward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_dequantized_weight(kind, dtype, cpu_impl):
    layer = KINDS[kind](128, 96)
    for M, R, adapter_dtype, bias in ((17, 4, torch.float32, True), (1, 16, dtype, False), (0, 3, dtype, True)):
        inputs = drawn(layer, M, R, dtype, adapter_dtype, bias)
        got = oracle.results(inputs, over(layer))
        oracle.check(inputs, got)
        assert got["dA"].dtype == got["dB"].dtype == adapter_dtype


def test_the_triton_kernels_compute_it_too():
    layer = four_bit(128, 32)
    inputs = drawn(layer, 17, 4, torch.float32)
    oracle.check(inputs, oracle.results(inputs, over(layer, impl="triton")), kernel=True)


def test_dropout_draws_the_mask_of_lora_linear(cpu_impl):
    layer = four_bit(128, 96)
    inputs = drawn(layer, 33, 4, torch.float32)
    torch.manual_seed(3)
    got = oracle.results(inputs, over(layer, dropout_p=0.3))
    torch.manual_seed(3)
    mask = dropout_mask(new_seed(CPU, 0), 33, 128, 0.3)
    oracle.check(inputs, got, mask=mask, dropout_p=0.3)
    torch.testing.assert_close(over(layer, dropout_p=0.3, training=False)(*_args(inputs)), over(layer)(*_args(inputs)))


def _args(inputs):
    return inputs.x, None, inputs.lora_A, inputs.lora_B, inputs.scale, inputs.bias


@pytest.mark.parametrize("wanted", ["x", "A", "B", "bias", "xB", "Abias"])
def test_only_the_gradients_that_are_asked_for_are_made(wanted):
    layer = four_bit(128, 96)
    inputs = drawn(layer, 5, 4, torch.float32)
    names = {"x": "x", "A": "lora_A", "B": "lora_B", "bias": "bias"}
    full = oracle.results(inputs, over(layer))
    for key, name in names.items():
        getattr(inputs, name).requires_grad_(key in wanted)
    over(layer)(*_args(inputs)).backward(inputs.dy)
    for key, name in names.items():
        grad = getattr(inputs, name).grad
        assert (grad is not None) == (key in wanted)
        if grad is not None:
            torch.testing.assert_close(grad, full[f"d{key}"])


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16])
def test_a_layer_computes_in_its_own_dtype_and_answers_in_that_of_x(x_dtype):
    layer = shaken(FusedLoRALinear.from_linear(four_bit(128, 96, compute=torch.bfloat16), rank=4))
    assert (layer.weight_dtype, layer.lora_A.dtype) == (torch.bfloat16, torch.bfloat16)
    x = torch.randn(5, 128, dtype=x_dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (x_dtype, x_dtype)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(layer(x), y)
    expected = reference.eager_lora_linear(
        x.bfloat16(), values(layer, torch.bfloat16), layer.lora_A, layer.lora_B, layer.scale, layer.bias.bfloat16()
    )
    torch.testing.assert_close(y, expected.to(x_dtype), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao int8"])
def test_autocast_decides_where_the_layer_does_not(kind):
    layer = shaken(apply_lora(KINDS[kind](128, 96), rank=4))
    x = torch.randn(5, 128)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.sum().backward()
    assert y.dtype == (torch.bfloat16 if kind.startswith("torchao") else torch.float32)
    assert layer.lora_A.grad.dtype == torch.float32
    assert torch.equal(y.bfloat16(), layer(x.bfloat16()))


# --------------------------------------------------------------------------------------------------
# What is kept
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_weight_is_saved_but_its_quantized_tensors(kind):
    layer = KINDS[kind](128, 96)
    inputs, saved = drawn(layer, 5, 4, torch.float32).leaves(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        over(layer)(*_args(inputs))
    own = {part.data_ptr() for part in parts(layer)}
    dense = [t for t in saved if t.numel() == 128 * 96]
    assert all({part.data_ptr() for part in plain_parts(t)} <= own for t in dense)
    assert {tuple(t.shape) for t in saved} >= {(5, 128), (4, 128), (96, 4), (5, 4)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "nf4 of bfloat16, scales plain", "fp4", "int8"])
def test_a_step_takes_one_weight_more_than_over_plain_ones(kind, dtype, monkeypatch):
    K, M, block = 256, 64, 1 << 12
    monkeypatch.setattr(quantized.bitsandbytes, "_BLOCK", block)
    x = torch.randn(M, K, dtype=dtype)

    def peak(model):
        apply_lora(model, rank=8)

        def step():
            model.zero_grad(set_to_none=True)
            model(x).square().sum().backward()

        step()
        return measure.peak_bytes(step, CPU)

    plain = peak(nn.Sequential(*(nn.Linear(K, K, dtype=dtype) for _ in range(3))))
    over_quantized = peak(nn.Sequential(*(KINDS[kind](K, K) for _ in range(3))))
    weight = K * K * dtype.itemsize
    # scales in float32, or a few rows, and a bias in x's dtype
    scales = K * 4 + (2 * block * 4 if kind == "int8" else 2 * 4 * K * K // 64)
    assert plain + weight // 2 <= over_quantized <= plain + weight + scales + K * dtype.itemsize


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode_computes_the_same(kind):
    model = shaken(apply_lora(net(KINDS[kind]), rank=4)).eval()
    x = torch.randn(5, 128)
    with torch.inference_mode():
        y = model(x)
    assert torch.equal(y, model(x))


def test_the_quantized_parameter_is_the_very_one_and_the_state_dict_keeps_its_names():
    for make in KINDS.values():
        layer = make(128, 32)
        weight, names, before = layer.weight, set(layer.state_dict()), stored(layer)
        model = apply_lora(nn.Sequential(layer), rank=2)
        assert model[0] is layer
        assert layer.weight is weight
        assert isinstance(layer, FusedLoRAQuantized)
        assert {n for n in layer.state_dict() if not n.startswith("adapters.")} == names
        shaken(model)(torch.randn(4, 128)).sum().backward()
        assert all(torch.equal(*pair) for pair in zip(before, stored(layer), strict=True))
        assert weight.grad is None


# --------------------------------------------------------------------------------------------------
# The life of a layer
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_without_an_adapter_it_is_the_librarys_own_forward(kind, training):
    model = net(KINDS[kind]).train(training)
    x = torch.randn(5, 128, requires_grad=True)
    expected = copy.deepcopy(model)(x)
    shaken(apply_lora(model, rank=4))
    assert not torch.equal(model(x), expected)
    with disable_adapters(model):
        assert torch.equal(model(x), expected)
    set_adapter(model, None)
    assert torch.equal(model(x), expected)
    set_adapter(model, "default")
    delete_adapter(model, "default")
    assert torch.equal(model(x), expected)


def test_inference_leaves_the_weight_as_it_is():
    """bitsandbytes itself rounds the scales of a layer that it evaluates on some CPUs."""
    model = apply_lora(net(), rank=4).eval()
    before = [stored(layer) for layer in (model[0], model[2])]
    with torch.no_grad(), disable_adapters(model):
        model(torch.randn(5, 128))
    for layer, tensors in zip((model[0], model[2]), before, strict=True):
        assert all(torch.equal(*pair) for pair in zip(tensors, stored(layer), strict=True))


def test_several_adapters_add_up_and_each_has_its_dropout():
    model = net()
    x = torch.randn(5, 128)
    apply_lora(model, rank=4)
    add_adapter(model, "other", rank=3, alpha=5, dropout=0.5)
    set_adapter(model, ["default", "other"])
    shaken(model)
    layer = model[0].eval()
    expected = nn.functional.linear(x, values(layer), layer.bias)
    for name in ("default", "other"):
        adapter = layer.adapter(name)
        expected = expected + (x @ adapter.lora_A.t()) @ adapter.lora_B.t() * adapter.scale
    torch.testing.assert_close(layer(x), expected)
    set_adapter(model, {"default": 0.5, "other": 0.0})
    half = nn.functional.linear(x, values(layer), layer.bias) + 0.5 * (
        (x @ layer.adapter("default").lora_A.t()) @ layer.adapter("default").lora_B.t()
    )
    torch.testing.assert_close(layer(x), half)
    model.train()(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in lora_parameters(model))


def test_checkpointing_gives_the_same_gradients_under_dropout():
    grads = []
    for wrap in (lambda layer, x: layer(x), lambda layer, x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(2)
        model = shaken(apply_lora(net(), rank=4, dropout=0.2))
        x = torch.randn(5, 128, requires_grad=True)
        torch.manual_seed(4)
        wrap(model, x).sin().sum().backward()
        grads.append([x.grad, *(p.grad for p in lora_parameters(model))])
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao fp8"])
def test_second_derivatives_are_those_of_the_dequantized_weight(kind):
    layer = KINDS[kind](128, 32)
    inputs = drawn(layer, 3, 2, torch.float32)
    eager, found = reference.eager_lora_linear, []
    for forward, operands in ((over(layer), inputs), (eager, inputs), (eager, inputs.to(torch.float64))):
        leaves = operands.leaves()
        args = leaves.x, leaves.weight, leaves.lora_A, leaves.lora_B, leaves.scale, leaves.bias
        wanted = leaves.x, leaves.lora_A, leaves.lora_B
        first = torch.autograd.grad(forward(*args).sin().sum(), wanted, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), wanted))
    for name, *results in zip(("x", "A", "B"), *found, strict=True):
        oracle.within(name, *results)


def test_transforms_of_torch_func_differentiate_it():
    layer = four_bit(128, 32)
    inputs = drawn(layer, 3, 2, torch.float32)

    def loss(A, B):
        return over(layer)(inputs.x, None, A, B, inputs.scale, inputs.bias).sin().sum()

    dA, dB = torch.func.grad(loss, (0, 1))(inputs.lora_A, inputs.lora_B)
    leaves = inputs.leaves()
    loss(leaves.lora_A, leaves.lora_B).backward()
    torch.testing.assert_close((dA, dB), (leaves.lora_A.grad, leaves.lora_B.grad))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("torchao")])
def test_copies_and_pickles_compute_the_same(kind):
    model = shaken(apply_lora(net(KINDS[kind]), rank=4))
    x = torch.randn(5, 128)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(duplicate(x), model(x))
        assert type(duplicate[0]) is type(model[0])
        shaken(duplicate)
        assert not torch.equal(duplicate(x), model(x))


def test_a_layer_made_from_another_shares_its_weight():
    for make in (four_bit, layers.eight_bit):
        base = make(128, 32)
        x = torch.randn(5, 128, requires_grad=True)
        expected = base(x)
        layer = FusedLoRALinear.from_linear(base, rank=4)
        assert layer.weight is base.weight
        assert set(layer.state_dict()) > set(base.state_dict())
        with disable_adapters(layer):
            assert torch.equal(layer(x), expected)
        assert torch.equal(base(x), expected)


def test_the_summary_says_how_each_base_is_kept_and_in_how_many_bytes():
    model = nn.Sequential(*(make(128, 64) for make in KINDS.values()), nn.Linear(128, 64))
    found = summary(apply_lora(model, rank=2))
    told = [row.base for row in found.layers]
    assert told == ["nf4", "nf4", "fp4", "nf4", "nf4", "int8", "int8", "float8_e4m3fn", "int4", "float32"]
    bytes_of = dict(zip([*KINDS, "plain"], (row.base_bytes for row in found.layers), strict=True))
    # halves of bytes, a scale for each 64, and the 16 values
    assert bytes_of["nf4 of bfloat16, scales plain"] == 128 * 64 // 2 + 128 * 4 + 16 * 4
    assert bytes_of["int8"] == 128 * 64 + 64 * 4
    assert bytes_of["plain"] == 128 * 64 * 4
    assert found.base == len(model) * (128 * 64 + 64)
    assert found.base_bytes == sum(bytes_of.values()) + sum(layer.bias.nbytes for layer in model)
    assert "nf4 4." in str(found)


def test_importing_the_package_imports_neither_library():
    added = run(
        "import sys, fused_lora.integrations; print([m for m in sys.modules if m in ('bitsandbytes', 'torchao')])"
    )
    assert added.strip() == "[]"
    assert "bitsandbytes" in sys.modules


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_it_is_one_graph_that_keeps_no_more(kind):
    torch._dynamo.reset()
    model = shaken(apply_lora(net(KINDS[kind]), rank=4))
    x = torch.randn(5, 128, requires_grad=True)
    compiled, saved = torch.compile(model, fullgraph=True, backend="aot_eager"), []
    results = []
    for compute in (compiled, model):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = compute(x)
        y.sin().sum().backward()
        results.append([y, x.grad, *(p.grad for p in lora_parameters(model))])
        x.grad = None
        model.zero_grad(set_to_none=True)
    assert all(torch.equal(ours, eager) for ours, eager in zip(*results, strict=True))
    own = {part.data_ptr() for layer in (model[0], model[2]) for part in parts(layer)}
    sizes = {128 * 128, 32 * 128}
    assert all({part.data_ptr() for part in plain_parts(t)} <= own for t in saved if t.numel() in sizes)

    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
