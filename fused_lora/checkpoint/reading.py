"""Reading an adapter folder: every check, and no effect. A folder comes from a stranger."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .. import validation
from ..adapter import LoRAAdapter, features
from ..instances import device_of, value_of
from ..models.apply import Installation
from ..models.config import ALL_LINEAR, LoRAConfig, selector
from ..models.modules_to_save import Part, copies_of
from ..models.peft_config import fields_of, more_than_lora
from ..models.selection import biases, check_kinds, linear_layers, parts_below, with_tied
from ..quantized import base_of, weight_dtype
from ..switching import base_modules
from .writing import BASE, CONFIG_FILE, DIGEST, PREFIX, WEIGHTS_FILE, beside_of, digest

# the name of an adapter may stand before ".weight", as some writers leave it there
_PAIR = re.compile(r"(?:(?P<path>.+)\.)?lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
_LARGEST_CONFIG = 1 << 24
# what PEFT wrote before it wrote safetensors
_PICKLE = "adapter_model.bin"

# the ones whose base weights are those on the hub
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")


def read_folder(model: nn.Module, folder: Path, strict: bool) -> Installation:
    """What the folder holds for ``model``, made and ready to be put in.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: naming the file, the rule and the value.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder must be a directory, got the file {str(folder)!r}")
    file = folder / WEIGHTS_FILE
    if not file.exists() and (folder / _PICKLE).exists():
        raise FileNotFoundError(
            f"folder must hold {WEIGHTS_FILE}, got {str(folder)!r} with {_PICKLE}, a pickle, which can run code and is "
            "never read; where you trust it, PEFT writes the other: PeftModel.from_pretrained(base_model, "
            "folder).save_pretrained(folder)"
        )
    _check_file(file, _memory())
    with _safetensors(file) as tensors:
        config = _read_config(*_config_beside(folder, (tensors.metadata() or {}).get(DIGEST)))
        return _Reader(model, file, tensors, config, strict).read()


@contextmanager
def _safetensors(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{file} must be a safetensors file: {error}") from None


def _check_file(file: Path, largest: int) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"folder must hold {file.name}, got no file {str(file)!r}")
    size = file.stat().st_size
    if size > largest:
        raise ValueError(f"{file} must have at most {largest:,} bytes, got {size:,}")


def _memory() -> int:
    """Bytes of this machine's memory, where it tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 1 << 40


# --------------------------------------------------------------------------------------------------
# The config
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Config:
    """numbers, lists: of the layers of a list that are adapted alone, None for all, and of the lists' names."""

    lora: LoRAConfig
    numbers: frozenset[int] | None
    lists: tuple[str, ...]
    file: Path

    def names(self, path: str) -> bool:
        """Whether a linear layer at this path is the config's, by PEFT's rules."""
        if not self.lora.targets(path):
            return False
        if self.numbers is None or isinstance(self.lora.target_modules, str):
            return True
        before = [rf"(?:.*?\.)?{re.escape(name)}" for name in self.lists] or [r".*?\.[^.]*"]
        found = next((match for each in before if (match := re.match(rf"{each}\.(\d+)\.", path))), None)
        return found is not None and int(found[1]) in self.numbers


def _config_beside(folder: Path, wanted: str | None) -> tuple[Path, bytes]:
    """The config of the weights that say their config's digest, wherever the writer was stopped; else what is there."""
    place = folder / CONFIG_FILE
    # a writer may be at work: what was beside its place a moment ago is in it now
    for path in (place, *beside_of(folder, CONFIG_FILE), place) if wanted is not None else ():
        try:
            _check_file(path, _LARGEST_CONFIG)
            data = path.read_bytes()
        except (OSError, ValueError):
            continue
        if digest(data) == wanted:
            return path, data
    _check_file(place, _LARGEST_CONFIG)
    if wanted is not None:
        warnings.warn(f"{place} is not the one that {WEIGHTS_FILE} was saved with; it was changed since", stacklevel=5)
    return place, place.read_bytes()


def _read_config(file: Path, data: bytes) -> _Config:
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        kind = raw.get("peft_type") if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"{file}: peft_type must be 'LORA', got {kind!r}")
    if foreign := more_than_lora(raw):
        raise ValueError(
            f"{file}: only plain LoRA can be loaded, got {', '.join(f'{k}={v!r}' for k, v in foreign.items())}"
        )
    if raw.get("init_lora_weights") not in _PLAIN_INITS:
        raise ValueError(
            f"{file}: init_lora_weights={raw['init_lora_weights']!r} changes the base weights, which can't be done here"
        )
    try:
        config = LoRAConfig(**fields_of(raw))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from None
    numbers, lists = (_listed(raw.get(name)) for name in ("layers_to_transform", "layers_pattern"))
    if not all(type(number) is int for number in numbers) or not all(isinstance(name, str) for name in lists):
        raise ValueError(f"{file}: layers_to_transform must be numbers of layers, layers_pattern names of their lists")
    return _Config(config, frozenset(numbers) or None, tuple(lists), file)


def _listed(value: Any) -> list[Any]:
    """What PEFT may write alone, as a list, or leave out."""
    if value in (None, "", []):
        return []
    return value if isinstance(value, list) else [value]


# --------------------------------------------------------------------------------------------------
# The weights
# --------------------------------------------------------------------------------------------------


def _renaming(
    model: nn.Module, names: list[str], modules: dict[str, nn.Module]
) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """(the model's name for one of the file, the file's for one of the model).

    They differ where a Transformers model with a head reads what was saved from the bare one, or the other way round:
    ``base_model_prefix`` stands before all but the head's names, as in its own checkpoints.
    """
    prefix = getattr(model, "base_model_prefix", None)
    paths = [match["path"] for name in names if (match := _PAIR.fullmatch(name)) and match["path"]]
    if isinstance(prefix, str) and prefix and paths and paths[0] not in modules:

        def with_prefix(name: str) -> str:
            return f"{prefix}.{name}"

        def without(name: str) -> str:
            return name.removeprefix(f"{prefix}.")

        if with_prefix(paths[0]) in modules:
            return with_prefix, without
        if without(paths[0]) in modules:
            return without, with_prefix
    return (lambda name: name), (lambda name: name)


class _Reader:
    """One reading: the file's keys are taken one by one by what the model and the config want of them."""

    def __init__(self, model: nn.Module, file: Path, tensors: Any, config: _Config, strict: bool) -> None:
        self.model, self.file, self.tensors, self.config, self.strict = model, file, tensors, config, strict
        self.modules = dict(base_modules(model))
        validation.check_no_pefts(self.modules.items())
        self.linears = linear_layers(model)
        self.ignored: list[str] = []
        self.missing: list[str] = []
        names = list(tensors.keys())
        foreign = [key for key in names if not key.startswith(PREFIX)]
        if foreign:
            raise ValueError(f"{file}: keys must be {PREFIX}<layer>.lora_A.weight or the like, got {foreign[0]!r}")
        to_model, self.in_file = _renaming(model, [key[len(PREFIX) :] for key in names], self.modules)
        # the name that the model has for it -> the file's
        self.rest = {to_model(key[len(PREFIX) :]): key for key in names}

    def read(self) -> Installation:
        pairs = self._pairs()
        self._check_base(pairs)
        adapters = {path: self._adapter(path, keys) for path, keys in pairs.items()}
        copies = self._copies(set(pairs))
        self._check_complete(pairs)
        for name, key in self.rest.items():
            self._refuse(key, f"has no place in the model: no layer takes {name!r}", self.ignored)
        if self.ignored or self.missing:
            found = [f"ignored: {', '.join(self.ignored)}"] * bool(self.ignored)
            found += [f"missing: {', '.join(self.missing)}"] * bool(self.missing)
            warnings.warn(f"{self.file}: {'; '.join(found)}", stacklevel=4)
        return Installation(adapters, copies)

    def _check_base(self, paths: Iterable[str]) -> None:
        saved, here = (self.tensors.metadata() or {}).get(BASE), base_of(self.linears[path] for path in paths)
        if saved is not None and saved != here:
            why = f"is over what it was saved, and the model's is {here or 'plain'}; strict=False loads it all the same"
            self._refuse(f"a base of {saved}", why, self.ignored)

    def _refuse(self, what: str, why: str, reported: list[str]) -> None:
        """Strict: an error. Otherwise remembered for the one warning."""
        if self.strict:
            raise ValueError(f"{self.file}: {what!r} {why}")
        reported.append(what)

    def _pairs(self) -> dict[str, dict[str, str]]:
        """path -> {"A": key, "B": key}, names, shapes and ranks checked before any value is read."""
        pairs: dict[str, dict[str, str]] = {}
        for name, key in list(self.rest.items()):
            match = _PAIR.fullmatch(name)
            if match is None:
                continue
            path, side = match["path"] or "", match["side"]
            if path not in self.linears:
                self._refuse(key, f"needs a linear layer {path!r}, and the model has none", self.ignored)
                del self.rest[name]
                continue
            if not self.config.names(self.in_file(path)):
                self._refuse(key, f"is of a layer that {CONFIG_FILE} does not name in target_modules", self.ignored)
                del self.rest[name]
                continue
            (K, N), rank = features(self.linears[path]), self.config.lora.rank_of(self.in_file(path))
            self._check_shape(key, (rank, K) if side == "A" else (N, rank))
            if side in pairs.setdefault(path, {}):
                raise ValueError(f"{self.file}: {key!r} stands there twice")
            pairs[path][side] = self.rest.pop(name)
        for path, pair in pairs.items():
            if len(pair) != 2:
                raise ValueError(
                    f"{self.file}: {path!r} must have lora_A and lora_B, got lora_{next(iter(pair))} alone"
                )
        if not pairs:
            raise ValueError(f"{self.file} must hold at least one adapter, got none")
        return pairs

    def _check_shape(self, key: str, wanted: tuple[int, ...]) -> None:
        shape = tuple(self.tensors.get_slice(key).get_shape())
        if shape != wanted:
            raise ValueError(f"{self.file}: {key!r} must be {wanted}, got {shape}")

    def _tensor(self, key: str, device: torch.device, dtype: Callable[[torch.dtype], torch.dtype]) -> Tensor:
        """A tensor of its own, of the dtype that ``dtype`` says for the file's, finite in it."""
        stored = self.tensors.get_tensor(key)
        if not stored.is_floating_point() or stored.dtype.itemsize < 2:
            raise ValueError(f"{self.file}: {key!r} must be floating point of 16 bits or more, got {stored.dtype}")
        # the file's bytes may be mapped, and change: what is checked is a copy
        tensor = stored.to(device, dtype(stored.dtype), copy=True)
        if not validation.is_finite(tensor):
            raise ValueError(f"{self.file}: {key!r} must be finite, got NaN or infinity")
        return tensor

    def _adapter(self, path: str, keys: dict[str, str]) -> LoRAAdapter:
        validation.check_whole(self.linears[path].weight, f"{path}.weight")
        device, lora, name = device_of(self.linears[path]), self.config.lora, self.in_file(path)
        if device.type == "meta":
            raise ValueError(f"{path}.weight must have values before an adapter is loaded, got one on meta")
        dtype = weight_dtype(self.linears[path])
        precise = torch.promote_types(dtype, torch.float32)
        A, B = (
            self._tensor(keys[side], device, lambda stored: stored if stored == dtype else precise) for side in "AB"
        )
        return LoRAAdapter.of(A, B, lora.options_for(name), self._bias(path))

    def _bias(self, path: str) -> Tensor | None:
        bias = self.linears[path].bias
        if self.config.lora.bias == "none" or bias is None:
            return None
        key = self.rest.pop(f"{path}.base_layer.bias" if path else "base_layer.bias", None)
        if key is None:
            self._refuse(f"{path}.base_layer.bias", "must be there, as bias is not 'none'", self.missing)
            return value_of(self.linears[path], "bias").detach().clone()
        self._check_shape(key, tuple(bias.shape))
        return self._tensor(key, device_of(self.linears[path]), lambda _: bias.dtype)

    def _copies(self, paths: set[str]) -> dict[str, tuple[Part, nn.Module]]:
        """What is trained beside A and B: each module's copy, with the file's values."""
        try:
            parts = {path: part for root in self._roots() for path, part in parts_below(self.modules, root).items()}
            if self.config.lora.bias == "all":
                parts |= biases(self.modules, {*paths, *parts})
            check_kinds({path: self.linears[path] for path in paths}, parts)
        except ValueError as error:
            raise ValueError(f"{self.config.file}: {error}") from None
        copies = copies_of(parts, tied=self.config.lora.ensure_weight_tying)
        filled: set[int] = set()
        lacking: list[tuple[str, int]] = []
        for path, (part, clone) in copies.items():
            for name, target in part.of(clone).items():
                whole = f"{path}.{name}" if path else name
                key = self.rest.pop(whole, None)
                if key is None:
                    lacking.append((whole, id(target)))
                    continue
                before = target.clone() if id(target) in filled else None
                self._fill(key, target)
                filled.add(id(target))
                if before is not None and not torch.equal(before, target):
                    raise ValueError(f"{self.file}: {key!r} must be equal to the tensor that it is tied to")
        for name, target_id in lacking:
            # a tensor of two names may stand there under one
            if target_id not in filled:
                self._refuse(name, "must be there, as the config has it trained", self.missing)
        return copies

    def _fill(self, key: str, target: Tensor) -> None:
        self._check_shape(key, tuple(target.shape))
        if target.is_floating_point():
            target.data.copy_(self._tensor(key, target.device, lambda _: target.dtype))
            return
        stored = self.tensors.get_tensor(key)
        if stored.dtype != target.dtype:
            raise ValueError(f"{self.file}: {key!r} must be {target.dtype}, got {stored.dtype}")
        target.data.copy_(stored)

    def _roots(self) -> list[str]:
        """The topmost modules that modules_to_save names: by PEFT's rule, the end of a path, and here with values."""
        ends = tuple(self.config.lora.modules_to_save)
        named = selector(ends)
        roots = [path for path in self.modules if path and (named(path) or path.endswith(ends))] if ends else []
        roots = [path for path in roots if not any(path.startswith(other + ".") for other in roots)]
        for root in roots:
            self._forget_doubles(root)
        found = {root for root in roots if named(root) or any(name.startswith(root + ".") for name in self.rest)}
        return sorted(with_tied(self.model, found) if self.config.lora.ensure_weight_tying else found)

    def _forget_doubles(self, root: str) -> None:
        """PEFT writes a saved module's biases again under its own names for it where ``bias`` is "all"."""
        for name in list(self.rest):
            for place in ("modules_to_save", "original_module"):
                inside = name.removeprefix(f"{root}.{place}.")
                # the adapter's name may stand before it
                if inside != name and any(f"{root}.{end}" in self.rest for end in (inside, inside.partition(".")[2])):
                    del self.rest[name]

    def _check_complete(self, pairs: dict[str, Any]) -> None:
        if self.config.lora.target_modules == ALL_LINEAR:
            return
        for path in self.linears:
            if path not in pairs and self.config.names(self.in_file(path)):
                why = f"is one of target_modules, and {WEIGHTS_FILE} lacks it; strict=False leaves such layers alone"
                self._refuse(path, why, self.missing)
