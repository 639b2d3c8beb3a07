"""torchao's quantized tensors, as the weight of a plain ``nn.Linear``: int8, float8, and integers of few bits."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .kind import Kind, Packed, Recipe

# what torchao does to x in its own products
_OF_X = ("act_quant_kwargs", "act_quant_scale", "act_pre_scale", "activation_quantization")


class TorchAO(Kind):
    name = "torchao"
    library = "torchao"
    at_least = (0, 18)

    def holds(self, layer: nn.Module) -> bool:
        return type(layer) is nn.Linear and is_torchao(layer._parameters.get("weight"))

    def why_not(self, layer: Any) -> str | None:
        weight = layer.weight
        if not hasattr(weight, "dequantize"):
            return f"its weight must be one that torchao dequantizes, got {type(weight).__name__}"
        changed = next((name for name in _OF_X if getattr(weight, name, None) is not None), None)
        if changed is not None:
            return f"its weight must be quantized alone, got one that changes x too ({changed})"
        return self.problem()

    def tell(self, layer: Any) -> str:
        weight = layer.weight
        stored = getattr(weight, "target_dtype", None) or getattr(getattr(weight, "qdata", None), "dtype", None)
        return type(weight).__name__ if stored is None else str(stored).removeprefix("torch.")

    def own_dtype(self, layer: Any) -> torch.dtype:
        return layer.weight.dtype

    def packed(self, layer: Any) -> Packed:
        return Packed((self.name,), (layer.weight,))

    def dequantize(self, recipe: Recipe, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        weight: Any = tensors[0]
        return weight.dequantize().to(dtype)

    def requantize(self, layer: Any, value: Tensor) -> nn.Parameter:
        old = layer.weight
        again = _AGAIN.get(type(old).__name__)
        if again is None:
            raise ValueError(
                f"a weight to merge into must be {', '.join(_AGAIN)}, or not torchao's, got {type(old).__name__}; "
                "merge_and_unload(model, dequantize=True) merges into plain weights"
            )
        return nn.Parameter(again(old, value.to(old.dtype)), requires_grad=False)


def is_torchao(weight: Any) -> bool:
    """Whether it is a tensor of torchao's."""
    return type(weight).__module__.split(".")[0] == "torchao"


def _granularity(weight: Any) -> Any:
    api: Any = importlib.import_module("torchao.quantization")
    if list(weight.block_size) == [1, weight.shape[-1]]:
        return api.PerRow()
    if list(weight.block_size) == list(weight.shape):
        return api.PerTensor()
    raise ValueError(f"a weight to merge into must have one scale a row or one in all, got blocks {weight.block_size}")


def _int8(old: Any, value: Tensor) -> Tensor:
    return type(old).from_hp(
        value, _granularity(old), act_quant_kwargs=old.act_quant_kwargs, reduce_range=old.reduce_range
    )


def _float8(old: Any, value: Tensor) -> Tensor:
    return type(old).from_hp(
        value, float8_dtype=old.qdata.dtype, granularity=_granularity(old), mm_config=old.mm_config,
        kernel_preference=old.kernel_preference, act_quant_kwargs=old.act_quant_kwargs,
    )  # fmt: skip


def _intx(old: Any, value: Tensor) -> Tensor:
    return type(old).from_hp(
        value, old.block_size, old.target_dtype, activation_quantization=old.activation_quantization
    )


# how a tensor's class quantizes a value as one of its tensors was
_AGAIN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "Int8Tensor": _int8, "Float8Tensor": _float8, "IntxUnpackedToInt8Tensor": _intx,
}  # fmt: skip
