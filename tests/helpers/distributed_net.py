"""The network of the distributed checks, its training in one process, and the list of checks."""

import re

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from fused_lora import apply_lora
from fused_lora.models.apply import lora_layers

CHECKS = {}
STEPS, BATCH, TOKENS, WIDTH, HIDDEN = 3, 8, 5, 64, 96
TP = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}


def check(*worlds):
    """Register a check for process groups of these sizes."""

    def register(function):
        for world in worlds:
            CHECKS.setdefault(world, []).append(function)
        return function

    return register


class Block(nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.checkpointed = checkpointed

    def forward(self, x):
        return checkpoint(self.compute, x, use_reentrant=False) if self.checkpointed else self.compute(x)

    def compute(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, checkpointed=False):
        super().__init__()
        self.blocks = nn.ModuleList([Block(checkpointed), Block(checkpointed)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def adapted(dropout=0.0, checkpointed=False, dtype=torch.float32, **fields):
    """The same network in every rank, B not zero, so that every gradient counts."""
    torch.manual_seed(1)
    net = apply_lora(Net(checkpointed), rank=4, alpha=6, dropout=dropout, **fields)
    with torch.no_grad():
        for _, layer in lora_layers(net):
            layer.lora_B.normal_(std=0.3)
    return net.to(dtype)


def data(step):
    generator = torch.Generator().manual_seed(100 + step)
    return (torch.randn(BATCH, TOKENS, WIDTH, generator=generator) for _ in range(2))


def train(net, call=None, part=slice(None), dtype=torch.float32, after=lambda: None):
    """STEPS of SGD on this part of each batch; the trained values, whole and flat."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    for step in range(STEPS):
        x, target = (tensor[part].to(dtype) for tensor in data(step))
        F.mse_loss((net if call is None else call)(x).to(torch.promote_types(dtype, torch.float32)), target).backward()
        after()
        optimizer.step()
        optimizer.zero_grad()
    return values(net)


def values(net):
    return torch.cat([whole(p).detach().flatten() for p in net.parameters() if p.requires_grad])


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mine():
    share = BATCH // dist.get_world_size()
    return slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)


def in_one_process(dtype, **fields):
    return train(adapted(dtype=dtype, **fields), dtype=dtype)


def within_budget(got, **fields):
    oracle.within("A and B", got, in_one_process(torch.float32, **fields), in_one_process(torch.float64, **fields))


def raises(error, part, call):
    with pytest.raises(error, match=re.escape(part)):
        call()
