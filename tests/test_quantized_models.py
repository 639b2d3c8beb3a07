"""Whole models over quantized weights: made, merged, saved and loaded; and what can't be."""

import copy
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

import bitsandbytes as bnb
from quantized_layers import KINDS, eight_bit, four_bit, net, shaken, stored, torchao, values
from torchao.quantization import Int8DynamicActivationInt8WeightConfig

from fused_lora import (
    FusedLoRALinear,
    add_adapter,
    apply_lora,
    base_state_dict,
    disable_adapters,
    load_adapter,
    lora_linear,
    lora_parameters,
    merge,
    merge_and_unload,
    quantize_base,
    save_adapter,
    set_adapter,
    unmerge,
)
from fused_lora.quantized import kind as quantized_kind
from fused_lora.quantized import kind_of
from fused_lora.quantized.kind import plain_parts

pytestmark = [pytest.mark.filterwarnings("ignore:MatMul8bitLt"), pytest.mark.filterwarnings("ignore:merging into")]
X = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))


# --------------------------------------------------------------------------------------------------
# Merging
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_merging_quantizes_the_sum_and_unmerging_gives_back_the_very_bytes(kind):
    model = shaken(apply_lora(net(KINDS[kind]), rank=4))
    layer, before, weight, y = model[0], stored(model[0]), model[0].weight, model(X)
    state = copy.deepcopy(base_state_dict(model))
    with disable_adapters(model):
        base = model(X)
    dense = values(layer) + layer.scale * layer.lora_B.detach() @ layer.lora_A.detach()
    with pytest.warns(UserWarning, match="rounds the sum again"):
        merge(model)
    assert layer.weight is not weight
    assert type(layer.weight) is type(weight)
    # each value by half a step of its block at most, and the step is a share of the block's largest
    assert (values(layer) - dense).abs().max() < 0.18 * dense.abs().max()
    assert (values(layer) - dense).abs().mean() < 0.5 * (values(layer) - values_before(layer)).abs().mean()
    merged = model(X)
    with disable_adapters(model):
        assert torch.equal(model(X), base)
    assert torch.equal(model(X), merged)
    assert same_states(base_state_dict(model), state)
    unmerge(model)
    assert layer.weight is weight
    assert all(torch.equal(*pair) for pair in zip(before, stored(layer), strict=True))
    assert torch.equal(model(X), y)


def values_before(layer):
    return values(layer._holding(layer._unmerged_weight, layer.bias))


def same_states(one, other):
    raw = [{k: bits(v) for k, v in state.items()} for state in (one, other)]
    return raw[0].keys() == raw[1].keys() and all(torch.equal(v, raw[1][k]) for k, v in raw[0].items())


def bits(tensor):
    return torch.cat([part.detach().reshape(-1).view(torch.uint8) for part in plain_parts(tensor)])


@pytest.mark.parametrize("make", [four_bit, eight_bit], ids=["nf4", "int8"])
def test_a_merged_weight_is_pefts(make):
    from peft import LoraConfig, get_peft_model

    base = net(make)
    base.is_loaded_in_4bit = base.is_loaded_in_8bit = True
    theirs = shaken(get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=4, target_modules=["0", "2"])))
    ours = apply_lora(base, rank=4)
    with torch.no_grad():
        for layer in (ours[0], ours[2]):
            pefts = theirs.base_model.model[0 if layer is ours[0] else 2]
            layer.lora_A.copy_(pefts.lora_A["default"].weight)
            layer.lora_B.copy_(pefts.lora_B["default"].weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs.merge_and_unload()
    merge_and_unload(ours)
    assert type(ours[0]) is type(expected[0])
    # the sums differ by a rounding, which a few values may cross into the next step
    differing = (values(ours[0]) != values(expected[0])).float().mean()
    assert differing < 0.01
    torch.testing.assert_close(ours(X), expected(X), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_for_good_a_layer_is_the_librarys_again_or_plain(kind):
    model = shaken(apply_lora(net(KINDS[kind]), rank=4))
    expected, kept = model(X), copy.deepcopy(model)
    linear = model[0].to_linear()
    dense = merge_and_unload(copy.deepcopy(model), dequantize=True)
    assert [type(dense[0]), type(linear)] == [nn.Linear, nn.Linear]
    assert vars(dense[0]).keys() == vars(nn.Linear(2, 2)).keys()
    dtype = torch.bfloat16 if "bfloat16, scales" in kind else torch.float32
    assert dense[0].weight.dtype == linear.weight.dtype == dtype
    torch.testing.assert_close(dense[0].weight, linear.weight)
    torch.testing.assert_close(dense.float()(X), expected, rtol=2e-2, atol=2e-2)
    half = merge_and_unload(kept, dequantize=torch.float16)
    assert half[0].weight.dtype == half[0].bias.dtype == torch.float16
    merged = merge(model)(X)
    merge_and_unload(model)
    assert type(model[0]) is type(KINDS[kind](128, 128))
    assert kind_of(model[0]).why_not(model[0]) is None
    assert torch.equal(model.train()(X), merged)


def test_merging_leaves_all_as_it_was_where_a_sum_is_not_finite():
    model = shaken(apply_lora(net(), rank=4))
    before = stored(model[0])
    with torch.no_grad():
        model[2].lora_B.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"2: adapter 'default' must merge to a finite weight"):
        merge(model)
    assert not model[0].merged
    assert all(torch.equal(*pair) for pair in zip(before, stored(model[0]), strict=True))


# --------------------------------------------------------------------------------------------------
# quantize_base
# --------------------------------------------------------------------------------------------------

CLASSES = {"nf4": "Linear4bit", "int8": "Linear8bitLt", "fp8": "Linear"}


def plain(dtype=torch.float32):
    return nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 32)).to(dtype)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_plain_model_is_quantized_before_or_after_its_adapters(kind, adapted):
    model = plain()
    layer, dense = model[0], model[0].weight.detach().clone()
    if adapted:
        shaken(apply_lora(model, rank=4))
        trained = lora_parameters(model)
        before, y = [p.clone() for p in trained], model(X)
    assert quantize_base(model, kind) is model
    assert model[0] is layer
    if not adapted:
        assert type(layer).__name__ == CLASSES[kind]
        apply_lora(model, rank=4)
    else:
        assert all(
            ours is p and torch.equal(p, old)
            for ours, p, old in zip(lora_parameters(model), trained, before, strict=True)
        )
        torch.testing.assert_close(model(X), y, atol=0.3, rtol=0.1)
    assert not layer.weight.requires_grad
    assert isinstance(layer, FusedLoRALinear)
    assert (values(layer) - dense).abs().max() < 0.18 * dense.abs().max()
    expected = lora_linear(X, values(layer), layer.lora_A, layer.lora_B, layer.scale, layer.bias)
    torch.testing.assert_close(layer(X), expected)
    model(X).sum().backward()
    quantize_base(model, kind)
    merge_and_unload(model)
    assert type(layer).__name__ == CLASSES[kind]


def test_what_is_excluded_stays():
    model = quantize_base(plain(), "nf4", exclude_modules=["2"], compute_dtype=torch.bfloat16)
    assert [type(layer).__name__ for layer in model] == ["Linear4bit", "Tanh", "Linear"]
    assert model[0].compute_dtype == torch.bfloat16
    twin = bnb.nn.Linear4bit(128, 128, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    assert vars(model[0]).keys() == vars(twin).keys()
    assert set(model[0].state_dict()) == set(twin.state_dict())


def test_a_quantized_state_dict_loads_into_the_librarys_layer():
    model = quantize_base(apply_lora(plain(), rank=2), "int8")
    fresh = nn.Sequential(eight_bit(128, 128), nn.Tanh(), eight_bit(128, 32))
    fresh.load_state_dict(base_state_dict(model))
    assert all(torch.equal(*pair) for pair in zip(stored(fresh[0]), stored(model[0]), strict=True))


def test_an_encoder_reads_its_quantized_layers_by_their_forward():
    encoder = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 3, 64)
    quantize_base(encoder, "nf4")
    with torch.no_grad():
        assert encoder(x).isfinite().all()


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (None, {"kind": "nf5"}, ValueError, "kind must be one of 'nf4', 'int8', 'fp8', got 'nf5'"),
        (None, {"compute_dtype": torch.float64}, ValueError, "compute_dtype must be None, or for 'nf4' a float of"),
        (None, {"kind": "int8", "compute_dtype": torch.float16}, ValueError, "compute_dtype must be None"),
        (None, {"target_modules": ["none"]}, ValueError, r"target_modules must match a linear layer, got \['none'\]"),
        (lambda m: m.double(), {}, TypeError, "0.weight must be float16, bfloat16 or float32 to be quantized"),
        (lambda m: setattr(m, "0", nn.Linear(100, 128)), {}, ValueError, "0 must have in_features in multiples of 64"),
        (lambda m: m.to("meta"), {}, ValueError, "0.weight must have values to be quantized, got one on meta"),
        (lambda m: merge(shaken(apply_lora(m, rank=2))), {}, ValueError, "0 must be unmerged to be quantized"),
        (lambda m: m.append(nn.Linear(128, 128).requires_grad_(False)) and setattr(m[3], "weight", m[0].weight), {},
         ValueError, "0.weight must be its own to be quantized, and 0.weight and 3.weight are one tensor"),
    ],
)  # fmt: skip
def test_quantize_base_says_what_it_cannot_do_and_changes_nothing(change, options, error, message):
    model = plain()
    if change is not None:
        change(model)
    kinds, weights = [type(m) for m in model], [m.weight for m in model if hasattr(m, "weight")]
    with pytest.raises(error, match=message):
        quantize_base(model, **({"kind": "nf4"} | options))
    assert [type(m) for m in model] == kinds
    assert all(m.weight is w for m, w in zip((m for m in model if hasattr(m, "weight")), weights, strict=True))


@pytest.mark.parametrize(("version", "told"), [(None, "none installed"), ("0.9.3", "0.9.3")])
def test_a_library_that_is_missing_or_too_old_is_named(version, told, monkeypatch):
    before = net()
    monkeypatch.setattr(quantized_kind, "version_of", lambda library: version)
    with pytest.raises(ImportError, match=rf"bitsandbytes must be 0\.50 or newer for 4-bit weights, got {told}"):
        quantize_base(plain(), "nf4")
    with pytest.raises(ImportError, match=rf"torchao must be 0\.18 or newer for torchao weights, got {told}"):
        quantize_base(plain(), "fp8")
    with pytest.raises(ValueError, match=r"0: bitsandbytes must be 0\.50 or newer"):
        apply_lora(before, rank=2)


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


def changing_x():
    return torchao(128, 32, config=Int8DynamicActivationInt8WeightConfig())


def not_computable():
    layer = four_bit(128, 32)
    layer.compute_dtype = torch.float64
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bnb.nn.Linear4bit(128, 32), "0: its weight must be quantized, got one that is not yet: bitsandbytes"),
        (
            lambda: bnb.nn.Linear8bitLt(128, 32, has_fp16_weights=False),
            "0: its weight must be quantized, got one",
        ),
        (lambda: bnb.nn.Linear8bitLt(128, 32).to("cpu"), "0: its weight must be kept in 8 bits, got has_fp16_weights"),
        (changing_x, r"0: its weight must be quantized alone, got one that changes x too \(act_quant_kwargs\)"),
        (not_computable, "0: compute_dtype must be float16, bfloat16, float32 or None, got torch.float64"),
    ],
)
def test_a_layer_that_cannot_be_computed_with_is_refused(make, message):
    model = nn.Sequential(make())
    kind, wanted = type(model[0]), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        apply_lora(model, rank=2)
    assert type(model[0]) is kind
    assert [p.requires_grad for p in model.parameters()] == wanted
    with pytest.raises(ValueError, match=message.removeprefix("0: ")):
        FusedLoRALinear.from_linear(model[0], rank=2)
    assert not hasattr(model[0], "adapters")


def test_an_input_that_a_quantized_layer_cannot_take():
    layer = apply_lora(four_bit(128, 32), rank=2)
    with pytest.raises(TypeError, match="x must be float16, bfloat16 or float32 over a quantized weight"):
        layer(torch.randn(5, 128, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x must be \(..., K\) with K = 128, got shape \(5, 63\)"):
        layer(torch.randn(5, 63, requires_grad=True))


# --------------------------------------------------------------------------------------------------
# On disk
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao fp8"])
def test_folders_go_both_ways_between_ours_and_pefts(kind, tmp_path):
    from peft import PeftModel

    base = net(KINDS[kind])
    ours = shaken(apply_lora(copy.deepcopy(base), rank=4, alpha=7))
    add_adapter(ours, "other", rank=2)
    save_adapter(ours, tmp_path / "ours")
    # in evaluation bitsandbytes computes in other dtypes on some CPUs
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).train()
    torch.testing.assert_close(ours(X), theirs(X), rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert torch.equal(again(X), ours(X))
    assert again[0].lora_A.dtype == torch.float32
    set_adapter(ours, "other")
    assert not torch.equal(ours(X), again(X))


def test_a_folder_saved_over_another_kind_of_base_is_refused_where_it_says_so(tmp_path):
    ours = shaken(apply_lora(net(), rank=4))
    save_adapter(ours, tmp_path / "nf4")
    message = r"'a base of nf4' is over what it was saved, and the model's is {}; strict=False loads it all the same"
    for model, told in ((net(eight_bit), "int8"), (plain(), "plain")):
        kinds = [type(module) for module in model]
        with pytest.raises(ValueError, match=message.format(told)):
            load_adapter(model, tmp_path / "nf4")
        assert [type(module) for module in model] == kinds
        with pytest.warns(UserWarning, match="ignored: a base of nf4"):
            load_adapter(model, tmp_path / "nf4", strict=False)
        assert torch.equal(model[0].lora_B, ours[0].lora_B)
    load_adapter(net(), tmp_path / "nf4")
    # PEFT's folders, and ours over a plain base, do not say
    save_adapter(shaken(apply_lora(plain(), rank=4)), tmp_path / "plain")
    load_adapter(net(), tmp_path / "plain")
