"""``FusedLoRAQuantized``: a FusedLoRALinear whose frozen weight stays in four or eight bits."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..instances import become
from ..layer import CLASSES, FusedLoRALinear
from ..parameters import holding, made_of
from . import KINDS, Kind, Packed, check, dequantize, kind_of
from .linear import quantized_lora_linear

# what the libraries' layers have beside a plain one's
_CARRIED = (
    "compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "support_avx512bf16_for_cpu",
    "state", "index", "_load_state_dict_pre_hooks",
)  # fmt: skip


class FusedLoRAQuantized(FusedLoRALinear):
    """What a quantized linear layer becomes, in place: its Parameter, its state dict and its own forward stay.

    ``apply_lora`` makes it, and ``FusedLoRALinear.from_linear``. Without an active adapter, switched off or merged, it
    computes by the library's own forward. With one, W is dequantized for the call and again for the backward.
    """

    kind: Kind
    carried = _CARRIED

    def __init__(self, *args: Any, **options: Any) -> None:
        raise TypeError("FusedLoRAQuantized must be made of a quantized layer, by apply_lora or from_linear")

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made as needed, so it is told by those that it was made of
        reduced = super().__reduce_ex__(protocol)
        return _blank, (self.kind.name, self.plain_class), *reduced[2:]

    @property
    def support_avx512bf16_for_cpu(self) -> bool:
        """Never here: for inference on such a CPU bitsandbytes packs the weight anew, and rounds its scales."""
        return False

    @property
    def plain_class(self) -> type[nn.Module]:
        return type(self).__bases__[1]

    @property
    def packed(self) -> Packed:
        """What is kept of the weight, of the merged one where it is merged."""
        return self.kind.packed(self)

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.kind.compute_dtype(self) or torch.float32

    # ---------------------------------------------------------------- computing

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self._called.ever = True
        if self._switch.used and self._switch.off():
            return self._plain(x, *self._base())
        computing = self.active_modules()
        if not computing or self.merged:
            if computing and self.training:
                self.adapters.warn_of_training_merged()
            return self._plain(x, self.weight, self.bias)
        if len(computing) > 1:
            return self._forward_several(x, computing)
        (adapter,) = computing
        if adapter.hooked:
            return self._forward_hooked(x, computing)
        bias = adapter.bias if adapter.trains_bias else self.bias
        return self._with(x, bias, adapter.dropout, adapter.lora_A, adapter.lora_B, adapter.scale)

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        own = weight is self.weight and bias is self.bias
        layer = self if own else self._holding(weight, bias)
        # past ours, to the library's own
        return super(FusedLoRALinear, layer).forward(x)

    def _holding(self, weight: Any, bias: Tensor | None) -> FusedLoRAQuantized:
        layer = holding(self, self.weight, bias)
        self.kind.exchange(layer, weight)
        return layer

    def _with(self, x: Tensor, bias: Tensor | None, dropout: float, A: Tensor, B: Tensor, scale: float) -> Tensor:
        return quantized_lora_linear(
            x, self.packed, A, B, scale, bias, compute_dtype=self.kind.compute_dtype(self),
            dropout_p=dropout, training=self.training, impl=self.impl,
        )  # fmt: skip

    # ---------------------------------------------------------------- merging

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the active adapters into W, which is dequantized, added to and quantized again: that rounds, and warns.

        The weight of before is kept beside it, so ``unmerge`` restores its very bytes.

        Raises:
            ValueError: as :meth:`FusedLoRALinear.merge`, or nothing is known that quantizes such a weight.
        """
        if self.active_adapters and not self.merged:
            warnings.warn(f"merging into a weight of {self.kind.tell(self)} rounds the sum again", stacklevel=2)
        super().merge()

    def _wide(self) -> Tensor:
        return self._dense().float()

    def base_state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        # past ours, to the library's own
        super(FusedLoRALinear, self._holding(*self._base()))._save_to_state_dict(state, "", False)
        return state

    def _dense(self) -> Tensor:
        """The weight in the dtype that it had before it was quantized."""
        return dequantize(self.packed, self.kind.own_dtype(self))

    def _rounded(self, total: Tensor) -> Tensor:
        return total

    def _put(self, weight: Tensor) -> Tensor:
        # a Parameter is one that the layer had; other values are sums
        value = weight if isinstance(weight, nn.Parameter) else self.kind.requantize(self, weight)
        return self.kind.exchange(self, value)

    @torch.no_grad()
    def to_linear(self) -> Any:
        """A plain ``nn.Linear`` that computes what this layer computes now, of the dtype before quantization."""
        bias = None if self.bias is None else self.bias.data.clone()
        value = self._dense()
        if self.active_adapters and not self.merged:
            value, trained_bias = self._sum()
            bias = bias if trained_bias is None else trained_bias
        weight = nn.Parameter(value.to(self.kind.own_dtype(self)))
        return made_of(weight, None if bias is None else nn.Parameter(bias), like=self, kind=nn.Linear)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> None:
        """Turn this layer into a ``FusedLoRALinear`` with the weight in 16 bits, or in ``dtype``; unmerges first.

        Without a dtype it is the one that the weight had before it was quantized (of 8 bits: the bias's, or float16).
        """
        self.unmerge()
        weight = dequantize(self.packed, dtype or self.kind.own_dtype(self))
        # torchao puts an extra_repr on the instance
        for name in {*_CARRIED, "extra_repr"} - set(vars(nn.Module())):
            vars(self).pop(name, None)
        become(self, FusedLoRALinear)
        self._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            self.bias.data = self.bias.data.to(weight.dtype)


@functools.cache
def quantized_class(kind: str, base: Any) -> type[FusedLoRAQuantized]:
    """The class of a layer whose weight is of this kind, and which was a ``base``."""
    members = {"__module__": __name__, "__doc__": FusedLoRAQuantized.__doc__, "kind": KINDS[kind]}
    return type(f"FusedLoRAQuantized{base.__name__}", (FusedLoRAQuantized, base), members)


def _blank(kind: str, base: Any) -> nn.Module:
    """For copying and pickling: a layer whose state is still to come."""
    cls = quantized_class(kind, base)
    return cls.__new__(cls)


def _class_for(linear: nn.Module) -> type[FusedLoRAQuantized] | None:
    kind = kind_of(linear)
    if kind is None:
        return None
    check(linear, type(linear).__name__)
    base: Any = type(linear)
    return quantized_class(kind.name, base)


CLASSES.append(_class_for)
