"""A small model, and every way of training more of it than A and B."""

import torch
from torch import nn

from fused_lora import lora_parameters

X = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 16)
        self.head = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 5, bias=False))

    def forward(self, x):
        return self.head(self.fc2(self.norm(self.fc1(x))))


def net():
    torch.manual_seed(3)
    return Net().eval()


def shaken(model):
    """Every trained parameter moved, as training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


WAYS = {
    "head": {"modules_to_save": ["head"], "target_modules": ["fc1", "fc2"]},
    "norm": {"modules_to_save": ["norm"]},
    "lora_only": {"bias": "lora_only"},
    "all biases": {"bias": "all", "target_modules": ["fc1"]},
    "head and all biases": {"bias": "all", "modules_to_save": ["head"], "target_modules": ["fc2"]},
}
