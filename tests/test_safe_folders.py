"""A folder holds the old adapter or the new one, whatever happens; and what it claims is checked before it is used."""

import contextlib
import errno
import json
import os
import resource
import signal
import time

import pytest
import torch
from peft import PeftModel
from saved_models import WAYS, X, net

from fused_lora import apply_lora, load_adapter, lora_parameters, save_adapter
from fused_lora.checkpoint import CONFIG_FILE, WEIGHTS_FILE


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
