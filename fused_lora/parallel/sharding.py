"""The layer over DTensors: every rank computes its shard with the same kernels, by one of four rules.

On each dimension of the mesh, with S(d) sharded along d, R replicated, P a sum that is still owed:

    ============  ======  ====  ====  ====  ====  =======  ==========================
    rule          x       W     A     B     bias  y        gradients that are summed
    ============  ======  ====  ====  ====  ====  =======  ==========================
    replicated    R       R     R     R     R     R
    data          S(d)    R     R     R     R     S(d)     W, A, B, bias
    colwise       R       S(0)  R     S(0)  S(0)  S(-1)    x, A
    rowwise       S(-1)   S(1)  S(1)  R     R     P        B, bias
    ============  ======  ====  ====  ====  ====  =======  ==========================

They follow from ``y = x Wᵀ + scale · (x Aᵀ) Bᵀ + bias``: N is W's and B's, K is x's, W's and A's. No operand is ever
moved: a layout that no rule covers is an error, not an all-gather of W.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

R, P = Replicate(), Partial()
LAST = -1


@dataclass(frozen=True)
class Rule:
    """Layouts of (x, weight, lora_A, lora_B, bias), those of their gradients, and y's, on one mesh dimension."""

    operands: tuple[Placement, ...]
    gradients: tuple[Placement, ...]
    result: Placement


REPLICATED = Rule((R, R, R, R, R), (R, R, R, R, R), R)
COLWISE = Rule((R, Shard(0), R, Shard(0), Shard(0)), (P, Shard(0), P, Shard(0), Shard(0)), Shard(LAST))
ROWWISE = Rule((Shard(LAST), Shard(1), Shard(1), R, R), (Shard(LAST), Shard(1), Shard(1), P, P), P)


def _data(dim: int) -> Rule:
    return Rule((Shard(dim), R, R, R, R), (Shard(dim), P, P, P, P), Shard(dim))


@dataclass(frozen=True)
class Local:
    """This rank's part. operands: x, weight, lora_A, lora_B, bias.  join: its result as a DTensor.

    stream: for dropout: parts of x that differ must not share a mask, equal ones must.
    """

    operands: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
    join: Callable[[Tensor], Tensor]
    stream: int


def localize(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> Local:
    """The local computation, or an error for layouts that no rule covers.

    Raises:
        TypeError: DTensors and plain Tensors are mixed.
        ValueError: the DTensors are on different meshes, or no rule covers their layouts.
    """
    named = {"x": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B, "bias": bias}
    given: dict[str, DTensor] = {}
    for name, value in named.items():
        if value is None:
            continue
        if not isinstance(value, DTensor):
            raise TypeError(
                f"x, weight, lora_A, lora_B and bias must all be DTensors when one is, got a plain {name}; parallelize "
                "the layer with fused_lora.parallel.tensor_parallel.tensor_parallel_plan, and call layers under "
                "fully_shard through the module that it wrapped"
            )
        given[name] = value
    mesh = given["x"].device_mesh
    for name, tensor in given.items():
        if tensor.device_mesh != mesh:
            raise ValueError(f"{name} must be on x's mesh, {mesh}, got {tensor.device_mesh}")
    rules = [_rule(given, dim) for dim in range(mesh.ndim)]
    local: dict[str, Tensor | None] = {"bias": None}
    for index, name in enumerate(named):
        if name in given:
            local[name] = _local(given[name], [rule.gradients[index] for rule in rules])
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank that calls is in the mesh"
    bias = local["bias"]
    stream = 0
    for dim, rule in enumerate(rules):
        if rule is ROWWISE and bias is not None:
            # it belongs into the sum once
            bias = bias * (coordinate[dim] == 0)
        if rule is not COLWISE and rule is not REPLICATED:
            stream = stream * mesh.size(dim) + coordinate[dim]
    placements = [_positive(rule.result, x.dim()) for rule in rules]
    shape = torch.Size((*x.shape[:-1], weight.shape[0]))

    def join(y: Tensor) -> Tensor:
        return DTensor.from_local(y, mesh, placements, run_check=False, shape=shape, stride=_contiguous(shape))

    x, weight, lora_A, lora_B = (local[name] for name in ("x", "weight", "lora_A", "lora_B"))  # type: ignore[assignment]
    return Local((x, weight, lora_A, lora_B, bias), join, stream)


def _rule(given: dict[str, DTensor], dim: int) -> Rule:
    """The one that covers the layouts on this dimension of the mesh."""
    ndim = given["x"].dim()
    layouts = {name: _from_end(tensor.placements[dim], tensor.dim(), name) for name, tensor in given.items()}
    for rule in _rules(ndim):
        if all(layouts.get(name, wanted) == wanted for name, wanted in zip(_NAMES, rule.operands, strict=True)):
            return rule
    listed = ", ".join(f"{name} {tensor.placements}" for name, tensor in given.items())
    raise ValueError(
        f"the layouts of x, weight, lora_A, lora_B and bias must be replicated, data, colwise or rowwise parallel "
        f"(fused_lora/parallel/sharding.py has the table), got {listed}; parallelize the layer with "
        "fused_lora.parallel.tensor_parallel.tensor_parallel_plan, or redistribute() them"
    )


_NAMES = ("x", "weight", "lora_A", "lora_B", "bias")


def _rules(ndim: int) -> tuple[Rule, ...]:
    # a tuple: torch.compile of PyTorch 2.14 cannot trace a `yield from` that is left early
    return (REPLICATED, COLWISE, ROWWISE, *(_data(dim) for dim in range(ndim - 1)))


def _from_end(placement: Placement, ndim: int, name: str) -> Placement:
    """x's last dimension as -1, whatever its number; type Shard exactly, so no strided or padded kind passes for it."""
    if name == "x" and type(placement) is Shard and placement.dim in (ndim - 1, LAST):
        return Shard(LAST)
    return placement


def _positive(placement: Placement, ndim: int) -> Placement:
    return Shard(ndim - 1) if placement == Shard(LAST) else placement


def _local(tensor: DTensor, gradients: list[Placement]) -> Tensor:
    """This rank's shard; its gradient is of the given layouts, and is summed to the tensor's own where it is owed."""
    if not tensor.requires_grad:
        return tensor.to_local()
    gradients = [_positive(placement, tensor.dim()) for placement in gradients]
    # to its own layout: nothing moves, but the way back turns P into R or S
    return tensor.redistribute(placements=tensor.placements).to_local(grad_placements=gradients)


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides))
