"""Whole models merged into their weights, back again, or for good. All layers or none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from ..layer import FusedLoRALinear
from ..quantized.layer import FusedLoRAQuantized
from ..switching import Adapted, adapted_modules
from .encoder import settle_fast_paths
from .modules_to_save import Trained
from .selection import tied

Model = TypeVar("Model", bound=nn.Module)


def merge(model: Model) -> Model:
    """Fold every layer's active adapters into its weight; see :meth:`FusedLoRALinear.merge`. Returns ``model``.

    What an adapter trains beside A and B, ``modules_to_save`` for instance, is called as it is, merged or not.

    Raises:
        ValueError: a sum has a NaN or an infinity, or a weight is another module's too, which would change with it;
            every layer is left as it was.
    """
    layers = [(path, module) for path, module in adapted_modules(model) if isinstance(module, FusedLoRALinear)]
    layers = [(path, layer) for path, layer in layers if not layer.merged]
    _check_ties(model, layers)
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

    Modules that the active adapter trained whole become what it made of them. It works layer by
    layer. Each sum is made once to be checked and once to stay, so the memory of one is enough.

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
    for path, module in modules:
        _named(path, module.check_finite)
    for _, module in modules:
        if dequantize and isinstance(module, FusedLoRAQuantized):
            module.dequantize(dequantize if isinstance(dequantize, torch.dtype) else None)
        module.unload()
    settle_fast_paths(model)
    return model


def _check_ties(model: nn.Module, modules: Sequence[tuple[str, Adapted]]) -> None:
    """ValueError where a tensor that merging replaces is another module's too."""
    names = tied(model)
    replaced = [(path, module, module.replaced()) for path, module in modules]
    # it may be one that the adapter trains one copy of for all of them
    copies = Counter(id(t) for _, module, found in replaced if isinstance(module, Trained) for t in found.values())
    for path, _, found in replaced:
        for name, tensor in found.items():
            if copies[id(tensor)] < len(names.get(id(tensor), ())):
                raise ValueError(_not_its_own(f"{path}.{name}" if path else name, names[id(tensor)]))


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
