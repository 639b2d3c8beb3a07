"""Reading an adapter folder: every check, and no effect. A folder comes from a stranger."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import validation
from ..adapter import LoRAAdapter, features
from ..instances import device_of, value_of
from ..layer import FusedLoRALinear
from ..models.apply import Installation
from ..models.config import ALL_LINEAR, selector
from ..models.modules_to_save import Part, Trained, copies_of, own_state
from ..models.selection import biases, check_kinds, linear_layers, output_head, parts_below, places, with_tied
from ..quantized import base_of, weight_dtype
from ..switching import base_modules
from .config_file import FolderConfig, read_config
from .files import config_beside, safetensors, weights_of
from .foreign import recognise
from .names import PAIR, renaming, unwrapped_name, without_prefix
from .writing import BASE, CONFIG_FILE, DIGEST, WEIGHTS_FILE


def read_folder(model: nn.Module, folder: Path, strict: bool) -> Installation:
    """What the folder holds for ``model``, made and ready to be put in.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: naming the file, the rule and the value.
    """
    file = weights_of(folder)
    with safetensors(file) as tensors:
        config = read_config(*config_beside(folder, (tensors.metadata() or {}).get(DIGEST)))
        return _Reader(model, file, tensors, config, strict).read()


class _Reader:
    """One reading: the file's keys are taken one by one by what the model and the config want of them.

    Paths are those of the model without the names of wrappers; ``wrapped`` has what they are in the model.
    """

    def __init__(self, model: nn.Module, file: Path, tensors: Any, config: FolderConfig, strict: bool) -> None:
        self.model, self.file, self.tensors, self.config, self.strict = model, file, tensors, config, strict
        self.metadata: dict[str, str] = tensors.metadata() or {}
        validation.check_no_pefts(base_modules(model))
        # what is inside a wrapper comes after it, and takes its name
        self.wrapped = {unwrapped_name(path): path for path, _ in base_modules(model)}
        self.modules = {unwrapped_name(path): module for path, module in base_modules(model)}
        self.linears = {unwrapped_name(path): layer for path, layer in linear_layers(model).items()}
        self.head, self.places = output_head(model), places(model)
        self.ignored: list[str] = []
        self.missing: list[str] = []
        keys = list(tensors.keys())
        try:
            names = [unwrapped_name(name) for name in without_prefix(keys)]
        except ValueError as error:
            raise ValueError(f"{file}: {error}{recognise((), keys, self.metadata)}") from None
        to_model, self.in_file = renaming(model, names, self.modules)
        # the name that the model has for it -> the file's
        self.rest: dict[str, str] = {}
        for name, key in zip(names, keys, strict=True):
            if self.rest.setdefault(to_model(name), key) != key:
                raise ValueError(f"{file}: {key!r} stands there twice")

    def read(self) -> Installation:
        self._check_supported()
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
        return Installation(
            {self.wrapped[path]: adapter for path, adapter in adapters.items()},
            {self.wrapped.get(path, path): copy for path, copy in copies.items()},
        )

    def _check_supported(self) -> None:
        for name, value in self.config.unknown.items():
            why = f"is none of PEFT's keys that are known: only plain LoRA can be loaded, got {name}={value!r}"
            self._refuse(name, f"{why}; strict=False ignores it", self.ignored)
        for kind in self.config.training:
            message = f"{self.config.file}: {kind}_config changes training: here A and B are trained on as plain LoRA"
            warnings.warn(message, stacklevel=5)
            self.rest = {name: key for name, key in self.rest.items() if f".lora_{kind}_" not in name}
        for name, key in list(self.rest.items()):
            if ".lora_embedding_" in name:
                self._refuse(key, "is of an adapter of an embedding, and only linear layers are adapted", self.ignored)
                del self.rest[name]

    def _check_base(self, paths: Iterable[str]) -> None:
        saved, here = self.metadata.get(BASE), base_of(self.linears[path] for path in paths)
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
            match = PAIR.fullmatch(name)
            if match is None:
                continue
            path, side = match["path"] or "", match["side"]
            if why := self._why_not(path):
                self._refuse(key, why, self.ignored)
                del self.rest[name]
                continue
            rank = self.config.lora.rank_of(self.config.pattern_name(self.in_file(path)))
            K, N = features(self.linears[path])
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

    def _why_not(self, path: str) -> str:
        """Why A and B at this path can't be loaded; empty where they can."""
        if path not in self.linears:
            module = self.modules.get(path)
            other = "" if module is None or isinstance(module, Trained) else f", but a {type(module).__name__}"
            return f"needs a linear layer {path!r}, and the model has none{other}"
        layer, name = self.linears[path], self.in_file(path)
        listed = self.places.get(layer, [])
        if listed and DIGEST not in self.metadata:
            why = "PEFT adapts it in the first only, and here every place would have the adapter"
            return f"is of a module that stands in several places, {', '.join(listed)}: {why}"
        if self.config.saves(name) and not self.config.by_parameter(name):
            return f"is inside one of modules_to_save: modules_to_save must leave out layers with A and B, got {path!r}"
        if not self.config.names(name) or (self.config.lora.target_modules == ALL_LINEAR and layer is self.head):
            return f"is of a layer that {CONFIG_FILE} does not name in target_modules"
        if self.config.by_parameter(name) and type(layer) not in (nn.Linear, FusedLoRALinear):
            return f"is of the weight of a {type(layer).__name__}; target_parameters must be weights of nn.Linear"
        return ""

    def _check_shape(self, key: str, wanted: tuple[int, ...], hint: str = "") -> None:
        shape = tuple(self.tensors.get_slice(key).get_shape())
        if shape != wanted:
            raise ValueError(f"{self.file}: {key!r} must be {wanted}, got {shape}{hint}")

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
        return LoRAAdapter.of(A, B, lora.options_for(self.config.pattern_name(name)), self._bias(path))

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
            below = (found for root in self._roots() for found in parts_below(self.modules, root).items())
            parts = {unwrapped_name(path): part for path, part in below}
            if self.config.lora.bias == "all":
                parts |= biases(self.modules, {*paths, *parts})
            changed = self._changed(paths, set(parts))
            check_kinds({path: self.linears[path] for path in paths}, parts | changed)
        except ValueError as error:
            raise ValueError(f"{self.config.file}: {error}") from None
        copies = copies_of(parts, tied=self.config.lora.ensure_weight_tying) | copies_of(changed, tied=True)
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

    def _changed(self, adapted: set[str], without: set[str]) -> dict[str, tuple[nn.Module, Part]]:
        """Modules whose own tensors are in the file with other values than the model's.

        PEFT writes an adapted output head's weight, and embeddings that were resized, and reads them into the base.
        Here they are copies of the adapter's. Values that are the base's are dropped.
        """
        found: dict[str, tuple[nn.Module, Part]] = {}
        owners = {name.rpartition(".")[0].removesuffix("base_layer").removesuffix(".") for name in self.rest}
        for path in sorted(owners & self.modules.keys() - without):
            own = own_state(self.modules[path])
            stem = f"{path}." * bool(path) + "base_layer." * (path in adapted)
            here = {key: name for key in own if (name := stem + key) in self.rest}
            if all(self._is_base(self.rest[name], own[key]) for key, name in here.items()):
                for name in here.values():
                    del self.rest[name]
                continue
            # a tied weight is changed for all that have it
            tensors = {id(own[key]) for key in here}
            tied = {p: m for p, m in self.modules.items() if not tensors.isdisjoint(map(id, m._parameters.values()))}
            if adapted.isdisjoint(tied):
                found |= {p: (m, Part(None, p)) for p, m in tied.items()}
                continue
            why = "is not what the model has there, under an adapted layer; load it into the model first"
            for name in here.values():
                self._refuse(self.rest.pop(name), why, self.ignored)
        return found

    def _is_base(self, key: str, own: Tensor) -> bool:
        """Whether the file has the base's values, in its dtype or rounded to the file's."""
        if own.device.type == "meta":
            raise ValueError(f"{self.file}: {key!r} is of the base, which must have values, got one on meta")
        self._check_shape(key, tuple(own.shape), "; where the vocabulary was resized, resize the model's first")
        stored, own = self.tensors.get_tensor(key).to(own.device), validation.whole(own.detach())
        return torch.equal(stored, own.to(stored.dtype)) or torch.equal(stored.to(own.dtype), own)

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
