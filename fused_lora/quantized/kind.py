"""``Kind``: how one library keeps a weight in fewer bits, and how it becomes a weight again."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

# (kind's name, and the numbers that dequantizing takes besides tensors): constants, which a compiler can keep
Recipe = tuple[Any, ...]


@dataclass(frozen=True)
class Packed:
    """What is kept of one weight: its tensors, and the recipe by which they become it again."""

    recipe: Recipe
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for tensor in self.tensors for part in plain_parts(tensor))


def plain_parts(tensor: Any) -> list[Tensor]:
    """The tensors that a wrapper is made of; of a plain one, itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in plain_parts(getattr(tensor, name))]


class Kind:
    """A kind of quantized weight. A new one is a subclass, and an entry of ``KINDS``.

    Layers are told by the names of classes: a library is imported by whoever made its tensors, and not by us.

    A ``layer`` is the module that has the weight, of the library's class or of ours.
    """

    name: ClassVar[str]
    library: ClassVar[str]
    at_least: ClassVar[tuple[int, int]]
    # whether the output has x's dtype, and not the one that was computed in
    keeps_dtype: ClassVar[bool] = False

    def holds(self, layer: nn.Module) -> bool:
        """Whether the layer's weight is of this kind, quantized yet or not."""
        raise NotImplementedError

    def why_not(self, layer: Any) -> str | None:
        """Why the weight can't be computed with as it is, or None."""
        raise NotImplementedError

    def tell(self, layer: Any) -> str:
        """The kind in a word or two, for tables."""
        raise NotImplementedError

    def compute_dtype(self, layer: Any) -> torch.dtype | None:
        """The dtype that the layer's products are made in, whatever autocast says; None where that is autocast's or
        x's."""
        return None

    def own_dtype(self, layer: Any) -> torch.dtype:
        """The dtype that the weight had before it was quantized."""
        raise NotImplementedError

    def packed(self, layer: Any) -> Packed:
        raise NotImplementedError

    def dequantize(self, recipe: Recipe, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """A new (N, K) of that dtype."""
        raise NotImplementedError

    def requantize(self, layer: Any, value: Tensor) -> nn.Parameter:
        """value, (N, K), kept as the layer's weight is."""
        raise NotImplementedError

    def exchange(self, layer: Any, weight: nn.Parameter) -> nn.Parameter:
        """Give the layer this weight, of this kind; returns the one that it had, with all that belongs to it."""
        had = layer._parameters["weight"]
        layer._parameters["weight"] = weight
        return had

    def problem(self) -> str | None:
        """Why the library can't be used, or None."""
        version = version_of(self.library)
        wanted = ".".join(map(str, self.at_least))
        if version is not None and tuple(map(int, re.findall(r"\d+", version)[:2])) >= self.at_least:
            return None
        return (
            f"{self.library} must be {wanted} or newer for {self.name} weights, got "
            f"{'none installed' if version is None else version}; pip install '{self.library}>={wanted}'"
        )


@functools.cache
def version_of(library: str) -> str | None:
    """The one installed, or None."""
    # asked at every call of a layer; reading it from the disk takes as long as a small product
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_class(kind: type, module: str, names: tuple[str, ...]) -> bool:
    """Whether it is one of a library's classes, exactly."""
    return kind.__name__ in names and kind.__module__.split(".")[0] == module
