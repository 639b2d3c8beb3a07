"""torch.nn's own modules: attention, transformers and recurrent layers, with linear layers around them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import Entry


class Attention(nn.Module):
    """An nn.MultiheadAttention between two linear layers; it reads its out_proj's weight by name."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(16, 32), nn.Linear(32, 5)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.after(x + self.attention(x, x, x, need_weights=False)[0])


class Recurrent(nn.Module):
    """A recurrent layer, whose weights are no linear layer's, under a linear head."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.recurrent, self.head = kind(16, 32, num_layers=2, batch_first=True), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0])


class Cells(nn.Module):
    """A recurrent cell in a loop, and the linear layers that it is between, called at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.cell, self.after = nn.Linear(16, 24), nn.GRUCell(24, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 32)
        steps = []
        for t in range(x.shape[1]):
            state = self.cell(torch.tanh(self.before(x[:, t])), state)
            steps.append(self.after(state))
        return torch.stack(steps, 1)


class Pairs(nn.Module):
    """nn.Bilinear over what two linear layers make of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(16, 12), nn.Linear(16, 8)
        self.pair, self.head = nn.Bilinear(12, 8, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.pair(self.left(x), self.right(x))))


class ByName(nn.Module):
    """One linear layer called, the other's weight read by name: nothing that is put beside it can act."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(16, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.called(x)), self.read.weight, self.read.bias)


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(11, 16), nn.Linear(16, 16), nn.Linear(16, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, i: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(i))))


class Convolutions(nn.Sequential):
    """Convolutions with a linear head."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 7 * 7, 24),
            nn.ReLU(), nn.Linear(24, 5),
        )  # fmt: skip


def _layer(kind: Any, **options: Any) -> Any:
    return kind(32, 4, dim_feedforward=48, batch_first=True, **options)


def sequence() -> tuple[Tensor]:
    return (torch.randn(2, 7, 16),)


def wide() -> tuple[Tensor]:
    return (torch.randn(2, 7, 32),)


def two() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 7, 32), torch.randn(2, 5, 32)


def padded() -> dict[str, Tensor]:
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[1, 5:] = True
    return {"src": torch.randn(2, 7, 32), "src_key_padding_mask": mask}


PADDED = {"merged": "without adapters the encoder takes its fast path, which sets padded rows to zero"}
TIED = {"merged": "merging into a weight that two modules share is refused"}

MODELS = [
    Entry("Sequential of Linears", "torch.nn", "perceptron",
          lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 5)),
          sequence),
    Entry("TransformerEncoder", "torch.nn", "attention",
          lambda: nn.TransformerEncoder(_layer(nn.TransformerEncoderLayer), 2), wide),
    Entry("TransformerEncoder, norm first", "torch.nn", "attention",
          lambda: nn.TransformerEncoder(_layer(nn.TransformerEncoderLayer, norm_first=True, activation="gelu"), 2,
                                        enable_nested_tensor=False), wide),
    Entry("TransformerEncoder, padding mask", "torch.nn", "attention",
          lambda: nn.TransformerEncoder(_layer(nn.TransformerEncoderLayer), 2), padded, known=PADDED),
    Entry("TransformerDecoder", "torch.nn", "attention",
          lambda: nn.TransformerDecoder(_layer(nn.TransformerDecoderLayer), 2), two),
    Entry("Transformer", "torch.nn", "attention",
          lambda: nn.Transformer(32, 4, 2, 2, dim_feedforward=48, batch_first=True), two),
    Entry("MultiheadAttention", "torch.nn", "attention", Attention, sequence),
    Entry("LSTM and a head", "torch.nn", "recurrent", lambda: Recurrent(nn.LSTM), sequence),
    Entry("GRU and a head", "torch.nn", "recurrent", lambda: Recurrent(nn.GRU), sequence),
    Entry("GRUCell in a loop", "torch.nn", "recurrent", Cells, sequence),
    Entry("Bilinear", "torch.nn", "pairs", Pairs, sequence),
    Entry("Conv2d and a head", "torch.nn", "images", Convolutions, lambda: (torch.randn(2, 3, 16, 16),)),
    Entry("A weight read by name", "torch.nn", "other reads", ByName, sequence),
    Entry("A tied head", "torch.nn", "other reads", Tied, lambda: (torch.arange(11),), known=TIED),
]  # fmt: skip
