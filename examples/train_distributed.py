"""Fine-tune adapters on many GPUs, or on many CPU processes, and go on after a crash.

    torchrun --nproc-per-node 2 --max-restarts 3 examples/train_distributed.py --strategy fsdp --out run

Strategies: ddp, fsdp (``fully_shard``), tp (tensor parallel), fsdp+tp (a mesh of two dimensions). The base is frozen,
so a checkpoint is A, B and the optimizer's state alone: ``torch.distributed.checkpoint`` writes it every few steps,
from any strategy and for any other. When a process dies, torchrun starts all of them anew, and they go on from the last
checkpoint; the data of a step depend on its number alone, so the run ends where it would have ended.

docs/distributed.md says which strategy to use when.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fused_lora import apply_lora, lora_parameters, save_adapter
from fused_lora.parallel.tensor_parallel import tensor_parallel_plan

STRATEGIES = ("ddp", "fsdp", "tp", "fsdp+tp")
PLAN = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def join(backend: str) -> None:
    """Enter the process group that torchrun has prepared."""
    store, rank, world = next(dist.rendezvous("env://"))
    # torchrun may keep one store through a restart, with the addresses of processes that are no more
    store = dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def spread(net: nn.Module, strategy: str, device: str) -> tuple[nn.Module, int, int]:
    """The network that is called, and this rank's place among how many parts of the batch."""
    world = dist.get_world_size()
    if strategy == "ddp":
        return DistributedDataParallel(net, gradient_as_bucket_view=True), dist.get_rank(), world
    tensor = {"fsdp": 1, "tp": world, "fsdp+tp": 2}[strategy]
    mesh = init_device_mesh(device, (world // tensor, tensor), mesh_dim_names=("data", "tensor"))
    if tensor > 1:
        parallelize_module(net, mesh["tensor"], tensor_parallel_plan(PLAN))
    if strategy != "tp":
        shard(net, mesh["data"], device)
    return net, mesh["data"].get_local_rank(), mesh["data"].size()


def shard(net: nn.Module, mesh: DeviceMesh, device: str) -> None:
    # 16 bits on the way and in the products, float32 for what is trained
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = low if device == "cuda" else MixedPrecisionPolicy()
    for block in net.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(net, mesh=mesh, mp_policy=policy)


def batch(step: int, width: int, target: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """Of this step alone, whole: a task that a change of low rank solves."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, width, generator=generator)
    return x.to(device), (x + x @ target).to(device)


class Checkpoints:
    """Of A, B and the optimizer, one folder a step; a folder counts once its metadata are there, which come last."""

    def __init__(self, out: Path, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.out, self.net, self.optimizer = out, net, optimizer

    def _state(self) -> dict[str, object]:
        model, optimizer = get_state_dict(self.net, self.optimizer, options=TRAINED)
        return {"model": model, "optimizer": optimizer}

    def save(self, step: int) -> None:
        dcp.save(self._state(), checkpoint_id=self.out / f"step-{step}")

    def resume(self) -> int:
        """The step to go on from; 0 where there is nothing yet."""
        steps = [int(file.parent.name.removeprefix("step-")) for file in self.out.glob("step-*/.metadata")]
        if not steps:
            return 0
        state = self._state()
        dcp.load(state, checkpoint_id=self.out / f"step-{max(steps)}")
        set_state_dict(
            self.net, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
            options=TRAINED,
        )  # fmt: skip
        return max(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--rank", type=int, default=4, help="of the adapters")
    parser.add_argument("--out", type=Path, required=True, help="checkpoints, and the adapter in the end")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    join("nccl" if device == "cuda" else "gloo")
    rank = dist.get_rank()

    # the same weights in every process; a real base would be read from its checkpoint here
    torch.manual_seed(0)
    net = apply_lora(Net(args.width, args.depth), rank=args.rank, dropout=0.0).to(device)
    target = torch.randn(args.width, 2) @ torch.randn(2, args.width) / args.width
    model, part, parts = spread(net, args.strategy, device)
    optimizer = torch.optim.AdamW(lora_parameters(net), lr=1e-2)
    checkpoints = Checkpoints(args.out, net, optimizer)
    done = checkpoints.resume()
    print(f"rank {rank} pid {os.getpid()} from step {done}", flush=True)

    for step in range(done, args.steps):
        x, y = (whole.chunk(parts)[part] for whole in batch(step, args.width, target, device))
        loss = F.mse_loss(model(x).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            checkpoints.save(step + 1)
            if rank == 0:
                print(f"step {step + 1} loss {loss.item():.4f}", flush=True)

    # plain values in every rank under DDP, shards else: then all must come, and one writes
    if args.strategy != "ddp" or rank == 0:
        save_adapter(net, args.out / "adapter")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
