"""``nn.TransformerEncoderLayer``: its fast path reads the weights of its modules past their forward."""

from __future__ import annotations

from torch import nn

from ..quantized import kind_of
from ..switching import adapted_modules

_BEFORE = "_activation_before_adapters"


def settle_fast_paths(model: nn.Module) -> None:
    """Keep the encoder layers that hold adapters, or quantized weights, off their fast path, others on it."""
    for layer in model.modules():
        if not isinstance(layer, nn.TransformerEncoderLayer):
            continue
        adapted = any(len(module.adapters) for _, module in adapted_modules(layer))
        adapted = adapted or any(kind_of(module) is not None for module in layer.modules())
        # it is taken with the activations that these numbers stand for, and 0 stands for none
        if adapted and layer.activation_relu_or_gelu:
            vars(layer).update({_BEFORE: layer.activation_relu_or_gelu, "activation_relu_or_gelu": 0})
        elif not adapted and _BEFORE in vars(layer):
            layer.activation_relu_or_gelu = vars(layer).pop(_BEFORE)
