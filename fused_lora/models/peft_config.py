"""PEFT's ``LoraConfig``, as its fields stand in an object or in ``adapter_config.json``, in the words of ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from ..adapter import PEFT_NAMES
from .config import LoRAConfig


class PeftLoraConfig(Protocol):
    """What is used of a ``peft.LoraConfig``."""

    r: int
    lora_alpha: int

    def to_dict(self) -> dict[str, Any]: ...


# what a folder's config is read for; docs/adapters.md has a table of READ, IGNORED and REFUSED
READ = {
    *PEFT_NAMES.values(), "peft_type", "target_modules", "exclude_modules", "target_parameters", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save", "ensure_weight_tying", "bias",
}  # fmt: skip
# about the base and the task; PEFT finds out by itself whether a layer's weight is transposed
_OF_BASE = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "peft_version", "revision",
    "runtime_config", "task_type",
}  # fmt: skip
# only for layers that are not adapted here, Megatron's and GPTQ's; PEFT sets the first two always
_OF_OTHER_LAYERS = {"megatron_core", "qalora_group_size", "megatron_config", "use_qalora"}
# what changes nothing of what is computed from A and B that are there already
IGNORED = {
    *_OF_BASE, *_OF_OTHER_LAYERS,
    # how A and B were drawn; loftq_config matters where init_lora_weights is "loftq"
    "corda_config", "eva_config", "lora_ga_config", "loftq_config",
    # how they are trained, with tensors of their own in the file
    "monteclora_config", "velora_config",
}  # fmt: skip
# what makes PEFT compute something else than W x + scale B A x
REFUSED = {
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
    "trainable_token_indices", "use_bdlora", "use_dora",
}  # fmt: skip
# what of it a fresh adapter is made by
_OF_FRESH = (READ | _OF_BASE | _OF_OTHER_LAYERS) - {"target_parameters", "layers_to_transform", "layers_pattern"}
_EMPTY: tuple[Any, ...] = (None, False, {}, [], (), set(), "")


def is_peft_config(value: Any) -> bool:
    """Told by name, as PEFT may not be installed."""
    return any(kind.__name__ == "PeftConfigMixin" and kind.__module__ == "peft.config" for kind in type(value).__mro__)


def fields_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a :class:`LoRAConfig`; those that ``raw`` leaves out have PEFT's defaults, or the empty ones."""
    found = {"lora_alpha": 8, **{key: value for key, value in raw.items() if value is not None}}
    found["init_lora_weights"] = "gaussian" if raw.get("init_lora_weights") == "gaussian" else "kaiming"
    fields = {name: found[theirs] for name, theirs in PEFT_NAMES.items() if theirs in found}
    selections = ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "bias")
    tying = {"ensure_weight_tying": True} if raw.get("ensure_weight_tying") else {}
    return fields | tying | {name: raw[name] for name in selections if raw.get(name)}


def from_peft(config: PeftLoraConfig) -> LoRAConfig:
    """The config of a fresh adapter, as ``get_peft_model`` would make it.

    Raises:
        ValueError: it asks for more than a plain LoRA, or leaves to PEFT what only PEFT knows; naming the field.
    """
    raw = config.to_dict()
    kind = getattr(raw.get("peft_type"), "value", raw.get("peft_type"))
    if kind != "LORA":
        raise ValueError(f"config must be a LoRAConfig or PEFT's LoraConfig, got peft_type {kind!r}")
    more = {name: value for name, value in raw.items() if name not in _OF_FRESH and value not in _EMPTY}
    if raw.get("init_lora_weights", True) not in (True, "gaussian"):
        more["init_lora_weights"] = raw["init_lora_weights"]
    if more:
        told = ", ".join(f"{name}={value!r}" for name, value in more.items())
        raise ValueError(f"PEFT's LoraConfig must be of a plain LoRA, got {told}, which is not supported yet")
    if not raw.get("target_modules"):
        raise ValueError(
            "target_modules of PEFT's LoraConfig must be given: PEFT chooses its default by the kind of model; "
            "'all-linear' is the default of LoRAConfig"
        )
    return LoRAConfig(**fields_of(raw))


def config_of(config: LoRAConfig | PeftLoraConfig | None, fields: Mapping[str, Any]) -> LoRAConfig:
    """The config that a caller gave, as ours or as PEFT's, with the fields that came as keywords beside it."""
    if config is None:
        return LoRAConfig(**fields)
    if is_peft_config(config):
        config = from_peft(config)  # type: ignore[arg-type]
    if not isinstance(config, LoRAConfig):
        way_out = (
            "pass its items as keywords: **config" if isinstance(config, Mapping) else "fields are keywords: rank=8"
        )
        raise TypeError(f"config must be a LoRAConfig, or PEFT's LoraConfig, got {config!r}; {way_out}")
    return dataclasses.replace(config, **fields)
