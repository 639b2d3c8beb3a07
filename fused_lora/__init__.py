"""A LoRA layer in one kernel: ``FusedLoRALinear`` and what goes around it. Importing this imports no Triton."""

import sys

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

# names that other LoRA libraries have, and what does it here
_ELSEWHERE = {
    "LoraConfig": "LoRAConfig is the name here; functions take PEFT's LoraConfig too",
    "PeftModel": "load_adapter(model, folder) reads its folders; PEFT models are for fused_lora.integrations.peft.fuse",
    "fuse": "it is fused_lora.integrations.peft.fuse, and needs PEFT",
    "get_peft_model": "apply_lora(model) adapts in place; PEFT models are for fused_lora.integrations.peft.fuse",
    "lora_state_dict": "save_adapter(model, folder) writes A and B",
    "mark_only_lora_as_trainable": "apply_lora freezes the rest",
    "prepare_model_for_kbit_training": 'quantize_base(model, "nf4") keeps the base in four bits',
    "print_trainable_parameters": "print(summary(model))",
    "save_pretrained": "save_adapter(model, folder)",
    "unfuse": "it is fused_lora.integrations.peft.unfuse, and needs PEFT",
}


def __getattr__(name: str) -> object:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module 'fused_lora' has no attribute {name!r}")
    # an import statement would drop an AttributeError's message
    imported = sys._getframe(1).f_globals.get("__name__") == "importlib._bootstrap"
    kind = ImportError if imported else AttributeError
    raise kind(f"fused_lora has no {name!r}; {_ELSEWHERE[name]}")
