"""Linear layers made of given Parameters, and Parameters given other values."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from . import validation


def made_of(weight: Tensor, bias: Tensor | None, *, like: nn.Module, kind: type[Any]) -> Any:
    """A layer of this class, of the sizes and in the mode of another, with these very Parameters.

    A class may name in ``carried`` what else it takes over, or take all by ``carries_all``.
    """
    if getattr(kind, "carries_all", False) or "weight" not in like._parameters:
        # where the weight is computed at every call, of other Parameters, those and the hook that does it are needed
        return sharing(like, kind)
    layer: Any = object.__new__(kind)
    nn.Module.__init__(layer)
    for name in ("in_features", "out_features", "nx", "nf", *getattr(kind, "carried", ())):
        if name in vars(like):
            vars(layer)[name] = vars(like)[name]
    layer.weight = weight
    layer.register_parameter("bias", bias)
    return layer.train(like.training)


def sharing(like: nn.Module, kind: type[Any]) -> Any:
    """A module of this class with another's state: the same tensors, submodules and hooks, in tables of its own."""
    tables = vars(nn.Module())
    made = object.__new__(kind)
    vars(made).update({name: copy.copy(value) if name in tables else value for name, value in vars(like).items()})
    return made


def holding(layer: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """For one call: ``layer`` with another weight and bias, sharing the rest with it; itself is not touched."""
    held = object.__new__(type(layer))
    vars(held).update(vars(layer))
    vars(held)["_parameters"] = {**layer._parameters, "weight": weight, "bias": bias}
    return held


def exchange(parameter: Tensor, value: Tensor) -> Tensor:
    """Give the Parameter this value and return what it had."""
    if validation.is_dtensor(parameter):
        # assigning .data would leave its shard as it was
        had = parameter.detach().clone()
        parameter.copy_(value)
    else:
        had, parameter.data = parameter.data, value
    return had
