"""A model of a thousand layers: adapting, switching, saving and loading, each beside the floor that it stands on.

``pytest benchmarks/test_models.py --benchmark-only --benchmark-json=FILE`` writes the numbers.
"""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn

from fused_lora import LoRAConfig, add_adapter, apply_lora, disable_adapters, load_adapter, save_adapter, set_adapter
from fused_lora.adapter import AdapterOptions, LoRAAdapter
from fused_lora.checkpoint import WEIGHTS_FILE

LAYERS, WIDTH, RANK = 1000, 512, 16


def model() -> nn.Module:
    """Blocks of four named layers, as a transformer has them."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    linear = nn.Linear(WIDTH, WIDTH, bias=False)
    with torch.no_grad():
        blocks = [nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in names}) for _ in range(LAYERS // 4)]
        for block in blocks:
            for layer in block.values():
                layer.in_features, layer.out_features = WIDTH, WIDTH  # type: ignore[assignment]
                # one storage for all: what is measured is not the base's size
                layer.weight = nn.Parameter(linear.weight.data)
    return nn.ModuleList(blocks)


def adapted() -> nn.Module:
    base = apply_lora(model(), rank=RANK, adapter="one")
    return add_adapter(base, "two", LoRAConfig(rank=RANK))


def allocate() -> list[LoRAAdapter]:
    """A and B of every layer, and nothing else."""
    linear = nn.Linear(WIDTH, WIDTH, bias=False)
    options = AdapterOptions(rank=RANK)
    return [LoRAAdapter.beside(linear, options) for _ in range(LAYERS)]


@pytest.mark.benchmark(group="adapt 1,000 layers")
@pytest.mark.parametrize("what", ["allocation alone", "all-linear", "1,000 names", "a rank for each layer"])
def test_apply(benchmark, what):
    if what == "allocation alone":
        benchmark.pedantic(allocate, rounds=5)
        return
    paths = [path for path, module in model().named_modules() if isinstance(module, nn.Linear)]
    fields = {
        "all-linear": {},
        "1,000 names": {"target_modules": paths},
        "a rank for each layer": {"rank_pattern": {f"^{path}": RANK for path in paths}},
    }[what]
    benchmark.pedantic(lambda base: apply_lora(base, rank=RANK, **fields), setup=lambda: ((model(),), {}), rounds=5)


@pytest.mark.benchmark(group="switch 1,000 layers")
@pytest.mark.parametrize("what", ["a walk over the modules", "set_adapter", "two at once", "disable_adapters"])
def test_switch(benchmark, what):
    base = adapted()

    def disable() -> None:
        with disable_adapters(base):
            pass

    calls = {
        "a walk over the modules": lambda: list(base.named_modules()),
        "set_adapter": lambda: (set_adapter(base, "two"), set_adapter(base, "one")),
        "two at once": lambda: (set_adapter(base, ["one", "two"]), set_adapter(base, "one")),
        "disable_adapters": disable,
    }
    benchmark(calls[what])


@pytest.mark.benchmark(group="save 1,000 layers")
@pytest.mark.parametrize("what", ["the bytes alone, to the disk", "save_adapter"])
def test_save(benchmark, what, tmp_path):
    base = adapted()
    save_adapter(base, tmp_path, "one")
    tensors = load_file(tmp_path / WEIGHTS_FILE)

    def write() -> None:
        with open(tmp_path / "raw", "wb") as file:
            file.write(save(tensors))
            file.flush()
            os.fsync(file.fileno())

    benchmark.pedantic(write if what != "save_adapter" else lambda: save_adapter(base, tmp_path, "one"), rounds=7)


@pytest.mark.benchmark(group="load 1,000 layers")
@pytest.mark.parametrize("what", ["the bytes alone, from the disk", "load_adapter"])
def test_load(benchmark, what, tmp_path):
    save_adapter(adapted(), tmp_path, "one")
    if what != "load_adapter":
        # copied, as a file that is mapped only has been read from no disk and may change
        benchmark.pedantic(lambda: [t.clone() for t in load_file(tmp_path / WEIGHTS_FILE).values()], rounds=7)
        return
    benchmark.pedantic(lambda base: load_adapter(base, tmp_path), setup=lambda: ((model(),), {}), rounds=7)
