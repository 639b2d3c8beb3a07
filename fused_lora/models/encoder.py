"""``nn.TransformerEncoder``: its fast paths read the weights of its layers without calling their ``forward``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..quantized import kind_of
from ..switching import Adapted

# what takes a module's fast path: "activation_relu_or_gelu" is 1 or 2 for the activations that the fast path knows
_SWITCHES: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    # packs padded input into a NestedTensor, which only the fast path of its layers can read
    nn.TransformerEncoder: "use_nested_tensor",
}


def needs_forward(module: nn.Module) -> bool:
    """Whether the module's weight alone does not say what it computes."""
    return (isinstance(module, Adapted) and len(module.adapters) > 0) or kind_of(module) is not None


def settle_fast_paths(model: nn.Module, is_called: Callable[[nn.Module], bool] = needs_forward) -> None:
    """Keep encoders and their layers off the fast paths where ``is_called`` of a module in them, and others on."""
    for module in model.modules():
        switch = next((name for kind, name in _SWITCHES.items() if isinstance(module, kind)), None)
        if switch is None:
            continue
        state: dict[str, Any] = vars(module)
        kept = f"_{switch}_before_adapters"
        if any(is_called(inner) for inner in module.modules()):
            if state.get(switch):
                state[kept], state[switch] = state[switch], type(state[switch])(0)
        elif kept in state:
            state[switch] = state.pop(kept)
