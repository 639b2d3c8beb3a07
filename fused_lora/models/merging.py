"""Whole models merged into their weights, back again, or for good. All layers or none."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..called import warn_of_never_called
from ..instances import check_forward
from ..layer import FusedLoRALinear
from ..quantized.layer import FusedLoRAQuantized
from ..switching import Adapted, adapted_modules
from .encoder import settle_fast_paths
from .modules_to_save import Trained
from .pretrained import settle_pretrained
from .selection import tied

Model = TypeVar("Model", bound=nn.Module)


def merge(model: Model) -> Model:
    """Fold every layer's active adapters into its weight; see :meth:`FusedLoRALinear.merge`. Returns ``model``.

    What an adapter trains beside A and B, ``modules_to_save`` for instance, is called as it is, merged or not.

    Raises:
        ValueError: a sum has a NaN or an infinity, or a weight is another module's too, which would change with it, or
            is computed anew at every call (``weight_norm``, ``prune``), or a subclass's own forward does more with it
            than ``nn.Linear``'s; every layer is left as it was.
    """
    layers = [(path, module) for path, module in adapted_modules(model) if isinstance(module, FusedLoRALinear)]
    layers = [(path, layer) for path, layer in layers if not layer.merged]
    _check_ties(model, layers)
    warn_of_never_called(model, "Merged, their adapters change what the model computes.")
    merged: list[FusedLoRALinear] = []
    try:
        for path, layer in layers:
            merged.append(layer)
            _named(path, layer.merge)
    except BaseException:
        for layer in merged:
            layer.unmerge()
        raise
    return model


def unmerge(model: Model) -> Model:
    """Restore every weight bit for bit; returns ``model``."""
    for _, module in adapted_modules(model):
        module.unmerge()
    return model


def merge_and_unload(model: Model, *, dequantize: bool | torch.dtype = False) -> Model:
    """Merge, then turn every layer back into a plain ``nn.Linear`` without adapters; returns ``model``.

    Modules that the active adapter trained whole become what it made of them. Where they share a weight and the adapter
    has several copies of it, or one for some of them, that weight is tied no longer, as in PEFT: it warns, and a
    Transformers config's ``tie_word_embeddings`` becomes False. It works layer by layer. Each sum is made once to be
    checked and once to stay, so the memory of one is enough.

    Args:
        dequantize: a quantized layer's sum is quantized again, which rounds, and warns. With True the layer becomes a
            plain ``nn.Linear`` instead, of the dtype that its weight had before it was quantized (of 8 bits: its
            bias's, or float16), or of the dtype given here.

    Raises:
        ValueError: as :func:`merge`; nothing is changed.
    """
    if not isinstance(dequantize, (bool, torch.dtype)):
        raise TypeError(f"dequantize must be True, False or a torch.dtype, got {dequantize!r}")
    modules = adapted_modules(model)
    _check_ties(model, modules)
    warn_of_never_called(model, "Merged, their adapters change what the model computes.")
    for path, module in modules:
        check_forward(module, path)  # type: ignore[arg-type]
        _named(path, module.check_finite)
    _untie(model, modules)
    for _, module in modules:
        if dequantize and isinstance(module, FusedLoRAQuantized):
            module.dequantize(dequantize if isinstance(dequantize, torch.dtype) else None)
        module.unload()
    settle_fast_paths(model)
    settle_pretrained(model)
    return model


def _check_ties(model: nn.Module, modules: Sequence[tuple[str, Adapted]]) -> None:
    """ValueError where a tensor that A and B are merged into is another module's too."""
    names = tied(model)
    for path, module in modules:
        for name, tensor in () if isinstance(module, Trained) else module.replaced().items():
            if id(tensor) in names:
                raise ValueError(_not_its_own(f"{path}.{name}" if path else name, names[id(tensor)]))


def _untie(model: nn.Module, modules: Sequence[tuple[str, Adapted]]) -> None:
    """Give tied weights that are to be replaced by different copies, or not all of them, a Parameter for each copy."""
    names = tied(model)
    # a tied weight -> module, its name there, and the copy that takes its place
    groups: dict[int, list[tuple[Trained, str, Tensor]]] = {}
    for _, module in modules:
        if isinstance(module, Trained):
            for name, (base, copy) in module.replacements().items():
                if id(base) in names:
                    groups.setdefault(id(base), []).append((module, name, copy))
    for base_id, group in groups.items():
        copies = {copy: nn.Parameter(copy.data, requires_grad=False) for _, _, copy in group}
        if len(copies) == 1 and len(group) == len(names[base_id]):
            continue
        for module, name, copy in group:
            module._parameters[name] = copies[copy]
        warnings.warn(f"{' and '.join(names[base_id])} were one tensor, and are not after merging", stacklevel=3)
        for part in model.modules():
            config = getattr(part, "config", None)
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False  # type: ignore[union-attr]


def _not_its_own(name: str, names: list[str]) -> str:
    return (
        f"{name} must be its own to be merged into, and {' and '.join(names)} are one tensor; untie it first: "
        f"{name} = nn.Parameter({name}.detach().clone(), requires_grad=False)"
    )


def _named(path: str, action: Callable[[], None]) -> None:
    """Run it; its ValueError names the path."""
    try:
        action()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
