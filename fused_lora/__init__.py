"""A LoRA layer in one kernel: ``FusedLoRALinear`` and what goes around it. Importing this imports no Triton."""

from .adapters import load_adapter, save_adapter
from .config import LoRAConfig
from .functional import lora_linear
from .layer import FusedLoRALinear
from .model import (
    add_adapter,
    apply_lora,
    delete_adapter,
    disable_adapters,
    lora_parameters,
    merge,
    merge_and_unload,
    set_adapter,
    unmerge,
)
from .overview import summary

__version__ = "0.1.0"

__all__ = [
    "FusedLoRALinear",
    "LoRAConfig",
    "add_adapter",
    "apply_lora",
    "delete_adapter",
    "disable_adapters",
    "load_adapter",
    "lora_linear",
    "lora_parameters",
    "merge",
    "merge_and_unload",
    "save_adapter",
    "set_adapter",
    "summary",
    "unmerge",
]
