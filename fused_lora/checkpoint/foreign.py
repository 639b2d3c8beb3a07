"""What a path holds that is no adapter folder: whose adapter it is, and what to do with it. Nothing of it is loaded."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .writing import CONFIG_FILE, WEIGHTS_FILE

# of a folder, of a config in bytes
_MOST_FILES = 1000
_LARGEST_CONFIG = 1 << 24
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".lora")


@dataclass(frozen=True)
class Writer:
    """How to recognise another writer's adapter, by any of these.

    Args:
        name: with its article.
        differs: how its format differs from PEFT's.
        files: a pattern for a whole file name.
        keys: a pattern for the end of a tensor's name.
        config: keys of its JSON, or of its safetensors header.
    """

    name: str
    differs: str
    files: str = ""
    keys: str = ""
    config: frozenset[str] = frozenset()

    def wrote(self, files: Iterable[str], keys: Iterable[str], config: Iterable[str]) -> bool:
        return (
            any(re.fullmatch(self.files, name) for name in files)
            or (bool(self.keys) and any(re.search(rf"(?:^|\.)(?:{self.keys})$", key) for key in keys))
            or not self.config.isdisjoint(config)
        )


WRITERS = (
    Writer(
        "a GGUF adapter of llama.cpp",
        "its tensors have GGUF's names, and the rows of B of q and k are permuted",
        files=r".*\.gguf",
    ),
    Writer(
        "an mlx-lm adapter",
        "lora_A is the transposed lora_a, lora_B the transposed lora_b, and lora_alpha is scale · rank",
        files=r"(?:\d+_)?adapters\.(?:safetensors|npz)",
        keys=r"lora_[ab]",
        config=frozenset({"fine_tune_type", "lora_parameters", "lora_layers"}),
    ),
    Writer(
        "an AdapterHub adapter",
        "its names have .loras.<name> in them and lack .weight, and rank and alpha are r and alpha of its config's "
        '"config"',
        files=r"adapter\.safetensors|pytorch_adapter\.bin|(?:pytorch_model_head\.bin|model_head\.safetensors)",
        keys=r"loras\.[^.]+\.lora_[AB]",
        config=frozenset({"config_id"}),
    ),
    Writer(
        "a kohya or LyCORIS adapter",
        "lora_A is lora_down and lora_B is lora_up, each layer has its own alpha, and the names have _ for .",
        keys=r"lora_(?:down|up)\.weight|lora_mid\.weight|hada_w\d_[ab]|hada_t\d|lokr_[wt]\d(?:_[ab])?|dora_scale|alpha",
        config=frozenset({"ss_network_module", "ss_network_dim", "ss_network_alpha"}),
    ),
    Writer(
        "a diffusers adapter",
        "its names lack base_model.model., and rank and alpha are in its header's lora_adapter_metadata, or alpha is "
        "the rank",
        files=r"pytorch_lora_weights\.(?:safetensors|bin)",
        keys=r"(?:lora|[^.]*_lora|lora_linear_layer)\.(?:down|up)\.weight|"
        r"^(?:unet|transformer|diffusion_model|text_encoder\w*)\..*lora_[AB]\.weight",
        config=frozenset({"lora_adapter_metadata"}),
    ),
    Writer(
        "a LitGPT adapter", "its tensors have LitGPT's names, and q, k and v are one", files=r"lit_model\.pth\.lora"
    ),
    Writer(
        "a torchtune adapter",
        "its checkpointer writes PEFT's folder too, where it is asked for one in the model's own format",
        files=r"adapter(?:_model)?(?:_\d+)?\.pt|recipe_state\.pt",
    ),
    Writer(
        "a loralib checkpoint",
        "its names lack base_model.model. and .weight, and alpha is not in it",
        keys=r"lora_[AB]",
    ),
)
_WHOLE_MODEL = re.compile(
    r"(?:model|pytorch_model|consolidated)(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index\.json)?"
)


def recognise(files: Iterable[str] = (), keys: Iterable[str] = (), config: Iterable[str] = ()) -> str:
    """A sentence that names the format, after a semicolon; empty where it is none that is known."""
    files, keys, config = list(files), list(keys), list(config)
    writer = next((writer for writer in WRITERS if writer.wrote(files, keys, config)), None)
    if writer is None:
        whole = any(_WHOLE_MODEL.fullmatch(name) for name in files)
        return "; this is a whole model, which is loaded without an adapter" if whole else ""
    return (
        f"; this is {writer.name}, not PEFT's format: {writer.differs}. Convert it to {CONFIG_FILE} and {WEIGHTS_FILE} "
        'first, see "Folders of other writers" in docs/adapters.md'
    )


def no_directory(path: Path) -> OSError:
    """The error for a folder that is a file, or is not there."""
    text = str(path)
    if path.exists():
        hint = (
            f"; give the folder that it is in, {str(path.parent)!r}" if path.name in (CONFIG_FILE, WEIGHTS_FILE) else ""
        )
        hint = hint or look_into(path) or _pickle([path.name])
        return NotADirectoryError(f"folder must be a directory, got the file {text!r}{hint}")
    message = f"folder must hold {WEIGHTS_FILE}, got no folder {text!r}"
    if re.match(r"https?:/", text):
        return FileNotFoundError(f"{message}; it is a URL, and folders must be local: download it first")
    if _HUB_ID.fullmatch(text):
        return FileNotFoundError(
            f"{message}; folders must be local, and this looks like a model id of a hub. Download it first: "
            f"load_adapter(model, huggingface_hub.snapshot_download({text!r}))"
        )
    return FileNotFoundError(message)


def no_weights(folder: Path) -> FileNotFoundError:
    """The error for a folder without PEFT's weights."""
    found = [path.name for path in itertools.islice(folder.iterdir(), _MOST_FILES)]
    inner = sorted(name for name in found if (folder / name / CONFIG_FILE).is_file())
    hint = f"; adapters are in its folders {', '.join(map(repr, inner[:5]))}, give one of them" if inner else ""
    hint = hint or look_into(folder) or _pickle(found)
    return FileNotFoundError(f"folder must hold {WEIGHTS_FILE}, got no file {str(folder / WEIGHTS_FILE)!r}{hint}")


def look_into(path: Path) -> str:
    """What :func:`recognise` says of a folder or of one file."""
    places = list(itertools.islice(path.iterdir(), _MOST_FILES)) if path.is_dir() else [path]
    keys: list[str] = []
    config: list[str] = []
    for place in [place for place in sorted(places) if place.suffix == ".safetensors"][:3]:
        names, header = _header(place)
        keys += names
        config += header
    for place in places:
        if place.name == CONFIG_FILE:
            config += _json_keys(place)
    return recognise([place.name for place in places], keys, config)


def config_keys(raw: Any) -> list[str]:
    """What tells a writer of a config: its keys, and AdapterHub's inside "config"."""
    if not isinstance(raw, dict):
        return []
    inner = raw.get("config")
    of_adapterhub = ["config_id"] if isinstance(inner, dict) and "architecture" in inner else []
    return [*raw, *of_adapterhub]


def _pickle(files: Iterable[str]) -> str:
    name = next((name for name in files if name.endswith(_PICKLES)), None)
    return f"; {name!r} is a pickle, which can run code and is never read" if name else ""


def _header(file: Path) -> tuple[list[str], list[str]]:
    """(names of tensors, keys of the metadata) of a safetensors file, empty where it is none."""
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            return list(tensors.keys()), list(tensors.metadata() or {})
    except (SafetensorError, OSError):
        return [], []


def _json_keys(file: Path) -> list[str]:
    try:
        return config_keys(json.loads(file.read_bytes())) if file.stat().st_size <= _LARGEST_CONFIG else []
    except (ValueError, RecursionError, OSError):
        return []
