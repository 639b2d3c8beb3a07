"""Writing an adapter folder: PEFT's two files, as one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from .. import validation
from ..adapter import PEFT_NAMES, LoRAAdapter
from ..conv1d import FusedLoRAConv1D
from ..layer import FusedLoRALinear
from ..models.config import ALL_LINEAR, ends_of
from ..models.modules_to_save import Part, Trained
from ..models.selection import linear_layers, places
from ..quantized import base_of
from ..switching import adapted_modules, base_modules
from .names import PREFIX, unwrapped_name

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# in the weights' metadata: of the very config file that belongs to them
DIGEST = "fused_lora.config_sha256"
# there too, where it is quantized: how the base was kept, for which PEFT's config has no place
BASE = "fused_lora.base"

# of a leftover of a writer that was killed
_STALE_SECONDS = 3600


def writes_here(model: nn.Module) -> bool:
    """Of the ranks that hold DTensors, the first writes; who holds plain Tensors decides by calling or not."""
    dtensors: list[Any] = [parameter for parameter in model.parameters() if validation.is_dtensor(parameter)]
    return not any(any(parameter.device_mesh.get_coordinate()) for parameter in dtensors)


def contents(model: nn.Module, adapter: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors, on the CPU, of one adapter.

    Raises:
        ValueError: its layers differ in what the format holds once.
    """
    modules: dict[str, LoRAAdapter] = {}
    parts: dict[str, Part] = {}
    tensors: dict[str, Tensor] = {}
    roots: dict[Tensor, set[str | None]] = {}
    for path, module in adapted_modules(model):
        if adapter not in module.adapters:
            continue
        path = unwrapped_name(path)
        stem = PREFIX + (path + "." if path else "")
        if isinstance(module, FusedLoRALinear):
            lora = modules[path] = module.adapter(adapter)
            tensors[stem + "lora_A.weight"] = lora.lora_A
            tensors[stem + "lora_B.weight"] = lora.lora_B
            if lora.bias is not None:
                tensors[stem + "base_layer.bias"] = lora.bias
        elif isinstance(module, Trained):
            part = parts[path] = module.part(adapter)
            for key, tensor in module.trained(adapter).items():
                tensors[stem + key] = tensor
                roots.setdefault(tensor, set()).add(part.root)
    for placed, listed in places(model).items():
        if isinstance(placed, FusedLoRALinear) and adapter in placed.adapters:
            message = f"{' and '.join(listed)} are one module: PEFT will adapt {listed[0]} alone"
            warnings.warn(message, stacklevel=4)
    validation.check_has_values(tensors)
    written = {key: validation.whole(tensor.detach()).cpu().contiguous() for key, tensor in tensors.items()}
    # a tensor under two names is written twice, as readers expect it
    seen: set[int] = set()
    for key, tensor in written.items():
        if tensor.data_ptr() in seen:
            written[key] = tensor.clone()
        seen.add(tensor.data_ptr())
    config = _config_of(model, modules, parts)
    if any(len(owners) > 1 for owners in roots.values()):
        # one tensor below several names of modules_to_save: the others would make a copy of it for each
        config["ensure_weight_tying"] = True
    return config, written


def _config_of(model: nn.Module, modules: dict[str, LoRAAdapter], parts: dict[str, Part]) -> dict[str, Any]:
    if not modules:
        raise ValueError(f"an adapter on disk must have A and B in one layer at least, got only {', '.join(parts)}")
    # rank and alpha may differ, for which the format has patterns; init no longer matters
    values = {name: {getattr(module, name) for module in modules.values()} for name in PEFT_NAMES}
    _, _, inits = values.pop("rank"), values.pop("alpha"), values.pop("init")
    for name, found in values.items():
        if len(found) > 1:
            raise ValueError(f"an adapter on disk has one {name} for all its layers, got {sorted(found)}")
    # the commonest values are the config's own, so that the patterns stay short
    rank = Counter(module.rank for module in modules.values()).most_common(1)[0][0]
    alpha = Counter(module.alpha for module in modules.values()).most_common(1)[0][0]
    if any(part.root is None for part in parts.values()):
        bias = "all"
    else:
        bias = "lora_only" if any(module.trains_bias for module in modules.values()) else "none"
    saved = _modules_to_save(model, parts)
    named = _names(model, modules)
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _integral(alpha),
        **{PEFT_NAMES[name]: found.pop() for name, found in values.items()},
        **_targets(model, named),
        "rank_pattern": {_exact(named[path]): m.rank for path, m in modules.items() if m.rank != rank},
        "alpha_pattern": {_exact(named[path]): _integral(m.alpha) for path, m in modules.items() if m.alpha != alpha},
        "bias": bias,
        "fan_in_fan_out": any(isinstance(m, FusedLoRAConv1D) for path, m in adapted_modules(model) if path in modules),
        # readers take any other value for one that says how the base was changed
        "init_lora_weights": "gaussian" if inits == {"gaussian"} else True,
        "inference_mode": True,
        "modules_to_save": saved,
        "task_type": _task(model, saved or []),
        "base_model_name_or_path": _name(model),
    }


# how Transformers names a model for a task, PEFT's name for it, the heads that PEFT then wants to find in the folder
_TASKS = (
    ("ForCausalLM", "CAUSAL_LM", ()),
    ("LMHeadModel", "CAUSAL_LM", ()),
    ("ForSequenceClassification", "SEQ_CLS", ("classifier", "score")),
    ("ForTokenClassification", "TOKEN_CLS", ("classifier", "score")),
    ("ForQuestionAnswering", "QUESTION_ANS", ("qa_outputs",)),
)


def _task(model: nn.Module, saved: list[str]) -> str | None:
    """PEFT's name for the task of a Transformers model; None where PEFT could not load the folder for it."""
    if not isinstance(getattr(model, "base_model_prefix", None), str):
        return None
    for end, task, heads in _TASKS:
        if type(model).__name__.endswith(end) and (not heads or not set(heads).isdisjoint(saved)):
            return task
    return None


def _name(model: nn.Module) -> str | None:
    """Where a Transformers model came from."""
    name = getattr(model, "name_or_path", None)
    return name if isinstance(name, str) and name else None


def _integral(value: float) -> float | int:
    """Alpha as others write it: 16, not 16.0."""
    return int(value) if value == int(value) else value


def _exact(path: str) -> str:
    """A pattern key for this path; readers try it as the end of a path, so it is anchored."""
    return "^" + re.escape(path)


# For these model types PEFT takes every layer of such a name in target_modules for the experts, which hold their
# weights in one Parameter, whatever the layer's path: it would lose the adapters of dense layers and shared experts
_EXPERTS_TYPES = {
    "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum",
    "minimax", "minimax_m2", "mixtral", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text",
    "qwen3_omni_moe_thinker", "sarvam_mla", "solar_open",
}  # fmt: skip
_EXPERTS_NAMES = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def _names(model: nn.Module, modules: dict[str, LoRAAdapter]) -> dict[str, str]:
    """path of a layer -> PEFT's name for what is adapted: the path, or of its weight where PEFT takes a path amiss."""
    if getattr(getattr(model, "config", None), "model_type", None) not in _EXPERTS_TYPES:
        return {path: path for path in modules}
    amiss = [path for path in modules if path.rpartition(".")[2] in _EXPERTS_NAMES]
    layers = {unwrapped_name(path): layer for path, layer in linear_layers(model).items()}
    # PEFT can't have dropout before, or unpack, a weight that it names
    lost = [path for path in amiss if modules[path].dropout or type(layers[path]) is not FusedLoRALinear]
    if lost:
        why = "PEFT will take them for experts in this kind of model, and lose their adapters"
        warnings.warn(f"{', '.join(lost)}: {why}; fused_lora.load_adapter reads them rightly", stacklevel=5)
    return {path: f"{path}.weight" if path in amiss and path not in lost else path for path in modules}


def _targets(model: nn.Module, named: dict[str, str]) -> dict[str, Any]:
    """The keys that name the layers, exactly these: a path is also the end of other layers' paths, which are excluded.

    A model that is itself the layer has no path, and no other.
    """
    if list(named) == [""]:
        return {"target_modules": ALL_LINEAR}
    paths = {path for path, name in named.items() if path == name}
    modules = {unwrapped_name(path) for path, _ in base_modules(model)}
    others = [path for path in sorted(modules - paths) if not paths.isdisjoint(ends_of(path))]
    return {
        "target_modules": sorted(paths),
        "target_parameters": sorted(named[path] for path in named if path not in paths) or None,
        "exclude_modules": "|".join(map(re.escape, others)) or None,
    }


def _modules_to_save(model: nn.Module, parts: dict[str, Part]) -> list[str] | None:
    roots = sorted({unwrapped_name(part.root) for part in parts.values() if part.root is not None})
    for path, _ in base_modules(model):
        taken = [root for root in roots if path.endswith(root) and path != root and not path.startswith(root + ".")]
        if taken:
            warnings.warn(f"modules_to_save: PEFT will take {path!r} too, as it ends in {taken[0]!r}", stacklevel=5)
    return roots or None


def base_under(model: nn.Module, adapter: str) -> str:
    layers = (module for _, module in adapted_modules(model) if isinstance(module, FusedLoRALinear))
    return base_of(layer for layer in layers if adapter in layer.adapters)


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], base: str) -> None:
    """Write both files beside their places, then move them there: the weights, which say what their config is, first.

    From that move on the folder holds the new adapter: a reader finds its config at its place, or still beside it.

    Raises:
        OSError: naming the folder; it holds what it held.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder must be a directory, got the file {str(folder)!r}")
    text = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    metadata = {"format": "pt", DIGEST: digest(text)} | ({BASE: base} if base else {})
    weights = save(tensors, metadata=metadata)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    beside: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_beside(folder / CONFIG_FILE, text, beside)
        _write_beside(folder / WEIGHTS_FILE, weights, beside)
        os.replace(beside[1], folder / WEIGHTS_FILE)
        os.replace(beside[0], folder / CONFIG_FILE)
        _flush(folder)
    except BaseException as error:
        if len(beside) == 2 and not beside[1].exists():
            # the new adapter is in place whatever went wrong after: its config must not be lost
            with contextlib.suppress(OSError):
                os.replace(beside[0], folder / CONFIG_FILE)
        else:
            for path in beside:
                path.unlink(missing_ok=True)
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir()
        if isinstance(error, OSError):
            raise OSError(error.errno, f"the adapter can't be saved: {error.strerror}", str(folder)) from error
        raise
    for path in beside_of(folder, CONFIG_FILE) + beside_of(folder, WEIGHTS_FILE):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()


def digest(config: bytes) -> str:
    return hashlib.sha256(config).hexdigest()


def beside_of(folder: Path, name: str) -> list[Path]:
    """Files written for this place and not, or not yet, moved there."""
    return sorted(folder.glob(f".{name}.*.tmp"))


def _write_beside(path: Path, data: bytes, beside: list[Path]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    beside.append(Path(temporary))
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(temporary, 0o644)


def _flush(folder: Path) -> None:
    """The moves too, where a directory can be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
