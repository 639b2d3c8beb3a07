"""Folders from strangers: whatever is in them, they load rightly, or one error is told and nothing changes."""

import functools
import io
import json
import math
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

from fused_lora import LoRAConfig, add_adapter, apply_lora, load_adapter, lora_parameters, save_adapter, set_adapter
from fused_lora.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from fused_lora.switching import Adapted

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
FIELDS = {
    "rank": 2, "bias": "lora_only", "modules_to_save": ["head"],
    "rank_pattern": {"fc2": 3}, "alpha_pattern": {"fc1": 5},
}  # fmt: skip


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.fc2(self.fc1(x))))


def net(adapted=False):
    torch.manual_seed(3)
    model = Net()
    if adapted:
        apply_lora(model, **FIELDS)
        add_adapter(model, "other", LoRAConfig(rank=1, target_modules=["fc1"]))
    return model


@functools.cache
def whole() -> dict[str, bytes]:
    model = apply_lora(net(), **FIELDS)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.add_(0.1)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# ---------------------------------------------------------------- what a stranger may do

NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([10**400, 1e-320, 2**40, 0, -1]))
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), NUMBERS, st.text(max_size=12), st.sampled_from(["all", "fc1", ".*", "(", "../.."])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=4,
)
NAMES = st.one_of(
    st.sampled_from(
        [
            "base_model.model.../../../etc/passwd.lora_A.weight", "/etc/passwd", "", "fc1.lora_A.weight",
            "base_model.model.fc1.lora_A.weight", "base_model.model.fc1.lora_A.default.weight",
            "base_model.model.fc1.lora_magnitude_vector", "base_model.model.head.lora_A.weight",
            "base_model.model.adapters.lora_A.weight", "base_model.model.head.adapters.x",
            "base_model.model.fc1.weight", "base_model.model..lora_A.weight",
        ]
    ),
    st.text(max_size=30).map(lambda text: f"base_model.model.{text}"),
)  # fmt: skip
TENSORS = st.builds(
    lambda shape, dtype, value: torch.full(shape, value, dtype=torch.float64).to(dtype),
    st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 8]), max_size=3),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]),
    st.sampled_from([0.0, 1.0, -2.5, float("nan"), float("inf"), 1e300]),
)
FILES = st.sampled_from([CONFIG_FILE, WEIGHTS_FILE])


def pickled():
    buffer = io.BytesIO()
    torch.save({"base_model.model.fc1.lora_A.weight": torch.ones(2, 6)}, buffer)
    return buffer.getvalue()


def in_config(edit):
    def change(files):
        try:
            config = json.loads(files[CONFIG_FILE])
        except ValueError:
            return
        if isinstance(config, dict):
            edit(config)
            files[CONFIG_FILE] = json.dumps(config).encode()

    return change


def in_weights(edit):
    def change(files):
        try:
            tensors = load(files[WEIGHTS_FILE])
        except Exception:
            return
        edit(tensors)
        files[WEIGHTS_FILE] = save(tensors)

    return change


def overwrite(name, place, data):
    def change(files):
        content = bytearray(files[name])
        if content:
            place_here = place % len(content)
            content[place_here : place_here + len(data)] = data
        files[name] = bytes(content)

    return change


def nth(tensors, index):
    return sorted(tensors)[index % len(tensors)] if tensors else ""


def poison(tensor, value):
    if tensor is not None and tensor.is_floating_point():
        tensor.view(-1)[:1].fill_(value)


CHANGES = st.one_of(
    st.builds(overwrite, FILES, st.integers(0, 10000), st.binary(min_size=1, max_size=12)),
    st.builds(lambda name, n: lambda files: files.update({name: files[name][:n]}), FILES, st.integers(0, 3000)),
    st.builds(lambda name, data: lambda files: files.update({name: data}), FILES, st.binary(max_size=60)),
    st.builds(lambda name: lambda files: files.update({name: pickled()}), FILES),
    st.builds(lambda name, data: lambda files: files.update({name: files[name] + data}), FILES, st.binary(max_size=9)),
    st.builds(
        lambda key, value: in_config(lambda config: config.update({key: value})),
        st.one_of(st.sampled_from(sorted(json.loads(whole()[CONFIG_FILE]))), st.text(max_size=8)),
        VALUES,
    ),
    st.builds(lambda n: in_weights(lambda t: t.pop(nth(t, n), None)), st.integers(0, 20)),
    st.builds(lambda n, name: in_weights(lambda t: t.update({name: t.pop(nth(t, n))})), st.integers(0, 20), NAMES),
    st.builds(lambda name, tensor: in_weights(lambda t: t.update({name: tensor})), NAMES, TENSORS),
    st.builds(lambda n, tensor: in_weights(lambda t: t.update({nth(t, n): tensor})), st.integers(0, 20), TENSORS),
    st.builds(
        lambda n, value: in_weights(lambda t: poison(t.get(nth(t, n)), value)),
        st.integers(0, 20),
        st.sampled_from([float("nan"), float("-inf")]),
    ),
)  # fmt: skip


def everything(model):
    """All of a model that a load could change, comparable."""
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        [(name, p.requires_grad, id(p)) for name, p in model.named_parameters()],
        [(name, value.numpy().tobytes()) for name, value in model.state_dict().items()],
        [(m.active_adapters, list(m.adapters)) for m in model.modules() if isinstance(m, Adapted)],
        torch.get_rng_state().tolist(),
    )


def load_or_change_nothing(model, folder, strict):
    """True where it loaded."""
    before = everything(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            load_adapter(model, folder, strict=strict, replace=True)
        except (ValueError, OSError) as caught:
            error = str(caught)
        else:
            return True
    assert str(folder) in error, error
    assert everything(model) == before
    return False


@settings(max_examples=250, deadline=None, derandomize=True)
@given(changes=st.lists(CHANGES, min_size=1, max_size=3), adapted=st.booleans(), strict=st.booleans())
def test_a_corrupted_folder_loads_rightly_or_changes_nothing(changes, adapted, strict):
    files = dict(whole())
    for change in changes:
        change(files)
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        model = net(adapted)
        if load_or_change_nothing(model, folder, strict):
            assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
            assert all(math.isfinite(model.get_submodule(path).scale) for path in ("fc1", "fc2") if adapted)
            set_adapter(model, None)
            assert torch.equal(model(X), net()(X))


PLACES = {
    "folder is a file": lambda folder: (shutil.rmtree(folder), folder.write_text("mine")),
    "folder is missing": lambda folder: shutil.rmtree(folder),
    "folder is empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    "config is a folder": lambda folder: ((folder / CONFIG_FILE).unlink(), (folder / CONFIG_FILE).mkdir()),
    "weights are a folder": lambda folder: ((folder / WEIGHTS_FILE).unlink(), (folder / WEIGHTS_FILE).mkdir()),
    "config points at itself": lambda folder: (
        (folder / CONFIG_FILE).unlink(),
        (folder / CONFIG_FILE).symlink_to(folder / CONFIG_FILE),
    ),
    "weights are the old pickle": lambda folder: (
        (folder / WEIGHTS_FILE).unlink(),
        (folder / "adapter_model.bin").write_bytes(pickled()),
    ),
}


@settings(deadline=None)
@given(place=st.sampled_from(sorted(PLACES)), adapted=st.booleans(), strict=st.booleans())
def test_what_is_no_folder_of_an_adapter_is_one_error_and_changes_nothing(place, adapted, strict):
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "adapter"
        folder.mkdir()
        for name, data in whole().items():
            (folder / name).write_bytes(data)
        PLACES[place](folder)
        assert not load_or_change_nothing(net(adapted), folder, strict)
