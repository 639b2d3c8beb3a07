"""Transformers' ``Conv1D``, GPT-2's linear layer, whose weight is (K, N): as PEFT has it."""

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from fused_lora import (
    FusedLoRALinear,
    add_adapter,
    apply_lora,
    delete_adapter,
    disable_adapters,
    load_adapter,
    lora_parameters,
    merge,
    merge_and_unload,
    save_adapter,
    set_adapter,
    summary,
    unmerge,
)
from fused_lora.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from fused_lora.conv1d import FusedLoRAConv1D
from fused_lora.integrations import peft as integration

TOKENS = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(1))
WAYS = {
    "all-linear": {"target_modules": "all-linear"},
    "one name": {"target_modules": ["c_attn"]},
    "biases and norms": {"target_modules": ["c_attn", "c_fc"], "bias": "all", "modules_to_save": ["ln_f"]},
    "biases": {"target_modules": ["c_attn"], "bias": "lora_only"},
    "rsLoRA": {"target_modules": ["c_proj"], "use_rslora": True},
}
# PEFT says that it takes fan_in_fan_out from the layer, which is right; GPT-2's head is tied to its embedding
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:.*are one tensor"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
]


def gpt2():
    torch.manual_seed(3)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 50, "n_inner": 24}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, bos_token_id=0, eos_token_id=0))


def shaken(model):
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def logits(model):
    return model(TOKENS).logits


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def conv(K=6, N=4):
    torch.manual_seed(2)
    layer = Conv1D(N, K)
    with torch.no_grad():
        layer.bias.normal_()
    return layer


@pytest.mark.parametrize("way", WAYS)
def test_outputs_gradients_and_folders_are_pefts(way, tmp_path):
    theirs = shaken(get_peft_model(gpt2(), LoraConfig(r=3, lora_alpha=5, **WAYS[way])))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = load_adapter(gpt2(), tmp_path / "theirs")
    assert any(isinstance(module, FusedLoRAConv1D) for module in ours.modules())
    same(logits(ours), logits(theirs))
    for model in (ours, theirs):
        logits(model).sin().sum().backward()
    save_adapter(ours, tmp_path / "ours")
    mine, pefts = (load_file(tmp_path / writer / WEIGHTS_FILE) for writer in ("ours", "theirs"))
    # with bias="all" PEFT writes some biases twice
    doubles = [key for key in pefts if ".modules_to_save." in key or ".original_module." in key]
    assert mine.keys() == pefts.keys() - set(doubles)
    assert all(torch.equal(mine[key], pefts[key]) for key in mine)
    assert json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())["fan_in_fan_out"] is True
    grads = {name: p.grad for name, p in ours.named_parameters() if ".lora_" in name}
    expected = {name: p.grad for name, p in theirs.named_parameters() if ".lora_" in name}
    assert len(grads) == len(expected) > 0
    for name, grad in grads.items():
        same(grad, expected[f"base_model.model.{name.replace('.adapters.default', '')}.default.weight"])
    assert len([p for p in ours.parameters() if p.requires_grad]) == len(lora_parameters(ours))
    again = PeftModel.from_pretrained(gpt2(), str(tmp_path / "ours"))
    same(logits(again), logits(theirs))


def test_gradients_of_one_layer_are_pefts():
    torch.manual_seed(4)
    model = get_peft_model(nn.Sequential(conv()), LoraConfig(r=2, target_modules=["0"], fan_in_fan_out=True))
    theirs = shaken(model).base_model.model[0]
    layer = FusedLoRALinear.from_linear(conv(), rank=2, alpha=8)
    with torch.no_grad():
        layer.lora_A.copy_(theirs.lora_A["default"].weight)
        layer.lora_B.copy_(theirs.lora_B["default"].weight)
    xs = [torch.randn(5, 6, generator=torch.Generator().manual_seed(6)).requires_grad_() for _ in range(2)]
    for module, x in zip((layer, theirs), xs, strict=True):
        module(x).sin().sum().backward()
    same(xs[0].grad, xs[1].grad)
    same(layer.lora_A.grad, theirs.lora_A["default"].weight.grad)
    same(layer.lora_B.grad, theirs.lora_B["default"].weight.grad)
    assert layer.weight.grad is None


def test_a_layer_keeps_its_identity_weight_and_place(cpu_impl):
    net = nn.Sequential(conv())
    layer, weight, expected = net[0], net[0].weight, net[0](torch.ones(3, 6))
    names = set(net.state_dict())
    apply_lora(net, rank=2)
    assert net[0] is layer
    assert (type(layer), layer.weight) == (FusedLoRAConv1D, weight)
    assert (layer.in_features, layer.out_features, layer.lora_A.shape, layer.lora_B.shape) == (6, 4, (2, 6), (4, 2))
    # the extension sums few rows in an order of its own
    torch.testing.assert_close(net(torch.ones(3, 6)), expected, rtol=1e-6, atol=1e-6)
    shaken(net)
    tuned = net(torch.ones(3, 6))
    with disable_adapters(net):
        assert torch.equal(net(torch.ones(3, 6)), expected)
    set_adapter(net, None)
    assert torch.equal(net(torch.ones(3, 6)), expected)
    set_adapter(net, "default")
    for duplicate in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(duplicate(torch.ones(3, 6)), tuned)
    delete_adapter(net, "default")
    assert set(net.state_dict()) == names
    merge_and_unload(net)
    assert type(layer) is Conv1D
    assert vars(layer).keys() == vars(conv()).keys()
    assert repr(layer) == repr(conv())
    assert torch.equal(net(torch.ones(3, 6)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_adds_the_transposed_product(dtype):
    layer = FusedLoRALinear.from_linear(conv().to(dtype), rank=2, alpha=3)
    shaken(layer)
    before = layer.weight.clone()
    total = before.float() + 1.5 * (layer.lora_B.float() @ layer.lora_A.float()).t()
    x = torch.randn(3, 6).to(dtype)
    plain = layer.to_linear()
    assert type(plain) is Conv1D
    assert plain.weight.requires_grad
    merge(layer)
    rounding = {"rtol": torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
    torch.testing.assert_close(layer.weight.float(), total, **rounding)
    assert torch.equal(plain.weight, layer.weight)
    assert torch.equal(layer(x), plain(x))
    unmerge(layer)
    assert torch.equal(layer.weight, before)
    merge_and_unload(layer)
    assert type(layer) is Conv1D
    assert torch.equal(layer(x), plain(x))


def test_a_merged_model_is_what_peft_merges(tmp_path):
    theirs = shaken(get_peft_model(gpt2(), LoraConfig(r=3, target_modules=["c_attn", "c_fc", "c_proj"])))
    theirs.save_pretrained(str(tmp_path))
    ours = merge_and_unload(load_adapter(gpt2(), tmp_path)).state_dict()
    expected = theirs.merge_and_unload().state_dict()
    assert ours.keys() == expected.keys()
    assert any(".attn.c_attn.weight" in key for key in ours)
    for key in ours:
        same(ours[key], expected[key])


def test_several_adapters_and_dropout():
    model = apply_lora(gpt2(), rank=2, target_modules=["c_attn"], dropout=0.2)
    add_adapter(model, "other", rank=3, target_modules=["c_attn", "c_fc"])
    set_adapter(model, ["default", "other"])
    shaken(model)
    logits(model).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lora_parameters(model))
    both = logits(model.eval())
    same(logits(merge(model)), both)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_fused_peft_model_computes_and_learns_as_before(dropout, monkeypatch):
    calls = []
    lora_linear = integration.lora_linear
    monkeypatch.setattr(integration, "lora_linear", lambda *a, **k: calls.append(1) or lora_linear(*a, **k))
    theirs = shaken(get_peft_model(gpt2(), LoraConfig(r=3, lora_dropout=dropout, target_modules=["c_attn", "c_proj"])))
    fused = integration.fuse(copy.deepcopy(theirs))
    assert not any(row.implementation == "peft" for row in integration.summary(fused).layers)
    if dropout:
        logits(fused).sum().backward()
        assert all(p.grad.isfinite().all() for p in fused.parameters() if p.requires_grad)
        fused.zero_grad()
        fused.eval(), theirs.eval()
    calls.clear()
    for model in (theirs, fused):
        logits(model).sin().sum().backward()
    assert len(calls) == 6
    same(logits(fused), logits(theirs))
    for mine, pefts in zip(fused.parameters(), theirs.parameters(), strict=True):
        assert (mine.grad is None) == (pefts.grad is None)
        if mine.grad is not None:
            same(mine.grad, pefts.grad)
    same(logits(fused.merge_and_unload()), logits(theirs))


def test_summaries_tell_embeddings():
    model = apply_lora(gpt2(), rank=2, target_modules=["c_attn"])
    found = summary(model)
    assert found.embeddings == ("transformer.wte", "transformer.wpe")
    assert [row.path for row in found.layers] == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    assert "transformer.h.0.mlp.c_fc" in found.not_adapted
    line = "embeddings, whose adapters are left to PEFT: transformer.wte, transformer.wpe"
    assert line in str(found)
    theirs = get_peft_model(gpt2(), LoraConfig(r=3, target_modules=["c_attn", "wte"]))
    shown = str(integration.summary(integration.fuse(theirs)))
    assert "embeddings, whose adapters are left to PEFT: " in shown
    assert "a layer of lora.layer.Embedding" in shown


def test_what_a_conv1d_cannot_be():
    with pytest.raises(TypeError, match="FusedLoRAConv1D must be made of a Conv1D"):
        FusedLoRAConv1D(4, 3)

    class Other(Conv1D):
        pass

    with pytest.raises(ValueError, match=r"it matches 0 \(Other\), which can't take an adapter"):
        apply_lora(nn.Sequential(Other(4, 3)), target_modules=["0"])


def test_a_compiled_layer_is_one_graph_and_says_the_same():
    layer = shaken(FusedLoRALinear.from_linear(conv(), rank=2))
    torch._dynamo.reset()
    x = torch.randn(5, 6, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    same(compiled, layer(x))
    compiled.sum().backward()
    grads = [p.grad for p in (x, layer.lora_A, layer.lora_B)]
    for p in (x, layer.lora_A, layer.lora_B):
        p.grad = None
    layer(x).sum().backward()
    for mine, p in zip(grads, (x, layer.lora_A, layer.lora_B), strict=True):
        same(mine, p.grad)


@pytest.mark.parametrize("impl", ["eager", "native", "triton"], indirect=True)
def test_every_implementation_reads_the_transposed_weight(impl):
    outputs = []
    for layer in (FusedLoRALinear.from_linear(conv(), rank=2, impl=impl), nn.Linear(6, 4)):
        if type(layer) is nn.Linear:
            with torch.no_grad():
                layer.weight.copy_(conv().weight.t())
                layer.bias.copy_(conv().bias)
            layer = FusedLoRALinear.from_linear(layer, rank=2, impl=impl)
        torch.manual_seed(8)
        with torch.no_grad():
            nn.init.normal_(layer.lora_A)
            nn.init.normal_(layer.lora_B)
        x = torch.ones(3, 6).requires_grad_()
        y = layer(x)
        y.sin().sum().backward()
        outputs.append([y, x.grad, layer.lora_A.grad, layer.lora_B.grad])
    for transposed, plain in zip(*outputs, strict=True):
        same(transposed, plain)
