"""A whole training step of PEFT's own model and of the same model fused, in turn: time, and memory for the backward.

``--peft-results FILE`` writes what was measured. Both are checked against float64 before they are timed.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from fused_lora.bench import measure
from fused_lora.bench.baselines import PEFT
from fused_lora.bench.results import Environment, ResultsFile, Row
from fused_lora.bench.shapes import TRAIN
from fused_lora.demo.net import LAYERS, RichBoyNet
from fused_lora.integrations.peft import fuse, summary, unfuse

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CANDIDATES = (PEFT, "fused")
BATCH, TOKENS = 8, 64


class MiniLM(nn.Module):
    """BERT of all-MiniLM-L6-v2's sizes, random, with a classifier on its mean."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(384, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.bert(tokens).last_hidden_state.mean(1))


@dataclass(frozen=True)
class PeftModel:
    """r and lora_dropout are PEFT's; adapters are float32, as PEFT makes them."""

    model: str
    dtype: str
    dropout: float
    r: int

    def __str__(self) -> str:
        return f"{self.model}, rank {self.r}, dropout {self.dropout}"

    def make(self) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        if self.model == "RichBoyNet":
            net, x, targets = RichBoyNet(), torch.randn(10, 784), list(LAYERS)
        else:
            net, x, targets = MiniLM(), torch.randint(1000, (BATCH, TOKENS)), ["query", "key", "value", "dense"]
        dtype = getattr(torch, self.dtype)
        config = LoraConfig(r=self.r, target_modules=targets, lora_dropout=self.dropout, init_lora_weights=False)
        model = get_peft_model(net.to(dtype), config).to(DEVICE)
        # adapters that leave the activations of order one
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(0.1)
        return model, x.to(DEVICE, dtype if x.is_floating_point() else None)


MODELS = [
    PeftModel("RichBoyNet", "float32", 0.0, 1),
    PeftModel("RichBoyNet", "float32", 0.1, 1),
    PeftModel("MiniLM", "float32", 0.0, 8),
    PeftModel("MiniLM", "float32", 0.1, 8),
    PeftModel("MiniLM", "bfloat16", 0.0, 8),
    PeftModel("MiniLM", "bfloat16", 0.1, 8),
]


def _step(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Forward, cross entropy, backward and AdamW on what is trained."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    labels = torch.arange(len(x), device=DEVICE) % 10

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _check(fused: nn.Module, x: Tensor) -> None:
    """The loss and every gradient, without dropout: at most twice the error of PEFT's all in the base's dtype."""
    dtype = next(p.dtype for p in fused.parameters() if not p.requires_grad)
    found = {}
    for name, model, value in (
        ("fused", fused, x),
        ("low", unfuse(copy.deepcopy(fused)).to(dtype), x),
        ("exact", unfuse(copy.deepcopy(fused)).double(), x.double() if x.is_floating_point() else x),
    ):
        model.eval()
        loss = _step(model, value)()
        found[name] = [loss, *(p.grad for p in model.parameters() if p.grad is not None)]
        model.zero_grad()
        model.train()
    for got, low, exact in zip(found["fused"], found["low"], found["exact"], strict=True):
        allowed = 2 * (low.double() - exact).abs().max() + torch.finfo(dtype).eps / 2 * exact.abs().max()
        assert (got.double() - exact).abs().max() <= allowed


@functools.lru_cache(maxsize=1)
def measured(made: PeftModel, quick: bool) -> tuple[dict[str, Callable[[], Any]], list[Row]]:
    peft, x = made.make()
    fused = fuse(copy.deepcopy(peft))
    _check(fused, x)
    calls = {"peft": _step(peft, x), "fused": _step(fused, x)}
    saved = {
        name: measure.saved_bytes(functools.partial(model, x), model.parameters())
        for name, model in (("peft", peft), ("fused", fused))
    }
    found = measure.interleave(calls, measure.timer_for(DEVICE), measure.plan_for(DEVICE, quick))
    implementation = summary(fused).layers[0].implementation
    rows = [
        Row(
            TRAIN, f"{made}, {implementation}", made.dtype, name, len(found.samples[name]), **vars(found.time(name)),
            impl=implementation if name == "fused" else None, ratios={PEFT: found.ratio(name, PEFT)},
            saved_bytes=saved[name],
        )
        for name in CANDIDATES
    ]  # fmt: skip
    return calls, rows


@pytest.mark.benchmark(max_time=0.2)
@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("made", MODELS, ids=lambda made: f"{made} {made.dtype}")
def test_training_step(benchmark, request, made, name):
    calls, rows = measured(made, request.config.getoption("--quick"))
    row = rows[CANDIDATES.index(name)]
    benchmark.group = f"{row.shape}  {row.dtype}"
    benchmark.extra_info.update(row.as_json())
    benchmark(calls[name])
    path = request.config.getoption("--peft-results")
    if path is not None:
        # as it comes: an interrupted run leaves what it measured
        command = "pytest benchmarks/test_peft.py --peft-results FILE"
        file = ResultsFile.open(path, "peft", command, Environment.here(DEVICE))
        file.add(rows)
        file.save(path)
