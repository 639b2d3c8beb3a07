"""A LoRA layer in one kernel: ``FusedLoRALinear`` and what goes around it. Importing this imports no Triton."""

from .checkpoint import base_state_dict, hotswap_adapter, load_adapter, save_adapter
from .functional import lora_linear
from .layer import FusedLoRALinear
from .models.apply import (
    add_adapter,
    add_weighted_adapter,
    apply_lora,
    delete_adapter,
    disable_adapters,
    lora_parameters,
    set_adapter,
    set_impl,
)
from .models.config import LoRAConfig
from .models.merging import merge, merge_and_unload, unmerge
from .models.overview import summary
from .models.quantizing import quantize_base

__version__ = "0.1.0"

__all__ = [
    "FusedLoRALinear",
    "LoRAConfig",
    "add_adapter",
    "add_weighted_adapter",
    "apply_lora",
    "base_state_dict",
    "delete_adapter",
    "disable_adapters",
    "hotswap_adapter",
    "load_adapter",
    "lora_linear",
    "lora_parameters",
    "merge",
    "merge_and_unload",
    "quantize_base",
    "save_adapter",
    "set_adapter",
    "set_impl",
    "summary",
    "unmerge",
]
