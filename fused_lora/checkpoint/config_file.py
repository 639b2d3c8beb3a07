"""Reading ``adapter_config.json``: what each of PEFT's keys means for plain LoRA, and which layers it names."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.config import ALL_LINEAR, LoRAConfig, Selector, selector
from ..models.patterns import numbered
from ..models.peft_config import IGNORED, READ, REFUSED, fields_of
from .foreign import config_keys, recognise
from .names import unwrapped_name

# init_lora_weights that leave the base as it was: these, None, True and False
_PLAIN_INITS = ("gaussian", "orthogonal", "eva", "mica", "lora_ga")
# as those of PEFT that change the base begin
_MUTATING_INITS = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class FolderConfig:
    """
    Args:
        unknown: keys that are none of PEFT's 0.21, with what they are.
        training: how A and B were trained, "velora" or "monteclora", where that is not plain LoRA's way.
        numbers: of the layers of a list that are adapted, None for all.
        number_of: the number that a path has in such a list.
        by_parameter: whether ``target_parameters`` names the weight of a linear layer.
    """

    lora: LoRAConfig
    file: Path
    unknown: dict[str, Any]
    training: tuple[str, ...]
    numbers: frozenset[int] | None
    number_of: Callable[[str], int | None]
    by_parameter: Selector

    def names(self, path: str) -> bool:
        """Whether a linear layer at this path is the config's, by PEFT's rules."""
        if self.by_parameter(path):
            return True
        targets = self.lora.target_modules
        if not self.lora.targets(path) or self.saves(path):
            return False
        if self.numbers is None or isinstance(targets, str) or path in targets:
            return True
        return self.number_of(path) in self.numbers

    def saves(self, path: str) -> bool:
        """Whether ``modules_to_save`` names the module at this path, or one around it."""
        named, parts = selector(self.lora.modules_to_save), path.split(".")
        return any(named(".".join(parts[:n])) for n in range(1, len(parts) + 1))

    def pattern_name(self, path: str) -> str:
        """What ``rank_pattern`` and ``alpha_pattern`` are matched with."""
        return f"{path}.weight" if self.by_parameter(path) else path


def read_config(file: Path, data: bytes) -> FolderConfig:
    """
    Raises:
        ValueError: naming the file, the rule and the value.
    """
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        kind = raw.get("peft_type") if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"{file}: peft_type must be 'LORA', got {kind!r}{recognise(config=config_keys(raw))}")
    given = {name: value for name, value in raw.items() if value not in (None, False, {}, [], "")}
    layers = [name.removesuffix(".weight") for name in _names(file, given, "target_parameters")]
    refused = {name: value for name, value in given.items() if name in REFUSED}
    if any(not name.endswith(".weight") for name in given.get("target_parameters", ())):
        refused["target_parameters"] = given["target_parameters"]
    if refused:
        raise ValueError(f"{file}: only plain LoRA can be loaded, got {_listing(refused)}")
    _check_init(file, raw.get("init_lora_weights"))
    targets = _targets(raw.get("target_modules"))
    try:
        fields = fields_of({name: _plain(value) for name, value in raw.items()})
        config = LoRAConfig(**fields | {"target_modules": targets or layers or ALL_LINEAR})
        numbers, lists = (_plain(_listed(raw.get(name))) for name in ("layers_to_transform", "layers_pattern"))
        if not all(type(number) is int for number in numbers) or not all(isinstance(name, str) for name in lists):
            raise TypeError("layers_to_transform must be numbers of layers, layers_pattern patterns for their lists")
        number_of = numbered(lists, config._budget)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from None
    unknown = {name: value for name, value in given.items() if name not in READ | IGNORED | REFUSED}
    training = tuple(name for name in ("velora", "monteclora") if f"{name}_config" in given)
    return FolderConfig(config, file, unknown, training, frozenset(numbers) or None, number_of, selector(layers))


def _check_init(file: Path, init: Any) -> None:
    kind = init.lower() if isinstance(init, str) else init
    if kind is None or isinstance(kind, bool) or kind in _PLAIN_INITS:
        if kind == "lora_ga":
            why = "training changed the base too, and the folder, as PEFT reads it, does not say by what"
            warnings.warn(f"{file}: init_lora_weights={init!r}: {why}", stacklevel=5)
        return
    if isinstance(kind, str) and kind.startswith(_MUTATING_INITS):
        how = "model.save_pretrained(folder, path_initial_model_for_weight_conversion=...) of PEFT writes a plain LoRA"
        raise ValueError(
            f"{file}: init_lora_weights={init!r} changes the base weights, which can't be done here; {how}"
        )
    raise ValueError(f"{file}: init_lora_weights must be one of PEFT's, got {init!r}")


def _names(file: Path, given: dict[str, Any], key: str) -> list[str]:
    names = given.get(key, [])
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{file}: {key} must be a list of names, got {names!r}")
    return [unwrapped_name(name) for name in names]


def _listing(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in values.items())


def _targets(value: Any) -> Any:
    return ALL_LINEAR if isinstance(value, str) and value.lower() == ALL_LINEAR else _plain(value)


def _plain(value: Any) -> Any:
    """Names and patterns without the names of wrappers; anything else as it is, for the config to check."""
    if isinstance(value, str):
        return unwrapped_name(value)
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {_plain(key): each for key, each in value.items()}
    return value


def _listed(value: Any) -> list[Any]:
    """What PEFT may write alone, as a list, or leave out."""
    if value in (None, "", []):
        return []
    return value if isinstance(value, list) else [value]
