"""Tensor parallelism for layers with adapters: styles for ``parallelize_module``. Which rule shards what stands in
``sharding.py``; DDP and ``fully_shard`` need nothing from here (docs/distributed.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from .. import validation
from ..layer import FusedLoRALinear

# the layouts of x and of (weight, lora_A, lora_B, bias)
_COLWISE = Replicate(), (Shard(0), Replicate(), Shard(0), Shard(0))
_ROWWISE = Shard(-1), (Shard(1), Shard(1), Replicate(), Replicate())


def tensor_parallel_plan(plan: Mapping[str, str | ParallelStyle]) -> dict[str, ParallelStyle]:
    """A plan for ``torch.distributed.tensor.parallel.parallelize_module`` that knows layers with adapters.

    plan: module path, ``*`` allowed, to "colwise", "rowwise" or any style. ``ColwiseParallel`` and ``RowwiseParallel``
        keep their layouts of input and output; where they meet a FusedLoRALinear they shard its adapters as its base:
        colwise W and B by N, with A replicated; rowwise W and A by K, with B replicated. Plain layers and other styles
        are PyTorch's own affair.

    Add adapters before parallelizing, and seed the ranks of a mesh alike where there is dropout, as PyTorch's own
    layers want it: replicated activations must be masked alike.

    Raises:
        ValueError: a style is called something else than "colwise" or "rowwise".
    """
    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    result: dict[str, ParallelStyle] = {}
    for path, style in plan.items():
        if isinstance(style, str):
            if style not in styles:
                raise ValueError(f"plan[{path!r}] must be 'colwise', 'rowwise' or a ParallelStyle, got {style!r}")
            style = styles[style]()
        result[path] = _LoRAStyle(style) if isinstance(style, ColwiseParallel | RowwiseParallel) else style
    return result


class _LoRAStyle(ParallelStyle):
    """A ColwiseParallel or RowwiseParallel that shards adapters too."""

    def __init__(self, style: ColwiseParallel | RowwiseParallel) -> None:
        super().__init__()
        self.style = style

    def __repr__(self) -> str:
        return f"{self.style!r}, adapters included"

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, FusedLoRALinear):
            self.style.src_data_rank = self.src_data_rank
            return self.style._apply(module, device_mesh)
        if module.fan_in_fan_out:
            raise ValueError("plan must name layers of nn.Linear, got a Conv1D, which PyTorch's styles don't shard")
        validation.check_not_merged(module.merged)
        wanted, layouts = _COLWISE if isinstance(self.style, ColwiseParallel) else _ROWWISE
        given, result = self.style.input_layouts[0], self.style.output_layouts[0]

        def partition(path: str, part: nn.Module, mesh: DeviceMesh) -> None:
            # distribute_module comes by with every submodule: all is done at the first, the layer itself
            if part is module:
                self._shard(module, mesh, layouts)

        def prepare(layer: nn.Module, args: tuple[Any, ...], mesh: DeviceMesh) -> Any:
            (x,) = args
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, mesh, [given], run_check=False)
            return (x.redistribute(placements=[wanted]),)

        def finish(layer: nn.Module, y: DTensor, mesh: DeviceMesh) -> Any:
            y = y.redistribute(placements=[result])
            return y.to_local() if self.style.use_local_output else y

        return distribute_module(module, device_mesh, partition, prepare, finish)

    def _shard(self, layer: FusedLoRALinear, mesh: DeviceMesh, layouts: tuple[Placement, ...]) -> None:
        weight, lora_A, lora_B, bias = layouts
        homes: list[tuple[nn.Module, str, Placement]] = [(layer, "weight", weight), (layer, "bias", bias)]
        for adapter in layer.adapters.values():
            homes += [(adapter, "lora_A", lora_A), (adapter, "lora_B", lora_B), (adapter, "bias", bias)]
        for home, name, layout in homes:
            whole = getattr(home, name)
            if whole is not None:
                part = distribute_tensor(whole.detach(), mesh, [layout], src_data_rank=self.src_data_rank)
                home.register_parameter(name, nn.Parameter(part, requires_grad=whole.requires_grad))
