"""``fuse`` over PEFT's layers of quantized bases: PEFT's numbers within the budget, and PEFT's life goes on."""

import copy
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

import oracle
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from quantized_layers import KINDS, eight_bit, four_bit, net, shaken, stored, values
from torch.utils.checkpoint import checkpoint

from fused_lora import quantized, reference
from fused_lora.integrations import peft as integration
from fused_lora.integrations.peft import fuse, summary, unfuse

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore:.*get_apply_tensor"),
]
M = 17


@pytest.fixture
def calls(monkeypatch):
    """Grows by one at every call that is ours."""
    made, compute = [], integration.quantized_lora_linear
    monkeypatch.setattr(integration, "quantized_lora_linear", lambda *a, **k: made.append(k) or compute(*a, **k))
    return made


def peft_model(make=four_bit, **fields):
    base = net(make)
    # as Transformers marks what it loads
    base.is_loaded_in_4bit = base.is_loaded_in_8bit = True
    return shaken(
        get_peft_model(base, LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["0", "2"]} | fields)))
    )


def first(model):
    return model.base_model.model[0]


def results(layer, x, dy):
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(dy)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return {"y": y.detach(), "dx": x.grad, "dA": A.grad, "dB": B.grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_within_the_budget(kind, dtype, calls, cpu_impl):
    layer = first(fuse(peft_model(KINDS[kind])))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    inputs = oracle.draw(M, 128, 128, 4, dtype)
    weight = values(layer.base_layer, dtype)
    bias = layer.base_layer.bias.detach().to(dtype)
    inputs = oracle.Inputs(inputs.x, weight, A.detach(), B.detach(), bias, inputs.dy, layer.scaling["default"])
    got = results(layer, inputs.x, inputs.dy)
    assert len(calls) == 1
    low, exact = (oracle.results(inputs.to(to), reference.eager_lora_linear) for to in (dtype, torch.float64))
    for name, value in got.items():
        oracle.within(name, value, low[name], exact[name])
    assert got["dA"].dtype == torch.float32


@pytest.mark.parametrize("compute", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_computes_in_the_layers_dtype_and_answers_in_pefts(compute, x_dtype, calls):
    theirs = peft_model(lambda K, N: four_bit(K, N, compute=compute))
    ours = fuse(copy.deepcopy(theirs))
    x = torch.randn(M, 128, dtype=x_dtype)
    expected, got = theirs(x), ours(x)
    assert got.dtype == expected.dtype == x_dtype
    assert len(calls) == 2
    torch.testing.assert_close(got, expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("make", [four_bit, eight_bit], ids=["nf4", "int8"])
def test_autocast_is_as_pefts(make, calls):
    theirs = peft_model(make)
    ours = fuse(copy.deepcopy(theirs))
    x = torch.randn(M, 128)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = first(theirs)(x), first(ours)(x)
    assert len(calls) == 1
    torch.testing.assert_close(got, expected, rtol=5e-2, atol=5e-2, check_dtype=False)


def test_a_step_of_qlora_is_pefts(calls):
    """float32 norms and head, a 4-bit base, float32 adapters, checkpointing: as PEFT's own recipe makes them."""
    torch.manual_seed(3)
    base = net(lambda K, N: four_bit(K, N, compute=torch.bfloat16))
    base.is_loaded_in_4bit = True
    prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    config = LoraConfig(r=4, target_modules=["0", "2"], lora_dropout=0.2)
    theirs = shaken(get_peft_model(base, config))
    ours = fuse(copy.deepcopy(theirs))
    x = torch.randn(64, 128, requires_grad=True)
    checkpoint(ours, x, use_reentrant=False).square().mean().backward()
    # each layer once in forward and once again
    assert len(calls) == 4
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.requires_grad)
    for model in (theirs, ours):
        model.zero_grad()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model(x.detach()).square().mean().backward()
    for (name, mine), pefts in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (mine.grad is None) == (pefts.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, pefts.grad, rtol=5e-2, atol=5e-3)


@pytest.mark.parametrize("make", [four_bit, eight_bit], ids=["nf4", "int8"])
def test_disabled_merged_and_unfused_it_is_pefts_own(make, calls):
    theirs = peft_model(make)
    ours = fuse(copy.deepcopy(theirs))
    x = torch.randn(M, 128)
    expected = theirs(x)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(ours(x), theirs(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in (ours, theirs):
            model.merge_adapter()
    assert torch.equal(ours(x), theirs(x))
    assert not calls
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in (ours, theirs):
            model.unmerge_adapter()
    both = (stored(first(model).base_layer) for model in (ours, theirs))
    assert all(torch.equal(*pair) for pair in zip(*both, strict=True))
    ours(x)
    assert len(calls) == 2
    pefts = type(first(theirs))
    assert type(first(ours)) is not pefts
    assert isinstance(first(ours), pefts)
    assert type(first(ours)).__name__ == pefts.__name__
    unfuse(ours)
    assert type(first(ours)) is pefts
    assert torch.equal(ours(x), theirs(x))
    assert not torch.equal(theirs(x), expected)


def test_several_adapters_and_mixed_batches():
    theirs = peft_model()
    theirs.add_adapter("other", LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    ours = fuse(copy.deepcopy(theirs))
    x = torch.randn(4, 128)
    for model in (theirs, ours):
        model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(ours(x), theirs(x))
    names = ["default", "other", "__base__", "other"]
    for model in (theirs, ours):
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(x, adapter_names=names), theirs(x, adapter_names=names), rtol=2e-2, atol=2e-2)


def test_copies_stay_fused_and_layers_that_come_later_are_fused():
    model = fuse(peft_model(target_modules=["0"]))
    assert "fused" in repr(first(copy.deepcopy(model)))
    model.add_adapter("other", LoraConfig(r=3, target_modules=["2"]))
    model.set_adapter("other")
    assert [row.implementation for row in summary(model).layers] == ["peft", "eager"]
    assert summary(model).layers[1].base == "nf4"


def test_saved_and_loaded_by_peft_it_predicts_the_same(tmp_path):
    ours = fuse(peft_model())
    x = torch.randn(M, 128)
    ours.save_pretrained(str(tmp_path))
    base = unfuse(copy.deepcopy(ours)).unload()
    base.is_loaded_in_4bit = True
    again = PeftModel.from_pretrained(base, str(tmp_path)).train()
    torch.testing.assert_close(again(x), ours(x), rtol=1e-4, atol=1e-4)


def test_where_bitsandbytes_multiplies_directly_few_rows_are_left_to_it(calls):
    """On a CPU with AVX512-BF16: in evaluation it packs the weight anew, and the training after that finds it."""
    model = fuse(peft_model()).eval()
    base = first(model).base_layer
    if not base.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no such product")
    x = torch.randn(64, 128)
    expected = model(x)
    calls.clear()
    with torch.no_grad():
        assert torch.equal(model(x), expected)
        assert len(calls) == 2
        few = model(x[:3])
        assert len(calls) == 2
        assert base.weight.quant_state.packing_format_for_cpu
        model(x)
        assert len(calls) == 2
    torch.testing.assert_close(few, expected[:3], rtol=5e-2, atol=5e-2)
    inputs = x.clone().requires_grad_()
    y = model.train()(inputs)
    assert len(calls) == 4
    assert not base.weight.quant_state.packing_format_for_cpu
    y.sum().backward()
    assert inputs.grad.abs().max() > 0
    torch.testing.assert_close(y, expected, rtol=5e-2, atol=5e-2)
    assert not quantized.multiplies_itself(base, inputs)


def test_a_layer_that_cannot_be_computed_says_why_and_runs_pefts_code(calls):
    model = fuse(peft_model())
    first(model).base_layer.compute_dtype = torch.float64
    row = summary(model).layers[0]
    assert (row.implementation, row.base) == ("peft", "uint8")
    assert row.why.startswith("its base_layer: compute_dtype must be")
