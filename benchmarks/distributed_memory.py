"""Bytes that each rank holds while it fine-tunes, for every strategy of examples/train_distributed.py.

    torchrun --nproc-per-node 4 benchmarks/distributed_memory.py [--out FILE]

On the CPU: what a tensor weighs does not depend on the device. Counted are the parameters, gradients and optimizer
state that a rank keeps between steps; measured, by PyTorch's profiler, is the most that its allocator had out at once
during a step, above that: activations, and weights gathered on the way.
Default FILE: benchmarks/results/torch/distributed-memory-<ranks>.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import runpy
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fused_lora import apply_lora, lora_parameters
from fused_lora.bench.measure import peak_bytes
from fused_lora.bench.results import Environment

ROOT = Path(__file__).parents[1]
WIDTH, DEPTH, TOKENS, RANK = 512, 4, 512, 16


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def size(tensors: Iterable[Tensor | None]) -> int:
    """Of this rank's storages, each once."""
    storages = {s.data_ptr(): s.nbytes() for t in tensors if t is not None for s in (local(t).untyped_storage(),)}
    return sum(storages.values())


def measure(strategy: str, example: dict) -> dict[str, int]:
    torch.manual_seed(0)
    net = apply_lora(example["Net"](WIDTH, DEPTH), rank=RANK)
    model, part, parts = example["spread"](net, strategy, "cpu")
    trained = lora_parameters(net)
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    x = torch.randn(TOKENS, WIDTH).chunk(parts)[part].clone()

    def step() -> None:
        F.mse_loss(model(x), x).backward()
        optimizer.step()

    step()
    return {
        "frozen": size(p for p in net.parameters() if not p.requires_grad),
        "adapters": size(trained),
        "gradients": size(p.grad for p in trained),
        "optimizer": size(t for s in optimizer.state.values() for t in s.values() if t.dim() > 0),
        "peak of a step": peak_bytes(step, torch.device("cpu")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    example = runpy.run_path(str(ROOT / "examples" / "train_distributed.py"))
    rows = []
    for strategy in example["STRATEGIES"]:
        mine = measure(strategy, example)
        every: list[dict[str, int]] = [{}] * dist.get_world_size()
        dist.all_gather_object(every, mine)
        # the rank that needs the most
        rows.append({"strategy": strategy, **{key: max(one[key] for one in every) for key in mine}})
        if dist.get_rank() == 0:
            print(rows[-1], flush=True)
    if dist.get_rank() == 0:
        what = {"ranks": dist.get_world_size(), "width": WIDTH, "depth": DEPTH, "tokens": TOKENS, "rank": RANK}
        environment = dataclasses.asdict(Environment.here(torch.device("cpu")))
        out = args.out or ROOT / "benchmarks" / "results" / "torch" / f"distributed-memory-{what['ranks']}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"environment": environment, "model": what, "rows": rows}, indent=1) + "\n")
        print(f"saved: {out}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
