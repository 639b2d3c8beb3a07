"""Paths that are no adapter folders of PEFT: the error names the format and the way out, and nothing is loaded."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fused_lora import load_adapter
from fused_lora.checkpoint import CONFIG_FILE as CONFIG
from fused_lora.checkpoint import WEIGHTS_FILE as WEIGHTS

A, B = torch.ones(2, 8), torch.ones(6, 2)
PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
PICKLE = "is a pickle, which can run code and is never read"


def net():
    return nn.ModuleDict({"q_proj": nn.Linear(8, 6)})


def tensors(**named):
    return {name: tensor.contiguous() for name, tensor in named.items()}


def pair(a, b, path="q_proj"):
    return {f"{path}.{a}": A, f"{path}.{b}": B}


MLX = {"q_proj.lora_a": A.T.contiguous(), "q_proj.lora_b": B.T.contiguous()}
MLX_CONFIG = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 20.0}}
HUB_CONFIG = {"config": {"architecture": "lora", "r": 2, "alpha": 4}, "name": "a", "version": "adapters.1.3.0"}
KOHYA = pair("lora_down.weight", "lora_up.weight", "lycoris_q_proj") | {"lycoris_q_proj.alpha": torch.tensor(1.0)}
DIFFUSERS = {"format": "pt", "lora_adapter_metadata": json.dumps(PEFT)}

# name -> (files of the folder: tensors, JSON, bytes, or a header beside tensors; what the error says)
FOLDERS = {
    "mlx-lm": ({"adapters.safetensors": MLX, CONFIG: MLX_CONFIG}, "an mlx-lm adapter.*lora_alpha is scale · rank"),
    "mlx-lm, a checkpoint of training": ({"0000100_adapters.safetensors": MLX}, "an mlx-lm adapter"),
    "mlx-lm, of old": ({"adapters.npz": b"PK"}, "an mlx-lm adapter"),
    "mlx-lm under PEFT's names": ({WEIGHTS: MLX, CONFIG: MLX_CONFIG}, "got None; this is an mlx-lm"),
    "mlx-lm with PEFT's config": ({WEIGHTS: MLX, CONFIG: PEFT}, "keys must be .*an mlx-lm adapter"),
    "AdapterHub": (
        {"adapter.safetensors": pair("loras.a.lora_A", "loras.a.lora_B"), CONFIG: HUB_CONFIG},
        "an AdapterHub adapter",
    ),
    "AdapterHub, pickled": ({"pytorch_adapter.bin": b"PK", CONFIG: HUB_CONFIG}, "an AdapterHub adapter"),
    "AdapterHub's config alone": ({WEIGHTS: MLX, CONFIG: HUB_CONFIG}, "got None; this is an AdapterHub adapter"),
    "diffusers": (
        {"pytorch_lora_weights.safetensors": (pair("lora_A.weight", "lora_B.weight"), DIFFUSERS)},
        "a diffusers adapter",
    ),
    "diffusers under another name": (
        {"flux.safetensors": pair("lora_A.weight", "lora_B.weight", "transformer.q_proj")}, "a diffusers adapter",
    ),
    "diffusers, of old": (
        {"my.safetensors": pair("processor.to_q_lora.down.weight", "processor.to_q_lora.up.weight", "unet.a")},
        "a diffusers",
    ),
    "kohya": ({"my_lora.safetensors": KOHYA}, "a kohya or LyCORIS adapter.*each layer has its own alpha"),
    "kohya under diffusers' name": ({"pytorch_lora_weights.safetensors": KOHYA}, "a kohya or LyCORIS adapter"),
    "kohya, by its header": ({"x.safetensors": ({"y": A}, {"ss_network_module": "networks.lora"})}, "a kohya or Ly"),
    "kohya under PEFT's names": ({WEIGHTS: KOHYA, CONFIG: PEFT}, "keys must be .*a kohya or LyCORIS adapter"),
    "LyCORIS, LoHa": ({"a.safetensors": pair("hada_w1_a", "hada_w1_b")}, "a kohya or LyCORIS adapter"),
    "LyCORIS, LoKr": ({"a.safetensors": pair("lokr_w1", "lokr_w2_a")}, "a kohya or LyCORIS adapter"),
    "GGUF": ({"lora.gguf": b"GGUF"}, "a GGUF adapter of llama.cpp"),
    "loralib": ({"lora.safetensors": pair("lora_A", "lora_B")}, "a loralib checkpoint"),
    "a pickle": ({"lora.pt": b"PK"}, f"'lora.pt' {PICKLE}"),
    "torchtune's own": ({"adapter_0.pt": b"PK"}, "a torchtune adapter"),
    "LitGPT": ({"lit_model.pth.lora": b"PK"}, "a LitGPT adapter"),
    "PEFT's pickle": ({"adapter_model.bin": b"PK", CONFIG: PEFT}, "adapter_model.bin, a pickle, which can run code"),
    "a whole model": ({"model.safetensors": {"q_proj.weight": A}, "config.json": {}}, "a whole model"),
    "a whole model in parts": ({"model-00001-of-00002.safetensors": {"q_proj.weight": A}}, "a whole model"),
    "adapters inside": (
        {f"dogs/{CONFIG}": PEFT, f"cats/{CONFIG}": PEFT}, "in its folders 'cats', 'dogs', give one",
    ),
    "nothing known": ({"notes.txt": b"?"}, "adapter_model.safetensors'$"),
    "another method of PEFT's": ({WEIGHTS: MLX, CONFIG: {"peft_type": "IA3"}}, "must be 'LORA', got 'IA3'$"),
}  # fmt: skip


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif path.suffix == ".json":
            path.write_text(json.dumps(content))
        else:
            named, header = content if isinstance(content, tuple) else (content, {"format": "pt"})
            save_file(named, path, metadata=header)
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_the_error_names_the_format_and_nothing_changes(name, tmp_path):
    files, message = FOLDERS[name]
    model = net()
    with pytest.raises((FileNotFoundError, ValueError), match=message) as caught:
        load_adapter(model, write(tmp_path, files))
    assert str(tmp_path) in str(caught.value)
    assert type(model["q_proj"]) is nn.Linear
    assert model["q_proj"].weight.requires_grad


@pytest.mark.parametrize("name", FOLDERS)
def test_so_does_the_error_of_a_single_file(name, tmp_path):
    files, message = FOLDERS[name]
    for path in write(tmp_path, files).rglob("*.*"):
        if path.is_dir():
            continue
        with pytest.raises(NotADirectoryError, match="folder must be a directory, got the file") as caught:
            load_adapter(net(), path)
        if path.name in (CONFIG, WEIGHTS):
            assert f"give the folder that it is in, {str(path.parent)!r}" in str(caught.value)
        elif len(files) == 1 and "a whole model" not in message and "known" not in name:
            assert any(
                word in str(caught.value) for word in ("adapter, not PEFT", "GGUF", "checkpoint, not PEFT", PICKLE)
            )


@pytest.mark.parametrize("id", ["user/lora-alpaca", "Org-1/model.v2_x"])
def test_a_hub_id_is_told_to_be_downloaded(id):
    with pytest.raises(FileNotFoundError, match="folders must be local") as caught:
        load_adapter(net(), id)
    assert f"load_adapter(model, huggingface_hub.snapshot_download({id!r}))" in str(caught.value)


@pytest.mark.parametrize(
    "url", ["https://huggingface.co/user/lora", "http://example.org/a/b/adapter_model.safetensors"]
)
def test_a_url_is_told_to_be_downloaded(url):
    with pytest.raises(FileNotFoundError, match="it is a URL, and folders must be local"):
        load_adapter(net(), url)


@pytest.mark.parametrize("missing", ["nowhere", "./user/lora", "/user/lora", "a/b/c", "user\\lora"])
def test_a_folder_that_is_missing_is_said_to_be(missing):
    with pytest.raises(FileNotFoundError, match="got no folder") as caught:
        load_adapter(net(), missing)
    assert ("hub" in str(caught.value)) == (missing == "./user/lora")


def test_no_pickle_is_opened(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("opened")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("pickle.load", refuse)
    for name in ("adapter_model.bin", "lora.pt", "pytorch_adapter.bin", "pytorch_lora_weights.bin", "a.ckpt"):
        torch.save({"q_proj.lora_A": A}, tmp_path / name)
        with pytest.raises(FileNotFoundError):
            load_adapter(net(), tmp_path)
        with pytest.raises(NotADirectoryError):
            load_adapter(net(), tmp_path / name)
        (tmp_path / name).unlink()
