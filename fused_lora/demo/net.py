"""The network of the demo, and how it is trained and read."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = ("linear1", "linear2", "linear3")


class RichBoyNet(nn.Module):
    """784 -> 1000 -> 2000 -> 10 with ReLU between: far more parameters than MNIST needs, which is the point.

    Source: https://github.com/hkproj/pytorch-lora
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(784, 1000)
        self.linear2 = nn.Linear(1000, 2000)
        self.linear3 = nn.Linear(2000, 10)

    def linears(self) -> dict[str, nn.Linear]:
        return dict(zip(LAYERS, (self.linear1, self.linear2, self.linear3), strict=True))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (M, 10) of normalised images (M, 784)."""
        hidden = F.relu(self.linear1(images))
        hidden = F.relu(self.linear2(hidden))
        return self.linear3(hidden)


class Trainer:
    """One optimizer step at a time: cross entropy, fused Adam at a learning rate of 1e-3."""

    def __init__(self, net: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        self.net = net
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)

    def step(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.net(images), labels).backward()
        self.optimizer.step()


@torch.no_grad()
def logits_of(net: nn.Module, images: Tensor) -> Tensor:
    """All logits in one batch, so that equal networks give equal bits."""
    return net(images)
