"""A new user's mistakes: each gets an answer with the words that lead on, and changes nothing."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import (
    FusedLoRALinear,
    LoRAConfig,
    add_adapter,
    add_weighted_adapter,
    apply_lora,
    base_state_dict,
    delete_adapter,
    disable_adapters,
    hotswap_adapter,
    load_adapter,
    lora_linear,
    lora_parameters,
    merge,
    quantize_base,
    save_adapter,
    set_adapter,
    set_impl,
    summary,
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(32, 32), nn.Linear(32, 32)
        self.conv = nn.Conv1d(32, 32, 1)
        self.down = nn.Linear(32, 16)

    def forward(self, x):
        return self.down(self.q_proj(x) + self.v_proj(x))


def adapted():
    return apply_lora(Net(), rank=2, target_modules=["q_proj"])


ERRORS = {
    "one name as a str": (
        lambda: apply_lora(nn.ModuleDict({"block": Net()}), target_modules="q_proj|v_proj"),
        ValueError, r"regular expression for a layer's whole path: pass a list of names, \['q_proj', 'v_proj'\]",
    ),
    "dora": (lambda: apply_lora(Net(), use_dora=True), TypeError, r"'use_dora'; PEFT's option .* not supported yet"),
    "dora of a layer": (lambda: FusedLoRALinear(4, 4, use_dora=True), TypeError, r"'use_dora'.*not supported yet"),
    "lora_bias": (lambda: LoRAConfig(lora_bias=True), TypeError, "'lora_bias'.*not supported yet"),
    "task_type": (lambda: apply_lora(Net(), task_type="CAUSAL_LM"), TypeError, "'task_type'.*leave it out"),
    "a rank as config": (lambda: apply_lora(Net(), 8), TypeError, "config must be a LoRAConfig.*got 8;.*rank=8"),
    "config before the name": (
        lambda: add_adapter(Net(), LoRAConfig(), "b"), TypeError, "config must be a LoRAConfig.*got 'b'",
    ),
    "a class": (lambda: apply_lora(Net), TypeError, r"model must be an nn.Module, got the class Net; make one: Net\("),
    "a class, set": (lambda: set_adapter(Net, "default"), TypeError, "got the class Net"),
    "a class, read": (lambda: load_adapter(Net, "folder"), TypeError, "got the class Net"),
    "a class, disabled": (lambda: disable_adapters(Net).__enter__(), TypeError, "got the class Net"),
    "a class, merged": (lambda: merge(Net), TypeError, "got the class Net"),
    "a class, summed up": (lambda: summary(Net), TypeError, "got the class Net"),
    "no model": (lambda: base_state_dict(None), TypeError, "model must be an nn.Module, the first argument, got None"),
    "folder first, saved": (
        lambda: save_adapter("folder", adapted()), TypeError, "model must be an nn.Module, the first.*got 'folder'",
    ),
    "folder first, read": (lambda: load_adapter("folder", Net()), TypeError, "the first argument, got 'folder'"),
    "no folder": (lambda: load_adapter(Net(), Net()), TypeError, "folder must be a path.*got a Net"),
    "name before the folder": (
        lambda: hotswap_adapter(adapted(), "default", "some/folder"),
        ValueError, "folder comes before the adapter's name, got 'default'",
    ),
    "name before the folder, saved": (
        lambda: save_adapter(adapted(), "default", "folder"), ValueError, "folder comes before the adapter's name",
    ),
    "saved before adapted": (
        lambda: save_adapter(Net(), "folder"), ValueError, "'default' is not here; adapters: none; call apply_lora",
    ),
    "set before adapted": (lambda: set_adapter(Net(), "default"), ValueError, "adapters: none; call apply_lora"),
    "deleted before adapted": (lambda: delete_adapter(Net(), "cats"), ValueError, "adapters: none; call apply_lora"),
    "mixed before adapted": (
        lambda: add_weighted_adapter(Net(), "mix", ["cats"], [1.0]), ValueError, "adapters: none; call apply_lora",
    ),
    "another name": (lambda: set_adapter(adapted(), "dgos"), ValueError, "'dgos' is not here; adapters: 'default'"),
    "token ids": (
        lambda: adapted()(torch.zeros(2, 9, dtype=torch.long)), TypeError,
        "x must be floating point, got torch.int64; token ids go through an embedding",
    ),
    "token ids of the layer's width": (
        lambda: adapted().q_proj(torch.zeros(2, 32, dtype=torch.int32)), TypeError, "got torch.int32; token ids",
    ),
    "another float": (lambda: adapted()(torch.zeros(2, 32).double()), TypeError, "cast x, or use torch.autocast"),
    "a weight the other way round": (
        lambda: lora_linear(torch.ones(2, 6), torch.ones(6, 5), torch.ones(2, 6), torch.ones(5, 2), 1.0),
        ValueError, r"weight must be \(N, K\) = \(5, 6\) for these lora_B and lora_A, got \(6, 5\); pass weight.t\(\)",
    ),
    "PEFT's adapter_name": (
        lambda: load_adapter(Net(), "x", adapter_name="b"),
        TypeError, "no argument 'adapter_name'; did you mean 'adapter'",
    ),
    "a device": (lambda: load_adapter(Net(), "x", device="cpu"), TypeError, "'device'; .*move the model"),
    "bits": (lambda: quantize_base(Net(), bits=4), TypeError, "no argument 'bits'; pass the kind: 'nf4'"),
    "a broken pattern": (lambda: apply_lora(Net(), target_modules="("), ValueError, "target_modules must hold regular"),
    "an implementation of no name": (lambda: set_impl(adapted(), "fast"), ValueError, "impl must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", ERRORS)
def test_the_error_names_the_argument_and_the_way_out(mistake):
    call, error, words = ERRORS[mistake]
    with pytest.raises(error, match=words):
        call()


WARNINGS = {
    "one of two names": ({"target_modules": ["q_proj", "vproj"]}, "no linear layer is called 'vproj'.*'v_proj'"),
    "a convolution": ({"target_modules": ["q_proj", "conv"]}, r"called 'conv' \('conv' is a Conv1d\)"),
    "no module to save": ({"target_modules": ["q_proj"], "modules_to_save": ["down", "haed"]}, "called 'haed'"),
    "rank_pattern": ({"rank_pattern": {"typo": 2}}, "rank_pattern: no adapted layer matches 'typo'; adapted.*'q_proj'"),
    "alpha_pattern": ({"alpha_pattern": {"q_proj": 2, "typo": 2}}, "alpha_pattern: no adapted layer matches 'typo'"),
    "pattern of a layer left out": ({"rank_pattern": {"down": 2}, "target_modules": ["q_proj"]}, "matches 'down'"),
    "excluded name": ({"exclude_modules": ["typo"]}, "exclude_modules: no linear layer is called 'typo'"),
    "excluded pattern": ({"exclude_modules": "typo.*"}, "exclude_modules: no linear layer matches 'typo.*'"),
    "alpha of 0": ({"alpha": 0}, "alpha=0 makes scale 0"),
    "rank above the layers": ({"rank": 64}, "rank 64 is more than any layer can use: the largest, 'q_proj', uses 32"),
}


@pytest.mark.parametrize("way", ["apply_lora", "add_adapter"])
@pytest.mark.parametrize("mistake", WARNINGS)
def test_what_has_no_effect_is_warned_of(mistake, way):
    fields, words = WARNINGS[mistake]
    with pytest.warns(UserWarning, match=words):
        apply_lora(Net(), **fields) if way == "apply_lora" else add_adapter(Net(), "b", **fields)


FINE = [
    {"rank": 32}, {"rank_pattern": {"q_proj": 2, r"down": 3}}, {"alpha_pattern": {".*_proj": 2}},
    {"exclude_modules": ["down"]}, {"exclude_modules": ".*_proj"}, {"target_modules": r".*_proj"},
    {"target_modules": ["q_proj"], "modules_to_save": ["down"]}, {"rank": 20, "alpha": 1e-3},
]  # fmt: skip


@pytest.mark.parametrize("fields", FINE, ids=str)
def test_what_is_right_is_not_warned_of(fields):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_lora(Net(), **fields)


def test_a_layer_of_alpha_0_too():
    with pytest.warns(UserWarning, match="alpha=0 makes scale 0"):
        FusedLoRALinear(4, 4, rank=2, alpha=0)


def test_a_pattern_is_also_a_layers_very_name():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = nn.ModuleDict({"a+b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})

    fields = {"rank": 2, "alpha": 2, "alpha_pattern": {"m.a+b": 32}, "rank_pattern": {"m.a+b": 4}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = apply_lora(Odd(), **fields)
    assert (model.m["a+b"].adapter("default").rank, model.m["a+b"].adapter("default").alpha) == (4, 32)
    assert (model.m["c"].adapter("default").rank, model.m["c"].adapter("default").alpha) == (2, 2)


def test_parameters_that_are_all_frozen_are_warned_of():
    model = adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora_parameters(model)
        set_adapter(model, "default", trainable=False)
        # asked for by name: it may be set to train later
        lora_parameters(model, "default")
    with pytest.warns(UserWarning, match="every parameter of the active adapters is frozen.*set_adapter"):
        lora_parameters(model)


# --------------------------------------------------------------------------------------------------
# PEFT's models, and names
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_a_peft_model_is_refused_and_fuse_is_named(fused, tmp_path):
    peft = pytest.importorskip("peft")
    from fused_lora.integrations.peft import fuse

    save_adapter(adapted(), tmp_path)
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    if fused:
        fuse(model)
    before, layer = [*model.state_dict()], model.base_model.model.q_proj
    for call in (
        lambda: apply_lora(model), lambda: apply_lora(model.base_model.model), lambda: add_adapter(model, "b"),
        lambda: load_adapter(model, tmp_path), lambda: FusedLoRALinear.from_linear(layer, rank=2),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"no adapters of PEFT's, got .*fused_lora.integrations.peft.fuse"):
            call()
    for call in (lambda: save_adapter(model, tmp_path / "x"), lambda: set_adapter(model, "default")):
        with pytest.raises(ValueError, match=r"this model's adapters are PEFT's.*its own save_pretrained"):
            call()
    assert [*model.state_dict()] == before
    assert not (tmp_path / "x").exists()
    merged = model.merge_and_unload()
    assert apply_lora(merged, rank=2).q_proj.active_adapters == ("default",)


def test_fuse_of_a_plain_model_names_get_peft_model():
    pytest.importorskip("peft")
    from fused_lora.integrations.peft import fuse

    for model in (Net(), adapted()):
        with pytest.raises(ValueError, match="one without layers of PEFT's; get_peft_model makes them"):
            fuse(model)


@pytest.mark.parametrize("name", ["LoraConfig", "get_peft_model", "fuse", "print_trainable_parameters"])
def test_names_of_other_libraries_lead_to_ours(name):
    with pytest.raises(AttributeError, match=f"fused_lora has no '{name}'; "):
        getattr(fused_lora, name)
    assert not hasattr(fused_lora, name)
    with pytest.raises(ImportError, match=f"fused_lora has no '{name}'; "):
        exec(f"from fused_lora import {name}")


def test_other_names_are_missing_as_ever_and_submodules_are_found():
    with pytest.raises(AttributeError, match="module 'fused_lora' has no attribute 'lora'"):
        fused_lora.lora  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'lora'"):
        exec("from fused_lora import lora")
    code = "from fused_lora import integrations, summary; from fused_lora import *; print(apply_lora.__name__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "apply_lora\n"
