"""``FusedLoRAConv1D``: a FusedLoRALinear whose weight is (K, N), as GPT-2's linear layers keep theirs."""

from __future__ import annotations

from typing import Any

from torch import nn

from .adapter import is_conv1d
from .layer import CLASSES, FusedLoRALinear


class FusedLoRAConv1D(FusedLoRALinear):
    """A FusedLoRALinear made of a ``transformers.pytorch_utils.Conv1D``, GPT-2's linear layer: its weight stays (K, N).

    ``apply_lora`` makes it, and ``FusedLoRALinear.from_linear``.
    """

    fan_in_fan_out = True

    nx: int
    nf: int

    def __init__(self, *args: Any, **options: Any) -> None:
        raise TypeError("FusedLoRAConv1D must be made of a Conv1D, by apply_lora or from_linear")

    @property
    def in_features(self) -> int:  # type: ignore[override]
        return self.nx

    @property
    def out_features(self) -> int:  # type: ignore[override]
        return self.nf

    @property
    def plain_class(self) -> type[nn.Module]:
        from transformers.pytorch_utils import Conv1D

        return Conv1D


CLASSES.append(lambda linear: FusedLoRAConv1D if is_conv1d(linear) else None)
