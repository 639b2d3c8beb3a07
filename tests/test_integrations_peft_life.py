"""What a PEFT model goes through in its life, fused: later adapters, merging, disabling, mixed batches, hooks."""

import copy
import gc
import weakref

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import get_peft_model
from peft.tuners import lora
from peft_models import K, Net, config, count_calls, draw_x, fused_model, layer, peft_model, results, unfused
from peft_models import same_as_peft as assert_same_as_peft
from torch import nn

from fused_lora.integrations.peft import FusedLinear, FusedLoraModel, fuse, summary, unfuse


@pytest.fixture
def calls(monkeypatch):
    return count_calls(monkeypatch)


# ---------------------------------------------------------------- fuse, unfuse, summary


def test_fuse_keeps_every_module_parameter_and_name_and_unfuse_gives_back_pefts_classes():
    model = peft_model()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    classes = {name: type(module) for name, module in modules.items()}
    state = {name: set(module.__dict__) for name, module in modules.items()}
    assert fuse(model) is model
    assert type(layer(model)) is FusedLinear
    assert type(model.base_model) is FusedLoraModel
    assert isinstance(layer(model), lora.Linear)
    assert repr(layer(model)).startswith("lora.Linear(\n  fused, impl='auto'")
    assert all(module is modules[name] for name, module in model.named_modules())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert unfuse(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == state


def test_a_fused_model_answers_as_pefts_own():
    model = fused_model()
    expected = unfused(model)
    assert model.get_model_status() == expected.get_model_status()
    assert model.get_model_status().adapter_model_type == "LoraModel"
    assert model.get_layer_status() == expected.get_layer_status()
    assert repr(model).replace("\n        fused, impl='auto'", "") == repr(expected)
    for module, own in zip(model.modules(), expected.modules(), strict=True):
        assert isinstance(module, type(own))
        assert type(module).__name__ == type(own).__name__
    # whoever looks at the class itself is told the truth
    assert "FusedLinear" in repr(type(layer(model)))


def test_fusing_again_changes_nothing_but_impl(calls):
    model = fuse(fuse(fused_model()))
    model(draw_x())
    assert [call["impl"] for call in calls] == ["auto"] * 2
    fuse(model, impl="eager")(draw_x())
    assert [call["impl"] for call in calls[2:]] == ["eager"] * 2


def test_fuse_refuses_what_it_cannot_fuse():
    with pytest.raises(ValueError, match=r"model must have layers of peft.tuners.lora.Linear, got one without"):
        fuse(Net())
    conv = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 1)), config(target_modules=["0"]))
    with pytest.raises(ValueError, match="got one with Conv2d layers of PEFT's"):
        fuse(conv)
    model = peft_model()
    with pytest.raises(ValueError, match="impl must be one of"):
        fuse(model, impl="fast")
    assert type(layer(model)) is lora.Linear
    assert type(model.base_model) is peft.LoraModel


def test_the_triton_kernel_computes_pefts_layer(calls):
    model = fuse(peft_model(), impl="triton")
    assert_same_as_peft(model, draw_x())
    assert [call["impl"] for call in calls] == ["triton"] * 2


def test_layers_that_peft_adds_later_are_fused(tmp_path, calls):
    model = fused_model(target_modules=["first"])
    model.add_adapter("other", config(r=3, target_modules=["second"]))
    assert type(layer(model, "second")) is FusedLinear
    model.set_adapter("other")
    assert_same_as_peft(model, draw_x())
    assert len(calls) == 1
    whole = peft_model()
    whole.save_pretrained(tmp_path)
    later = fused_model(target_modules=["first"])
    later.load_adapter(tmp_path, "loaded")
    later.set_adapter("loaded")
    later(draw_x())
    assert len(calls) == 3


def test_layers_that_come_another_way_are_reported():
    model = peft.inject_adapter_in_model(config(target_modules=["first"]), Net())
    fuse(model)
    peft.inject_adapter_in_model(config(target_modules=["second"]), model, adapter_name="other")
    rows = {row.path: row for row in summary(model).layers}
    assert rows["second"].implementation == "peft"
    assert rows["second"].why == "not fused: call fuse again"
    assert fuse(model) is model
    assert {row.path: row.implementation for row in summary(model).layers} == {"first": "peft", "second": "eager"}
    # PEFT made "other" active everywhere, and the first layer has none of that name
    assert rows["first"].why == "none of its adapters is active"


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 6)
        self.conv = nn.Conv1d(6, 6, 1)
        self.linear, self.head = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, tokens):
        return self.head(self.linear(self.conv(self.embed(tokens).mT).mT))


def test_summary_tells_every_layer_and_the_why_of_those_that_peft_computes(calls):
    model = fused_model(Mixed(), target_modules=["embed", "conv", "linear"], r=2)
    model.add_adapter("dora", config(target_modules=["linear"], r=2, use_dora=True))
    rows = {row.path.removeprefix("base_model.model."): row for row in summary(model).layers}
    assert {path: row.implementation for path, row in rows.items()} == {
        "embed": "peft", "conv": "peft", "linear": "eager",
    }  # fmt: skip
    assert rows["embed"].why == "a layer of lora.layer.Embedding"
    assert rows["conv"].why == "a layer of lora.layer.Conv1d"
    assert (rows["linear"].out_features, rows["linear"].in_features, rows["linear"].rank) == (5, 6, 2)
    found = summary(model)
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.base == sum(p.numel() for p in Mixed().parameters())
    assert found.adapters + found.base == sum(p.numel() for p in model.parameters())
    assert found.not_adapted == ("base_model.model.head",)
    model.set_adapter("dora")
    assert "adapter 'dora' is a DoraLinearVariant" in str(summary(model))
    assert_same_as_peft(model, torch.arange(8).view(2, 4))
    assert not calls


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def test_summary_tells_of_layers_whose_weights_have_other_names():
    model = peft.get_peft_model(Attentive(), config(target_modules=["attention"], r=2))
    fuse(model)
    rows = {row.path.removeprefix("base_model.model."): row for row in summary(model).layers}
    attention, out = rows["attention"], rows["attention.base_layer.out_proj"]
    assert (attention.implementation, attention.base, attention.base_bytes) == ("peft", "float32", 24 * 8 * 4)
    assert (out.base, out.base_bytes) == ("float32", 8 * 8 * 4)
    assert "attention" in str(summary(model))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m.merge_adapter(), "its adapters are merged into the weight"),
        (lambda m: m.base_model.disable_adapter_layers(), "its adapters are disabled"),
        (lambda m: m.base_model.set_adapter([]), "none of its adapters is active"),
        (lambda m: layer(m).base_layer.register_forward_hook(lambda *a: None), "its base_layer has hooks"),
        (lambda m: setattr(layer(m).base_layer, "forward", abs), "its base_layer has another forward on the instance"),
        (lambda m: setattr(layer(m), "forward", abs), "another forward was put on the instance"),
        (lambda m: setattr(layer(m).lora_dropout["default"], "inplace", True), "lora_dropout of adapter 'default' is"),
        (lambda m: unfuse(m), "not fused: call fuse again"),
        (lambda m: layer(m).base_layer.to(torch.float8_e4m3fn), "its base_layer has a weight of torch.float8_e4m3fn"),
    ],
)
def test_summary_gives_the_reason(change, why):
    model = fused_model(lora_dropout=0.1)
    assert {row.implementation for row in summary(model).layers} == {"eager"}
    change(model)
    assert "peft" in {row.implementation for row in summary(model).layers}
    assert any(row.why.startswith(why) for row in summary(model).layers)


# ---------------------------------------------------------------- merging, disabling


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_and_unloading_leave_plain_linears(safe_merge):
    model, x = fused_model(), draw_x()
    expected = unfused(model).merge_and_unload(safe_merge=safe_merge)(x)
    base = unfused(model).unload()(x)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=safe_merge)
    assert torch.equal(merged(x), expected)
    plain = model.unload()
    assert torch.equal(plain(x), base)
    assert type(plain.first) is type(merged.first) is nn.Linear


def test_disable_adapter_is_exactly_the_base_and_ends_with_the_context(calls):
    model, x = fused_model(), draw_x()
    base, before = unfused(model).unload()(x), model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), before)
    assert len(calls) == 4


def test_a_fused_layer_keeps_nothing_alive():
    model = fused_model()
    A = weakref.ref(layer(model).lora_A["default"].weight)
    model(draw_x()).sum().backward()
    model.delete_adapter("default")
    gc.collect()
    assert A() is None


# ---------------------------------------------------------------- mixed batches, hooks, kwargs


def test_a_batch_of_mixed_adapters_is_pefts(calls):
    model = fused_model()
    model.add_adapter("other", config(r=3))
    model.eval()
    x, names = draw_x(3, K), ["default", "__base__", "other"]
    y = model(x, adapter_names=names)
    assert torch.equal(y, unfused(model)(x, adapter_names=names))
    assert not calls
    for row, name in enumerate(("default", "other")):
        model.set_adapter(name)
        torch.testing.assert_close(y[2 * row], model(x)[2 * row])
    assert len(calls) == 4


HOOKED = {
    "base_layer": lambda m: m.base_layer,
    "lora_A": lambda m: m.lora_A["default"],
    "lora_B": lambda m: m.lora_B["default"],
    "lora_dropout": lambda m: m.lora_dropout["default"],
}


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("where", HOOKED)
def test_hooks_on_pefts_inner_modules_run(where, kind, calls):
    model, ran = fused_model(target_modules=["first"]), []
    inner = HOOKED[where](layer(model))
    handle = getattr(inner, f"register_{kind}_hook")(lambda *args: ran.append(kind))
    expected = results(unfused(model), draw := draw_x())
    count = len(ran)
    got = results(model, draw)
    assert len(ran) == 2 * count > 0
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert not calls
    handle.remove()
    model(draw)
    assert len(calls) == 1


def test_hooks_on_the_layer_itself_run_and_it_stays_fused(calls):
    model = fused_model()
    layer(model).register_forward_hook(lambda module, args, output: 2 * output)
    assert_same_as_peft(model, draw_x())
    assert len(calls) == 2


def test_hooks_for_all_modules_meet_every_inner_module(calls):
    model, seen = fused_model(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        model(draw_x())
    finally:
        handle.remove()
    assert layer(model).lora_A["default"] in seen
    assert not calls


class Doubling(ModelHook):
    def post_forward(self, module, output):
        return output * 2


@pytest.mark.parametrize("fused_first", [False, True])
def test_accelerate_hooks_run_on_the_layer_and_on_its_base(fused_first, calls):
    for name, expected in (("first", 1), ("first.base_layer", 0)):
        calls.clear()
        model = peft_model(target_modules=["first"])
        if fused_first:
            fuse(model)
        add_hook_to_module(layer(model, name), Doubling())
        fuse(model)
        fresh = unfuse(peft_model(target_modules=["first"]))
        fresh.load_state_dict(model.state_dict())
        add_hook_to_module(layer(fresh, name), Doubling())
        x = draw_x()
        torch.testing.assert_close(model(x), fresh(x))
        assert len(calls) == expected
        reported = summary(model).layers[0].implementation
        assert reported == ("eager" if expected else "peft")
        # and the hook survives unfuse
        torch.testing.assert_close(unfuse(model)(x), fresh(x))
        assert len(calls) == expected
