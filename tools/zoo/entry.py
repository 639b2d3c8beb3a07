"""One model of the zoo: how it is made, what it is given, and what of it becomes the output that is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

CHECKS = ("fresh", "gradients", "PEFT", "PEFT fused", "saved", "merged")


@dataclass(frozen=True, eq=False)
class Entry:
    """A line of a table.

    Args:
        name: the model's, in its library.
        make: a new model with random weights; no network.
        inputs: its forward's, as keywords or in order.
        known: check -> why its result differs here. A check that differs without a reason fails the run, and so does
            one that has a reason and no longer differs.
        targets: the layers that are adapted, as ``target_modules`` says it.
    """

    name: str
    library: str
    family: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Mapping[str, Any] | tuple[Any, ...]]
    known: Mapping[str, str] = field(default_factory=dict)
    targets: str | Sequence[str] = "all-linear"

    @property
    def title(self) -> str:
        return f"{self.library}: {self.name}"

    def base(self) -> nn.Module:
        """The model, the same at every call, in eval mode."""
        torch.manual_seed(0)
        model = self.make().eval()
        for parameter in model.parameters():
            # a matrix of zeros hides what is behind it
            if parameter.dim() > 1 and parameter.is_floating_point() and not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        return model

    def output(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        """All that the model returns in floating point, in one row.

        Raises:
            ValueError: there is a NaN or an infinity.
        """
        torch.manual_seed(1)
        given = self.inputs()
        with _default(dtype):
            if isinstance(given, Mapping):
                returned = model(**{name: _as(value, dtype) for name, value in given.items()})
            else:
                returned = model(*(_as(value, dtype) for value in given))
        found = torch.cat([tensor.flatten().to(dtype) for tensor in tensors_in(returned)])
        if not found.isfinite().all():
            raise ValueError(f"{self.name} must return finite numbers, got NaN or infinity")
        return found


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """Tensors that a model makes on the way are of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating point tensors of an output, however it is nested."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def image(size: int = 32, channels: int = 3) -> Callable[[], tuple[Tensor]]:
    """Two square images, as the first argument."""
    return lambda: (torch.randn(2, channels, size, size),)
