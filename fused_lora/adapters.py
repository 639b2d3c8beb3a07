"""Adapters on disk, in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors`` in one folder.

A folder comes from a stranger: no pickle, and everything is checked before the model is touched.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from . import validation
from .config import ALL_LINEAR, LoRAConfig
from .layer import FusedLoRALinear, LoRAAdapter, whole
from .model import adapter_names, linear_layers, lora_layers, set_adapter

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

# the name of an adapter may stand between, as some writers leave it there
_KEY = re.compile(r"base_model\.model\.(?:(?P<path>.+)\.)?lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], adapter: str = "default") -> None:
    """Write adapter ``adapter`` of ``model``, A and B alone, where PEFT, vLLM and :func:`load_adapter` read it.

    Each file is written beside its place and then moved there, so a file is the old one or the new one, never half.
    Where the adapter is sharded (DTensor), every rank must call: all gather, and the first of the mesh writes.

    Raises:
        ValueError: no layer has that adapter, or its layers differ in what the format holds once.
        NotADirectoryError: folder is a file.
    """
    validation.check_known_adapter(adapter, adapter_names(model))
    layers = {path: layer for path, layer in lora_layers(model) if adapter in layer.adapters}
    modules = {path: layer.adapter(adapter) for path, layer in layers.items()}
    config = _config_of(model, modules)
    tensors: dict[str, Tensor] = {}
    for path, module in modules.items():
        stem = PREFIX + (path + "." if path else "")
        tensors[stem + "lora_A.weight"] = whole(module.lora_A.detach()).cpu().contiguous()
        tensors[stem + "lora_B.weight"] = whole(module.lora_B.detach()).cpu().contiguous()
    if not all(_writes(parameter) for module in modules.values() for parameter in module.parameters()):
        return
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"folder must be a directory, got the file {str(target)!r}")
    target.mkdir(parents=True, exist_ok=True)
    _write(target / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    _write(target / CONFIG_FILE, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], adapter: str = "default", strict: bool = True
) -> nn.Module:
    """Read an adapter folder, ours or PEFT's, into ``model`` as ``adapter`` and make it active; returns ``model``.

    A plain model is adapted on the way: its base is frozen and the layers in the folder get the adapter. An adapter of
    that name that is here already is replaced. Values keep their precision: tensors of another dtype than the weight's
    are held in float32.

    Args:
        strict: also refuse a layer that the config names and the file lacks. Without it, such layers are left alone.

    Raises:
        FileNotFoundError, ValueError: the folder is not what it claims, or does not fit the model; nothing is changed.
    """
    validation.check_adapter_name(adapter)
    path = Path(folder)
    config = _read_config(path / CONFIG_FILE)
    linears = linear_layers(model)
    for name, linear in linears.items():
        validation.check_whole(linear.weight, f"{name}.weight")
    pairs = _read_pairs(path / WEIGHTS_FILE, config, linears)
    if strict:
        _check_complete(config, pairs, linears)
    built = {name: _build(config, name, pair, linears[name]) for name, pair in pairs.items()}

    plain = not lora_layers(model)
    if plain:
        model.requires_grad_(False)
    for name, layer in lora_layers(model):
        if adapter in layer.adapters and name not in built:
            layer.delete_adapter(adapter)
    for name, module in built.items():
        linear = linears[name]
        layer = linear if isinstance(linear, FusedLoRALinear) else FusedLoRALinear.adopt(linear)
        if adapter in layer.adapters:
            layer.delete_adapter(adapter)
        layer.adapters[adapter] = module.train(layer.training)
    set_adapter(model, adapter)
    return model


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


def _config_of(model: nn.Module, modules: dict[str, LoRAAdapter]) -> dict[str, Any]:
    dropouts = {module.dropout for module in modules.values()}
    rslora = {module.use_rslora for module in modules.values()}
    if len(dropouts) > 1 or len(rslora) > 1:
        raise ValueError(
            f"an adapter on disk has one dropout and one use_rslora, got {sorted(dropouts)} and {sorted(rslora)}"
        )
    # the commonest values are the config's own, so that the patterns stay short
    rank = Counter(module.rank for module in modules.values()).most_common(1)[0][0]
    alpha = Counter(module.alpha for module in modules.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _integral(alpha),
        "lora_dropout": dropouts.pop(),
        "use_rslora": rslora.pop(),
        "target_modules": _target_modules(model, list(modules)),
        "rank_pattern": {_exact(path): m.rank for path, m in modules.items() if m.rank != rank},
        "alpha_pattern": {_exact(path): _integral(m.alpha) for path, m in modules.items() if m.alpha != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        # on disk this says only that A and B are the whole story: other values make readers change the base
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "task_type": None,
        "base_model_name_or_path": None,
    }


def _writes(parameter: Any) -> bool:
    """Of the ranks that hold a DTensor, the first writes; who holds a plain Tensor decides by calling or not."""
    return not validation.is_dtensor(parameter) or not any(parameter.device_mesh.get_coordinate())


def _integral(value: float) -> float | int:
    """Alpha as others write it: 16, not 16.0."""
    return int(value) if value == int(value) else value


def _exact(path: str) -> str:
    """A pattern key for this path; readers try it as the end of a path, so it is anchored."""
    return "^" + re.escape(path)


def _target_modules(model: nn.Module, paths: list[str]) -> list[str] | str:
    """The paths; as a regular expression where a path is also the end of another layer's, which would be taken too."""
    chosen = {path for path in linear_layers(model) if any(path == p or path.endswith("." + p) for p in paths)}
    return sorted(paths) if chosen == set(paths) else "|".join(re.escape(path) for path in sorted(paths))


def _write(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        # an interrupt may come just after the move
        Path(temporary).unlink(missing_ok=True)
        raise


# --------------------------------------------------------------------------------------------------
# Reading: every check, and no effect
# --------------------------------------------------------------------------------------------------

# what PEFT may write and a plain LoRA ignores; any other field must be empty
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "init_lora_weights", "lora_alpha",
    "lora_dropout", "peft_type", "peft_version", "r", "rank_pattern", "alpha_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora", "bias", "layers_to_transform", "layers_pattern", "megatron_core",
    "qalora_group_size",
}  # fmt: skip
# the ones whose base weights are those on the hub
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class _FolderConfig:
    lora: LoRAConfig
    names_layers: bool
    file: Path


def _read_config(file: Path) -> _FolderConfig:
    if not file.is_file():
        raise FileNotFoundError(f"folder must hold {CONFIG_FILE}, got no file {str(file)!r}")
    try:
        raw = json.loads(file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} must be JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        kind = raw.get("peft_type") if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"{file}: peft_type must be 'LORA', got {kind!r}")
    foreign = {
        name: value for name, value in raw.items() if name not in _NEUTRAL and value not in (None, False, {}, [], "")
    }
    if foreign:
        raise ValueError(
            f"{file}: only plain LoRA can be loaded, got {', '.join(f'{k}={v!r}' for k, v in foreign.items())}"
        )
    if raw.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias must be 'none', got {raw['bias']!r}")
    if raw.get("init_lora_weights") not in _PLAIN_INITS:
        raise ValueError(
            f"{file}: init_lora_weights={raw['init_lora_weights']!r} changes the base weights, which can't be done here"
        )
    try:
        config = LoRAConfig(
            rank=raw.get("r", 8),
            alpha=raw.get("lora_alpha", 8),
            dropout=raw.get("lora_dropout") or 0.0,
            use_rslora=bool(raw.get("use_rslora", False)),
            target_modules=raw.get("target_modules") or ALL_LINEAR,
            exclude_modules=raw.get("exclude_modules") or None,
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: {error}") from None
    return _FolderConfig(config, bool(raw.get("target_modules")) and not raw.get("layers_to_transform"), file)


def _read_pairs(file: Path, config: _FolderConfig, linears: dict[str, nn.Linear]) -> dict[str, dict[str, Tensor]]:
    """path -> {"A": (R, K), "B": (N, R)} on the CPU, every name, shape, rank, dtype and value checked."""
    if not file.is_file():
        raise FileNotFoundError(f"folder must hold {WEIGHTS_FILE}, got no file {str(file)!r}")
    pairs: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for key in tensors.keys():  # noqa: SIM118  # not a dict
                match = _KEY.fullmatch(key)
                if match is None:
                    raise ValueError(
                        f"{file}: keys must be {PREFIX}<layer>.lora_A.weight or .lora_B.weight, got {key!r}"
                    )
                path, side = match["path"] or "", match["side"]
                if path not in linears:
                    raise ValueError(f"{file}: {key!r} needs a linear layer {path!r}, and the model has none")
                shape = tuple(tensors.get_slice(key).get_shape())
                rank, linear = config.lora.rank_of(path), linears[path]
                wanted = (rank, linear.in_features) if side == "A" else (linear.out_features, rank)
                if shape != wanted:
                    raise ValueError(f"{file}: {key!r} must be {wanted}, got {shape}")
                if side in pairs.setdefault(path, {}):
                    raise ValueError(f"{file}: {key!r} stands there twice")
                tensor = tensors.get_tensor(key)
                if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
                    raise ValueError(f"{file}: {key!r} must be floating point of 16 bits or more, got {tensor.dtype}")
                if not bool(torch.isfinite(tensor).all()):
                    raise ValueError(f"{file}: {key!r} must be finite, got NaN or infinity")
                pairs[path][side] = tensor
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} must be a safetensors file: {error}") from None
    for path, pair in pairs.items():
        if len(pair) != 2:
            raise ValueError(f"{file}: {path!r} must have lora_A and lora_B, got lora_{next(iter(pair))} alone")
    if not pairs:
        raise ValueError(f"{file} must hold at least one adapter, got none")
    return pairs


def _check_complete(config: _FolderConfig, pairs: dict[str, Any], linears: dict[str, nn.Linear]) -> None:
    if not config.names_layers or config.lora.target_modules == ALL_LINEAR:
        return
    missing = [path for path in linears if config.lora.targets(path) and path not in pairs]
    if missing:
        raise ValueError(
            f"{config.file}: target_modules names {', '.join(map(repr, missing[:5]))}, which {WEIGHTS_FILE} lacks; "
            "strict=False leaves such layers alone"
        )


def _build(config: _FolderConfig, path: str, pair: dict[str, Tensor], linear: nn.Linear) -> LoRAAdapter:
    weight = linear.weight
    adapter = LoRAAdapter(
        linear.in_features,
        linear.out_features,
        rank=config.lora.rank_of(path),
        alpha=config.lora.alpha_of(path),
        dropout=config.lora.dropout,
        use_rslora=config.lora.use_rslora,
        init="kaiming",
        device="meta",
        dtype=weight.dtype,
    )
    for side, tensor in pair.items():
        dtype = tensor.dtype if tensor.dtype == weight.dtype else torch.promote_types(weight.dtype, torch.float32)
        setattr(adapter, f"lora_{side}", nn.Parameter(tensor.to(weight.device, dtype)))
    return adapter
