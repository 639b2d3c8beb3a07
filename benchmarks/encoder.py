"""An encoder that several benchmarks time."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BertConfig, BertModel


class Encoder(nn.Module):
    """BERT of MiniLM's sizes, from embeddings on, without its own dropout."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        config = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bert(inputs_embeds=x).last_hidden_state
