"""A small model with two trained adapters."""

import torch
from torch import nn

from fused_lora import LoRAConfig, add_adapter, apply_lora

X = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))


def trained(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


def two(**second):
    """A model with "cats" (rank 2) and "dogs" (rank 3, another scale), both trained, "cats" active."""
    model = apply_lora(net(), rank=2, adapter="cats")
    add_adapter(model, "dogs", LoRAConfig(rank=3, alpha=5, **second))
    return trained(model)
