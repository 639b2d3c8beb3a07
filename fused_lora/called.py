"""Layers that a model never calls: it reads their weight by name, and their adapters change nothing and train nothing.

``nn.MultiheadAttention`` reads its ``out_proj`` so, Swin and WavLM their attention's layers, Mamba its ``dt_proj``.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .switching import Adapted, adapted_modules


class Called:
    """Whether a layer was ever called, shared by its copies and replicas; a pickle starts anew.

    Calls inside ``torch.compile`` are not noted, as a compiled region may not change what is outside it.
    """

    def __init__(self) -> None:
        self.ever = False
        self.warned = False

    def __deepcopy__(self, memo: Any) -> Called:
        return self

    def __reduce__(self) -> tuple[type[Called], tuple[()]]:
        return Called, ()


def never_called(model: nn.Module) -> list[str]:
    """Paths of the layers with active adapters that were never called, where others of the model were.

    A layer whose A or B has a gradient was called, inside ``torch.compile`` for instance.
    """
    layers = [(path, module) for path, module in adapted_modules(model) if _note_of(module) is not None]
    if not any(_was_called(module) for _, module in layers):
        return []
    return [path for path, module in layers if module.active_adapters and not _was_called(module)]


def warn_of_never_called(model: nn.Module, consequence: str, stacklevel: int = 3) -> None:
    """Once for each layer.  consequence: what that means for what is done now."""
    modules = dict(adapted_modules(model))
    paths = [path for path in never_called(model) if not _note(modules[path]).warned]
    if not paths:
        return
    for path in paths:
        _note(modules[path]).warned = True
    listed = ", ".join(paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")
    warnings.warn(
        f"{len(paths)} adapted layers were never called, while others were: {listed}. {consequence} A model may read "
        "such a weight by name, or may not have reached the layer yet (an expert without tokens, a block that is "
        "skipped); calls inside torch.compile are seen by their gradients only. Leave a layer out by exclude_modules.",
        stacklevel=stacklevel,
    )


def _note_of(module: Adapted) -> Called | None:
    return vars(module).get("_called")


def _note(module: Adapted) -> Called:
    note = _note_of(module)
    assert note is not None
    return note


def _was_called(module: Adapted) -> bool:
    adapters: Any = module.adapters
    trained = (p for adapter in adapters.values() for p in adapter.parameters(recurse=False))
    note = _note(module)
    # noted, so that it is still known when zero_grad has dropped the gradients
    note.ever = note.ever or any(parameter.grad is not None for parameter in trained)
    return note.ever


# --------------------------------------------------------------------------------------------------
# The first optimizer step after a backward
# --------------------------------------------------------------------------------------------------

_WATCHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_HOOK: list[Any] = []


def watch(model: nn.Module) -> None:
    """Warn at the model's first optimizer step after a backward, if some adapted layers were not called until then."""
    _WATCHED.add(model)
    if not _HOOK:
        _HOOK.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for model in list(_WATCHED):
        active = [module for _, module in adapted_modules(model) if module.active_adapters]
        if not active:
            continue
        ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        adapters = (p for module in active for name in module.active_adapters for p in module.trained_parameters(name))
        if any(id(parameter) in ids and parameter.grad is not None for parameter in adapters):
            _WATCHED.discard(model)
            warn_of_never_called(model, "Their adapters get no gradient from the loss.", stacklevel=4)
    if not _WATCHED:
        _HOOK.pop().remove()
