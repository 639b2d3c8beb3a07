"""Everything an adapter trains, on disk: PEFT's files both ways, swapped in place, and never half of two savings."""

import contextlib
import errno
import json
import os
import resource
import signal
import time

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fused_lora import (
    LoRAConfig,
    add_adapter,
    apply_lora,
    disable_adapters,
    hotswap_adapter,
    load_adapter,
    lora_parameters,
    merge,
    save_adapter,
    set_adapter,
    unmerge,
)
from fused_lora.adapters import CONFIG_FILE, WEIGHTS_FILE

X = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 16)
        self.head = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 5, bias=False))

    def forward(self, x):
        return self.head(self.fc2(self.norm(self.fc1(x))))


def net():
    torch.manual_seed(3)
    return Net().eval()


def shaken(model):
    """Every trained parameter moved, as training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


WAYS = {
    "head": {"modules_to_save": ["head"], "target_modules": ["fc1", "fc2"]},
    "norm": {"modules_to_save": ["norm"]},
    "lora_only": {"bias": "lora_only"},
    "all biases": {"bias": "all", "target_modules": ["fc1"]},
    "head and all biases": {"bias": "all", "modules_to_save": ["head"], "target_modules": ["fc2"]},
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_trained_is_saved_and_loads_into_a_plain_copy(way, tmp_path):
    model = shaken(apply_lora(net(), rank=2, **WAYS[way]))
    save_adapter(model, tmp_path)
    other = load_adapter(net(), tmp_path, "mine")
    assert torch.equal(other(X), model(X))
    assert len(lora_parameters(other)) == len(lora_parameters(model))
    with disable_adapters(other):
        assert torch.equal(other(X), net()(X))
    save_adapter(other, tmp_path / "again", "mine")
    assert load_file(tmp_path / "again" / WEIGHTS_FILE).keys() == load_file(tmp_path / WEIGHTS_FILE).keys()
    assert (tmp_path / "again" / CONFIG_FILE).read_bytes() == (tmp_path / CONFIG_FILE).read_bytes()


@pytest.mark.parametrize("way", WAYS)
def test_peft_reads_ours(way, tmp_path):
    model = shaken(apply_lora(net(), rank=2, **WAYS[way]))
    save_adapter(model, tmp_path)
    peft = PeftModel.from_pretrained(net(), str(tmp_path)).eval()
    torch.testing.assert_close(peft(X), model(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_we_read_what_peft_trained(way, tmp_path):
    fields = {"target_modules": ["fc1", "fc2"]} | WAYS[way]
    peft = get_peft_model(net(), LoraConfig(r=2, lora_alpha=3, **fields)).eval()
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    peft.save_pretrained(str(tmp_path))
    model = load_adapter(net(), tmp_path)
    torch.testing.assert_close(model(X), peft(X), rtol=1e-5, atol=1e-5)
    with disable_adapters(model):
        assert torch.equal(model(X), net()(X))


def test_two_heads_of_two_folders_take_turns(tmp_path):
    outputs = {}
    for seed, name in enumerate(("cats", "dogs")):
        torch.manual_seed(seed)
        model = apply_lora(net(), rank=2, adapter=name, **WAYS["head"])
        with torch.no_grad():
            for parameter in lora_parameters(model):
                parameter.normal_()
        save_adapter(model, tmp_path / name, name)
        outputs[name] = model(X)
    model = load_adapter(net(), tmp_path / "cats", "cats")
    load_adapter(model, tmp_path / "dogs", "dogs")
    for name in ("cats", "dogs", "cats"):
        set_adapter(model, name)
        assert torch.equal(model(X), outputs[name])
    set_adapter(model, None)
    assert torch.equal(model(X), net()(X))


def test_a_lora_over_a_layer_that_another_adapter_trains_whole_is_refused(tmp_path):
    save_adapter(apply_lora(net(), rank=2, target_modules=["head.0"]), tmp_path)
    model = apply_lora(net(), rank=2, adapter="other", **WAYS["head"])
    with pytest.raises(ValueError, match=r"needs a linear layer 'head.0', and the model has none"):
        load_adapter(model, tmp_path)
    assert model.fc1.active_adapter == "other"


def test_values_that_the_models_dtype_cannot_hold_are_refused(tmp_path):
    model = apply_lora(net(), rank=2, **WAYS["head"])
    with torch.no_grad():
        model.head[0].adapters["default"].weight[0, 0] = 1e6
    save_adapter(model, tmp_path)
    other = net().half()
    with pytest.raises(ValueError, match=r"'base_model.model.head.0.weight' must be finite"):
        load_adapter(other, tmp_path)
    assert all(p.requires_grad for p in other.parameters())


# ---------------------------------------------------------------- names


class Headed(nn.Module):
    """As Transformers builds them: a bare model under ``base_model_prefix``, and a head."""

    base_model_prefix = "model"

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.model, self.score = Bare(), nn.Linear(12, 3)

    def forward(self, x):
        return self.score(self.model(x))


class Bare(nn.Module):
    base_model_prefix = "model"

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_an_adapter_of_a_bare_transformers_model_loads_into_one_with_a_head_and_back(tmp_path):
    headed = Headed()
    bare = headed.model
    shaken(apply_lora(headed, rank=2, target_modules=["layers.0", "layers.1"], rank_pattern={"layers.1": 3}))
    expected = bare(X)
    save_adapter(bare, tmp_path / "bare")
    save_adapter(headed, tmp_path / "headed")
    assert torch.equal(load_adapter(Headed(), tmp_path / "bare").model(X), expected)
    plain = Headed().model
    assert torch.equal(load_adapter(plain, tmp_path / "headed")(X), expected)


def test_compiled_and_parallel_models_save_and_load_by_the_models_own_names(tmp_path):
    model = shaken(apply_lora(net(), rank=2))
    save_adapter(torch.compile(nn.DataParallel(model), backend="eager"), tmp_path)
    other = net()
    wrapped = torch.compile(other, backend="eager")
    assert load_adapter(wrapped, tmp_path) is wrapped
    assert torch.equal(other(X), model(X))


def test_a_saved_module_that_ends_anothers_name_is_said(tmp_path):
    model = nn.ModuleDict({"head": nn.Linear(12, 4), "ahead": nn.Linear(12, 4), "fc": nn.Linear(12, 4)})
    apply_lora(model, rank=2, target_modules=["fc"], modules_to_save=["head"])
    with pytest.warns(UserWarning, match="modules_to_save: PEFT will take 'ahead' too, as it ends in 'head'"):
        save_adapter(model, tmp_path)
    torch.manual_seed(0)
    plain = nn.ModuleDict({"head": nn.Linear(12, 4), "ahead": nn.Linear(12, 4), "fc": nn.Linear(12, 4)})
    load_adapter(plain, tmp_path)
    assert type(plain["ahead"]) is nn.Linear
    assert torch.equal(plain["head"].adapters["default"].weight, model["head"].adapters["default"].weight)


def test_strict_refuses_and_not_strict_reports(tmp_path):
    model = shaken(apply_lora(net(), rank=2, bias="lora_only", modules_to_save=["head"]))
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    del tensors["base_model.model.fc1.base_layer.bias"], tensors["base_model.model.head.0.bias"]
    tensors["base_model.model.fc9.lora_A.weight"] = torch.ones(2, 12)
    tensors["base_model.model.odd"] = torch.ones(2)
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    other = net()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: '"):
        load_adapter(other, tmp_path)
    assert all(p.requires_grad for p in other.parameters())
    with pytest.warns(UserWarning, match="ignored: .*; missing: ") as caught:
        load_adapter(other, tmp_path, strict=False)
    (message,) = [str(w.message) for w in caught]
    for name in ("fc9.lora_A.weight", "base_model.model.odd", "fc1.base_layer.bias", "head.0.bias"):
        assert name in message
    assert torch.equal(other.fc1.adapters["default"].bias, other.fc1.bias)
    assert torch.equal(other.head[0].adapters["default"].weight, model.head[0].adapters["default"].weight)


# ---------------------------------------------------------------- hot swap


def swap_pair(tmp_path, **second):
    """A compiled model with the first of two adapters, and the folder of the second."""
    save_adapter(shaken(apply_lora(net(), **({"rank": 2, "alpha": 3} | second))), tmp_path)
    model = shaken(apply_lora(net(), rank=4, alpha=1))
    return model, load_adapter(net(), tmp_path)


def test_hotswap_recompiles_nothing_and_keeps_every_parameter(tmp_path):
    torch._dynamo.reset()
    model, other = swap_pair(tmp_path / "new")
    save_adapter(model, tmp_path / "old")
    counter = CompileCounterWithBackend("eager")
    compiled, before = torch.compile(model, fullgraph=True, backend=counter), [id(p) for p in lora_parameters(model)]
    with torch.no_grad():
        first = compiled(X)
        for _ in range(3):
            assert hotswap_adapter(compiled, tmp_path / "new") is compiled
            torch.testing.assert_close(compiled(X), other(X), rtol=1e-4, atol=1e-4)
            hotswap_adapter(model, tmp_path / "old")
            torch.testing.assert_close(compiled(X), first)
    assert counter.frame_count == 1
    assert [id(p) for p in lora_parameters(model)] == before
    torch._dynamo.reset()


def test_hotswap_empties_layers_that_the_folder_lacks(tmp_path):
    model, other = swap_pair(tmp_path, target_modules=["fc1"])
    hotswap_adapter(model, tmp_path)
    torch.testing.assert_close(model(X), other(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_hotswap_takes_heads_and_biases_along(way, tmp_path):
    model = shaken(apply_lora(net(), rank=2, **WAYS[way]))
    save_adapter(model, tmp_path)
    other = apply_lora(net(), rank=2, **WAYS[way])
    hotswap_adapter(other, tmp_path)
    assert torch.equal(other(X), model(X))


def test_a_hotswap_that_cannot_be_made_changes_nothing(tmp_path):
    model, _ = swap_pair(tmp_path / "large", rank=5)
    save_adapter(apply_lora(net(), rank=2, bias="lora_only"), tmp_path / "bias")
    save_adapter(apply_lora(net(), rank=2, **WAYS["norm"]), tmp_path / "norm")
    few = apply_lora(net(), rank=4, target_modules=["fc1"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="rank of 'fc1' must be at most the adapter's, 4, to be swapped, got 5"):
        hotswap_adapter(model, tmp_path / "large")
    with pytest.raises(ValueError, match="must train what adapter 'default' does, got a difference in the bias"):
        hotswap_adapter(model, tmp_path / "bias")
    with pytest.raises(ValueError, match="must have the folder's layers to be swapped, it lacks 'norm'"):
        hotswap_adapter(model, tmp_path / "norm")
    with pytest.raises(ValueError, match="must have the folder's layers to be swapped, it lacks 'fc2'"):
        hotswap_adapter(few, tmp_path / "large")
    merge(model)
    save_adapter(apply_lora(net(), rank=2), tmp_path / "fine")
    with pytest.raises(ValueError, match="adapter 'default' must not be merged to be swapped, and 'fc1' is"):
        hotswap_adapter(model, tmp_path / "fine")
    with pytest.raises(ValueError, match="adapter 'other' is not here"):
        hotswap_adapter(model, tmp_path / "fine", "other")
    unmerge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------- old or new, whatever happens


def constant(value, rank):
    """A model whose adapter is one number, so that a mixture of two is seen; the config differs too."""
    model = apply_lora(net(), rank=rank, alpha=value, **WAYS["head"])
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.fill_(value)
    return model


def which(folder):
    """The number that a folder's adapter is, as a plain model loads it."""
    model = load_adapter(net(), folder)
    (value,) = {p.unique().item() for p in lora_parameters(model)}
    adapter = model.fc1.adapter("default")
    assert (adapter.alpha, adapter.rank) == (value, 1 + value)
    return value


def in_child(action):
    """Run in a process of its own, which ends with it; returns its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    return pid


def die_at(call, step):
    """``call`` with the process killed before its step-th use of the system, or after, for steps counted in halves."""
    count = 0

    def dying(real):
        def run(*arguments, **options):
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments, **options)
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return run

    for name in ("replace", "fsync", "chmod"):
        setattr(os, name, dying(getattr(os, name)))
    call()


def test_killed_at_any_step_the_old_adapter_is_there_or_the_new_one(tmp_path):
    seen, finished, step = [], False, 0
    one, two = constant(1, 2), constant(2, 3)
    while not finished:
        step += 1
        folder = tmp_path / str(step)
        save_adapter(one, folder)
        _, status = os.waitpid(
            in_child(lambda folder=folder, step=step: die_at(lambda: save_adapter(two, folder), step)), 0
        )
        finished = os.WIFEXITED(status)
        seen.append(which(folder))
        # and the next saving makes good what was left half done
        save_adapter(one, folder)
        assert which(folder) == 1
        PeftModel.from_pretrained(net(), str(folder))
    assert step > 10
    assert seen == sorted(seen)
    assert set(seen) == {1, 2}


def test_killed_at_random_the_adapter_is_one_of_those_saved(tmp_path):
    one, two = constant(1, 2), constant(2, 3)
    save_adapter(one, tmp_path)

    def save_on():
        while True:
            save_adapter(two, tmp_path)
            save_adapter(one, tmp_path)

    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(25):
        pid = in_child(save_on)
        time.sleep(0.005 + 0.03 * torch.rand((), generator=generator).item())
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        seen.append(which(tmp_path))
    assert set(seen) <= {1, 2}


def test_an_old_leftover_of_a_killed_writer_is_removed_and_a_young_one_left(tmp_path):
    old, young = tmp_path / f".{WEIGHTS_FILE}.old.tmp", tmp_path / f".{CONFIG_FILE}.young.tmp"
    old.write_text("x")
    young.write_text("x")
    os.utime(old, (0, 0))
    save_adapter(constant(1, 2), tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([CONFIG_FILE, WEIGHTS_FILE, young.name])


def test_an_interrupt_between_the_two_moves_leaves_the_new_adapter(tmp_path, monkeypatch):
    save_adapter(constant(1, 2), tmp_path)
    real, calls = os.replace, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(constant(2, 3), tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG_FILE, WEIGHTS_FILE]
    assert which(tmp_path) == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["mkdir", "fsync", "replace", "open"])
def test_a_disk_that_refuses_leaves_what_was_there(code, call, tmp_path, monkeypatch):
    folder, new = tmp_path / "there", tmp_path / "not" / "there"
    save_adapter(constant(1, 2), folder)
    before = files(folder)
    model = constant(2, 3)

    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    for target in [folder, new] if call != "mkdir" else [new]:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse)
            with pytest.raises(OSError, match="the adapter can't be saved") as caught:
                save_adapter(model, target)
        assert caught.value.errno == code
        assert str(target) in str(caught.value)
        assert files(folder) == before
        assert os.listdir(tmp_path) == ["there"]


def test_a_file_that_cannot_grow_leaves_what_was_there(tmp_path):
    """The kernel's own refusal, at a limit that the config fits under and the weights do not."""
    save_adapter(constant(1, 2), tmp_path)
    before = files(tmp_path)

    def save_under_limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
        try:
            save_adapter(constant(2, 3), tmp_path)
        except OSError as error:
            os._exit(7 if error.errno == errno.EFBIG and "can't be saved" in str(error) else 8)

    _, status = os.waitpid(in_child(save_under_limit), 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert files(tmp_path) == before


def test_a_really_read_only_disk_is_one_clear_error():
    folder = next((f for f in ("/sys", "/proc/sys") if os.statvfs(f).f_flag & os.ST_RDONLY), "/proc")
    with pytest.raises(OSError, match="the adapter can't be saved"):
        save_adapter(constant(1, 2), f"{folder}/fused_lora_adapter")


def test_a_config_changed_by_hand_is_followed_and_said(tmp_path):
    save_adapter(constant(1, 2), tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text()) | {"lora_alpha": 7}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="is not the one that adapter_model.safetensors was saved with"):
        model = load_adapter(net(), tmp_path)
    assert model.fc1.adapter("default").alpha == 7


def test_loaded_values_are_no_part_of_the_file(tmp_path):
    model = constant(1, 2)
    save_adapter(model, tmp_path)
    other = load_adapter(net(), tmp_path)
    with open(tmp_path / WEIGHTS_FILE, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        file.write(b"\xff" * size)
    assert torch.equal(other(X), model(X))


def test_sizes_are_read_before_anything_is_allocated(tmp_path):
    """Files of terabytes that take no room, and a rank whose tensors would."""
    save_adapter(constant(1, 2), tmp_path)
    with open(tmp_path / CONFIG_FILE, "r+b") as file:
        file.truncate(1 << 33)
    with pytest.raises(ValueError, match=r"adapter_config.json must have at most 16,777,216 bytes, got 8,589,934,592"):
        load_adapter(net(), tmp_path)
    save_adapter(constant(1, 2), tmp_path)
    rank = 1 << 32
    header = json.dumps(
        {
            f"base_model.model.fc1.lora_{side}.weight": {"dtype": "F32", "shape": shape, "data_offsets": offsets}
            for side, shape, offsets in (("A", [rank, 12], [0, 48 * rank]), ("B", [16, rank], [48 * rank, 112 * rank]))
        }
    ).encode()
    with contextlib.suppress(OSError), open(tmp_path / WEIGHTS_FILE, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 112 * rank)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": rank, "target_modules": ["fc1"]}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"adapter_model.safetensors must (have at most|be a safetensors file)"):
        load_adapter(net(), tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20


def test_a_model_without_values_is_refused(tmp_path):
    save_adapter(constant(1, 2), tmp_path)
    with pytest.raises(ValueError, match=r"fc1.weight must have values before an adapter is loaded, got one on meta"):
        load_adapter(net().to("meta"), tmp_path)


def test_only_one_adapter_of_several_is_written(tmp_path):
    model = shaken(apply_lora(net(), rank=2, adapter="cats", bias="lora_only"))
    add_adapter(model, "dogs", LoRAConfig(rank=3))
    save_adapter(model, tmp_path, "dogs")
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["bias"] == "none"
    assert {t.shape[0] for k, t in load_file(tmp_path / WEIGHTS_FILE).items() if "lora_A" in k} == {3}
