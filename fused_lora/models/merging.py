"""Whole models merged into their weights, back again, or for good. All layers or none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch import nn

from ..layer import FusedLoRALinear
from ..switching import adapted_modules
from .modules_to_save import Trained
from .selection import tied


def merge(model: nn.Module) -> nn.Module:
    """Fold every layer's active adapters into its weight; see :meth:`FusedLoRALinear.merge`. Returns ``model``.

    What an adapter trains beside A and B, ``modules_to_save`` for instance, is called as it is, merged or not.

    Raises:
        ValueError: a sum has a NaN or an infinity, or a weight is another module's too, which would change with it;
            every layer is left as it was.
    """
    names = tied(model)
    layers = [(path, module) for path, module in adapted_modules(model) if isinstance(module, FusedLoRALinear)]
    layers = [(path, layer) for path, layer in layers if layer.active_adapters and not layer.merged]
    for path, layer in layers:
        for name, parameter in layer.merged_parameters():
            if id(parameter) in names:
                raise ValueError(_not_its_own(f"{path}.{name}" if path else name, names[id(parameter)]))
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


def unmerge(model: nn.Module) -> nn.Module:
    """Restore every weight bit for bit; returns ``model``."""
    for _, module in adapted_modules(model):
        module.unmerge()
    return model


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merge, then turn every layer back into a plain ``nn.Linear`` without adapters; returns ``model``.

    Modules that the active adapter trained whole become what it made of them.

    Raises:
        ValueError: as :func:`merge`; nothing is changed.
    """
    names, modules = tied(model), adapted_modules(model)
    trained = [(path, module) for path, module in modules if isinstance(module, Trained) and module.active_adapters]
    # a tensor of two modules may change where the adapter trains one copy of it for both
    holders = Counter(id(tensor) for _, module in trained for tensor in module.replaced().values())
    for path, module in trained:
        for name, tensor in module.replaced().items():
            if holders[id(tensor)] < len(names.get(id(tensor), ())):
                raise ValueError(_not_its_own(f"{path}.{name}", names[id(tensor)]))
        _named(path, module.check_finite)
    merge(model)
    for _, each in modules:
        each.unload()
    return model


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
