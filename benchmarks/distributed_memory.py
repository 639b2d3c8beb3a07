"""Bytes that each rank holds while it fine-tunes, for every strategy of examples/train_distributed.py.

    torchrun --nproc-per-node 4 benchmarks/distributed_memory.py [--out FILE]

On the CPU: what a tensor weighs does not depend on the device. Counted are the parameters, gradients and optimizer
state that a rank keeps between steps; measured, by PyTorch's profiler, is the most that its allocator had out at once
during a step, above that: activations, and weights gathered on the way, of which there may be more or fewer at once
from step to step.
Default FILE: benchmarks/results/distributed/<device>-<date>.json.
"""

from __future__ import annotations

import argparse
import runpy
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fused_lora import apply_lora, lora_parameters
from fused_lora.bench.measure import peak_bytes
from fused_lora.bench.results import Environment, ResultsFile, Row, Spread, default_path
from fused_lora.bench.shapes import TRAIN

ROOT = Path(__file__).parents[1]
WIDTH, DEPTH, TOKENS, RANK = 512, 4, 512, 16
STEPS = 20


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def size(tensors: Iterable[Tensor | None]) -> int:
    """Of this rank's storages, each once."""
    storages = {s.data_ptr(): s.nbytes() for t in tensors if t is not None for s in (local(t).untyped_storage(),)}
    return sum(storages.values())


def measure(strategy: str, example: dict) -> tuple[dict[str, int], list[int]]:
    """What this rank keeps, and the peaks of its steps."""
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
    kept = {
        "frozen_bytes": size(p for p in net.parameters() if not p.requires_grad),
        "adapters_bytes": size(trained),
        "gradients_bytes": size(p.grad for p in trained),
        "optimizer_bytes": size(t for s in optimizer.state.values() for t in s.values() if t.dim() > 0),
    }
    return kept, [peak_bytes(step, torch.device("cpu")) for _ in range(STEPS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    example = runpy.run_path(str(ROOT / "examples" / "train_distributed.py"))
    environment = Environment.here(torch.device("cpu"))
    command = f"torchrun --nproc-per-node {dist.get_world_size()} benchmarks/distributed_memory.py"
    file = ResultsFile("distributed", command, environment, settings={"ranks": dist.get_world_size()})
    shape = f"{DEPTH} blocks {WIDTH}→{4 * WIDTH}→{WIDTH}, {TOKENS} tokens, rank {RANK}"
    for strategy in example["STRATEGIES"]:
        every: list[tuple[dict[str, int], list[int]]] = [({}, [])] * dist.get_world_size()
        dist.all_gather_object(every, measure(strategy, example))
        # the rank that needs the most
        kept, peaks = zip(*every, strict=True)
        most = {key: max(one[key] for one in kept) for key in kept[0]}
        spread = vars(Spread.of(map(max, zip(*peaks, strict=True))))
        file.rows.append(Row(TRAIN, shape, "float32", strategy, STEPS, **spread, unit="bytes", extra=most))
        if dist.get_rank() == 0:
            print(file.rows[-1].as_json(), flush=True)
    if dist.get_rank() == 0:
        out = args.out or default_path("distributed", environment)
        file.save(out)
        print(f"saved: {out}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
