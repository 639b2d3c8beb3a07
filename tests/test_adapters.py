"""Adapters on disk: ours and PEFT's, there and back, and every folder that is not what it claims."""

import copy
import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from two_adapters import trained

from fused_lora import (
    FusedLoRALinear,
    add_adapter,
    apply_lora,
    disable_adapters,
    load_adapter,
    lora_parameters,
    save_adapter,
    set_adapter,
)
from fused_lora.checkpoint import CONFIG_FILE, WEIGHTS_FILE

X = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Sequential(nn.Linear(16, 16), nn.Tanh()), nn.Linear(16, 5))


FIELDS = [
    {"rank": 2},
    {"rank": 3, "alpha": 7.5, "use_rslora": True, "dropout": 0.25},
    {"rank": 2, "rank_pattern": {"0": 4}, "alpha_pattern": {"3": 9}},
    {"rank": 1, "target_modules": ["3"]},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_saved_adapter_loads_into_a_plain_copy_and_predicts_the_same(fields, tmp_path):
    model = trained(apply_lora(net(), **fields)).eval()
    save_adapter(model, tmp_path / "adapter")
    assert sorted(os.listdir(tmp_path / "adapter")) == [CONFIG_FILE, WEIGHTS_FILE]
    other = net().eval()
    assert load_adapter(other, tmp_path / "adapter") is other
    assert torch.equal(other(X), model(X))
    with disable_adapters(other):
        assert torch.equal(other(X), net()(X))
    assert [n for n, p in other.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    scales = [m.scale for m in other.modules() if isinstance(m, FusedLoRALinear)]
    assert scales == [m.scale for m in model.modules() if isinstance(m, FusedLoRALinear)]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_peft_reads_ours_and_we_read_what_it_writes(fields, tmp_path):
    model = trained(apply_lora(net(), **fields)).eval()
    save_adapter(model, tmp_path / "ours")
    peft = PeftModel.from_pretrained(net(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(peft(X), model(X), rtol=1e-5, atol=1e-5)
    peft.save_pretrained(str(tmp_path / "peft"))
    again = load_adapter(net(), tmp_path / "peft").eval()
    assert torch.equal(again(X), model(X))


@pytest.mark.parametrize("target", ["all-linear", r"[03]|2\.0", ["2.0", "3"]], ids=str)
def test_an_adapter_trained_by_peft_loads(target, tmp_path):
    config = LoraConfig(r=3, lora_alpha=5, target_modules=target, lora_dropout=0.1)
    peft = trained(get_peft_model(net(), config)).eval()
    peft.save_pretrained(str(tmp_path))
    model = load_adapter(net(), tmp_path, "theirs").eval()
    torch.testing.assert_close(model(X), peft(X), rtol=1e-5, atol=1e-5)
    assert model[3].active_adapter == "theirs"


def test_names_that_end_other_names_are_not_confused(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.inner = nn.Linear(4, 4), nn.ModuleDict({"fc": nn.Linear(4, 4)})

        def forward(self, x):
            return self.inner["fc"](self.fc(x))

    torch.manual_seed(0)
    base = Twice()
    model = trained(apply_lora(copy.deepcopy(base), rank=2, target_modules="fc"))
    assert not isinstance(model.inner["fc"], FusedLoRALinear)
    save_adapter(model, tmp_path)
    x = torch.randn(2, 4)
    assert torch.equal(load_adapter(copy.deepcopy(base), tmp_path)(x), model(x))
    peft = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    torch.testing.assert_close(peft(x), model(x), rtol=1e-5, atol=1e-5)


def test_two_adapters_plug_in_turn_and_loading_replaces_one(tmp_path):
    model = trained(apply_lora(net(), rank=2, adapter="cats"))
    save_adapter(model, tmp_path / "cats", "cats")
    add_adapter(model, "dogs")
    set_adapter(model, "dogs")
    trained(model)
    save_adapter(model, tmp_path / "dogs", "dogs")
    dogs = model(X)
    other = load_adapter(net(), tmp_path / "cats", "cats")
    cats = other(X)
    load_adapter(other, tmp_path / "dogs", "dogs")
    assert torch.equal(other(X), dogs)
    set_adapter(other, "cats")
    assert torch.equal(other(X), cats)
    load_adapter(other, tmp_path / "dogs", "cats", replace=True)
    assert torch.equal(other(X), dogs)


def test_float32_adapters_over_a_16_bit_base_keep_their_precision(tmp_path):
    model = trained(apply_lora(net().bfloat16(), rank=2))
    save_adapter(model, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS_FILE).values()} == {torch.float32}
    other = load_adapter(net().bfloat16(), tmp_path)
    for one, two in zip(lora_parameters(model), lora_parameters(other), strict=True):
        assert torch.equal(one, two)
    assert {p.dtype for p in lora_parameters(load_adapter(net().half(), tmp_path))} == {torch.float32}


def test_a_loaded_adapter_trains_on(tmp_path):
    save_adapter(trained(apply_lora(net(), rank=2)), tmp_path)
    model = load_adapter(net(), tmp_path)
    model(X).sum().backward()
    assert all(p.grad is not None for p in lora_parameters(model))
    assert model[0].weight.grad is None


def test_saving_over_an_adapter_keeps_what_else_is_in_the_folder(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    save_adapter(apply_lora(net(), rank=2), tmp_path)
    save_adapter(apply_lora(net(), rank=5), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", CONFIG_FILE, WEIGHTS_FILE]
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["r"] == 5


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    save_adapter(apply_lora(net(), rank=2), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(trained(apply_lora(net(), rank=2)), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_into_a_file_or_an_unknown_adapter_writes_nothing(tmp_path):
    model = apply_lora(net(), rank=2)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="folder must be a directory"):
        save_adapter(model, tmp_path / "file")
    with pytest.raises(ValueError, match="adapter 'dogs' is not here"):
        save_adapter(model, tmp_path / "new", "dogs")
    assert os.listdir(tmp_path) == ["file"]


# ---------------------------------------------------------------- folders from strangers


def change_config(**changes):
    def change(folder):
        config = json.loads((folder / CONFIG_FILE).read_text()) | changes
        (folder / CONFIG_FILE).write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))

    return change


def change_weights(edit):
    def change(folder):
        tensors = load_file(folder / WEIGHTS_FILE)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS_FILE)

    return change


def rename(old, new):
    return change_weights(lambda tensors: tensors.__setitem__(new, tensors.pop(old)))


def replace(key, value):
    return change_weights(lambda tensors: tensors.__setitem__(key, value))


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def truncate(folder):
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[: len(data) // 2])


# they are changed behind the back of the weights, which know their config
pytestmark = pytest.mark.filterwarnings("ignore:.*is not the one that adapter_model.safetensors was saved with")

A0, B0 = "base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight"
BAD_FOLDERS = {
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), FileNotFoundError, "adapter_config.json"),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), FileNotFoundError, "adapter_model.safetensors"),
    "config is garbage": (write(CONFIG_FILE, b"\xff{"), ValueError, "must be JSON"),
    "config is a list": (write(CONFIG_FILE, b"[1]"), ValueError, "peft_type must be 'LORA', got 'list'"),
    "other method": (change_config(peft_type="IA3"), ValueError, "peft_type must be 'LORA', got 'IA3'"),
    "no method": (change_config(peft_type=...), ValueError, "peft_type must be 'LORA', got None"),
    "DoRA": (change_config(use_dora=True), ValueError, "only plain LoRA can be loaded, got use_dora=True"),
    "unknown variant": (change_config(use_new=1), ValueError, "got use_new=1"),
    "modules to save": (change_config(modules_to_save=["3"]), ValueError, "modules_to_save must leave out layers"),
    "trained biases": (change_config(bias="all"), ValueError, r"'0.base_layer.bias' must be there"),
    "unknown biases": (change_config(bias="some"), ValueError, "bias must be 'none', 'lora_only' or 'all', got 'some'"),
    "mutating init": (change_config(init_lora_weights="pissa"), ValueError, "init_lora_weights='pissa'"),
    "rank 0": (change_config(r=0), ValueError, "rank must be at least 1, got 0"),
    "huge rank": (change_config(r=2**40), ValueError, "must be"),
    "rank is text": (change_config(r="8"), ValueError, "rank must be an int"),
    "NaN alpha": (change_config(lora_alpha=float("nan")), ValueError, "alpha must be a finite number, got nan"),
    "dropout 2": (change_config(lora_dropout=2), ValueError, "dropout must be in"),
    "bad pattern": (change_config(rank_pattern={"(": 2}), ValueError, "rank_pattern must hold regular"),
    "pattern is a list": (change_config(rank_pattern=[1]), ValueError, "adapter_config.json"),
    "wrong rank": (change_config(r=3), ValueError, r"must be \(3, 12\), got \(2, 12\)"),
    "more targets": (change_config(target_modules=["0", "2.0", "3", "nothing"]), None, None),
    "weights are garbage": (write(WEIGHTS_FILE, b"garbage" * 9), ValueError, "must be a safetensors file"),
    "weights are empty": (write(WEIGHTS_FILE, b""), ValueError, "must be a safetensors file"),
    "weights are a pickle": (lambda f: torch.save({}, f / WEIGHTS_FILE), ValueError, "must be a safetensors file"),
    "weights are truncated": (truncate, ValueError, "must be a safetensors file"),
    "no prefix": (rename(A0, "0.lora_A.weight"), ValueError, "keys must be base_model.model"),
    "extra key": (
        replace("base_model.model.0.lora_magnitude_vector", torch.ones(16)),
        ValueError,
        "lora_magnitude_vector",
    ),
    "unknown layer": (rename(A0, "base_model.model.9.lora_A.weight"), ValueError, "needs a linear layer '9'"),
    "not a linear": (rename(A0, "base_model.model.1.lora_A.weight"), ValueError, "needs a linear layer '1'"),
    "half a pair": (change_weights(lambda t: t.pop(B0)), ValueError, "must have lora_A and lora_B, got lora_A alone"),
    "missing layer": (
        change_weights(lambda t: (t.pop(A0), t.pop(B0))),
        ValueError,
        "'0' is one of target_modules, and",
    ),
    "twice": (replace("base_model.model.0.lora_A.default.weight", torch.ones(2, 12)), ValueError, "stands there twice"),
    "wrong shape": (replace(B0, torch.ones(15, 2)), ValueError, r"must be \(16, 2\), got \(15, 2\)"),
    "integers": (replace(A0, torch.ones(2, 12, dtype=torch.int32)), ValueError, "must be floating point"),
    "NaN": (replace(A0, torch.full((2, 12), float("nan"))), ValueError, "must be finite"),
    "nothing": (lambda f: save_file({}, f / WEIGHTS_FILE), ValueError, "must hold at least one adapter"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_a_folder_that_is_not_what_it_claims_changes_nothing(name, adapted, tmp_path):
    change, error, message = BAD_FOLDERS[name]
    save_adapter(trained(apply_lora(net(), rank=2)), tmp_path)
    change(tmp_path)
    model = trained(apply_lora(net(), rank=2)) if adapted else net()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    if error is None:
        load_adapter(model, tmp_path, replace=adapted)
        return
    with pytest.raises(error, match=message):
        load_adapter(model, tmp_path)
    assert [type(m) for m in model.modules()] == classes
    assert [p.requires_grad for p in model.parameters()] == grads
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_not_strict_leaves_missing_layers_alone(tmp_path):
    save_adapter(trained(apply_lora(net(), rank=2)), tmp_path)
    change_weights(lambda t: (t.pop(A0), t.pop(B0)))(tmp_path)
    model = load_adapter(net(), tmp_path, strict=False)
    assert not isinstance(model[0], FusedLoRALinear)
    assert isinstance(model[3], FusedLoRALinear)


def test_a_key_with_an_adapter_name_in_it_is_read(tmp_path):
    model = trained(apply_lora(net(), rank=2))
    save_adapter(model, tmp_path)
    rename(A0, "base_model.model.0.lora_A.default.weight")(tmp_path)
    assert torch.equal(load_adapter(net(), tmp_path)(X), model(X))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from([CONFIG_FILE, WEIGHTS_FILE]),
    place=st.integers(0, 5000),
    data=st.binary(min_size=1, max_size=8),
)
def test_any_bytes_changed_anywhere_load_rightly_or_raise_and_change_nothing(name, place, data, tmp_path):
    save_adapter(apply_lora(net(), rank=2), tmp_path)
    whole = bytearray((tmp_path / name).read_bytes())
    place %= len(whole)
    whole[place : place + len(data)] = data
    (tmp_path / name).write_bytes(whole)
    model = net()
    try:
        load_adapter(model, tmp_path)
    except (ValueError, FileNotFoundError):
        assert {type(m) for m in model.modules()} == {nn.Sequential, nn.Linear, nn.Tanh}
        assert all(p.requires_grad for p in model.parameters())
    else:
        assert bool(torch.isfinite(model(X)).all())
