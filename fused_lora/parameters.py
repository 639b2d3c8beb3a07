"""Linear layers made of given Parameters, and Parameters given other values."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import validation


def made_of(weight: Tensor, bias: Tensor | None, *, like: nn.Module, kind: type[Any]) -> Any:
    """A layer of this class, of the sizes and in the mode of another, with these very Parameters.

    A class may name in ``carried`` what else it takes over.
    """
    layer: Any = object.__new__(kind)
    nn.Module.__init__(layer)
    for name in ("in_features", "out_features", "nx", "nf", *getattr(kind, "carried", ())):
        if name in vars(like):
            vars(layer)[name] = vars(like)[name]
    layer.weight = weight
    layer.register_parameter("bias", bias)
    return layer.train(like.training)


def exchange(parameter: Tensor, value: Tensor) -> Tensor:
    """Give the Parameter this value and return what it had."""
    if validation.is_dtensor(parameter):
        # assigning .data would leave its shard as it was
        had = parameter.detach().clone()
        parameter.copy_(value)
    else:
        had, parameter.data = parameter.data, value
    return had
