"""``summary(model)``: a table of what is adapted, how it computes, and what is trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from . import ops
from .layer import FusedLoRALinear
from .model import linear_layers


@dataclass(frozen=True)
class LayerRow:
    """One adapted layer. why: the reason it does not run the fused kernel, or None where it does."""

    path: str
    out_features: int
    in_features: int
    adapter: str | None
    rank: int | None
    alpha: float | None
    parameters: int
    implementation: str
    why: str | None


@dataclass(frozen=True)
class Summary:
    """Counts are of parameters, bytes of their storage; ``str()`` is the table."""

    layers: tuple[LayerRow, ...]
    not_adapted: tuple[str, ...]
    base: int
    adapters: int
    trainable: int
    base_bytes: int
    trainable_bytes: int

    @property
    def added_percent(self) -> float:
        """Parameters of all adapters, as a share of the base's."""
        return 100.0 * self.adapters / max(self.base, 1)

    def __str__(self) -> str:
        head = ("layer", "shape", "adapter", "rank", "alpha", "parameters", "runs")
        rows = [
            (row.path or "(model)", f"{row.out_features}x{row.in_features}", str(row.adapter),
             "" if row.rank is None else str(row.rank), "" if row.alpha is None else f"{row.alpha:g}",
             f"{row.parameters:,}", row.implementation)
            for row in self.layers
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        table = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (head, *rows)]
        lines = ["  ".join(row).rstrip() for row in table]
        for why in sorted({row.why for row in self.layers if row.why is not None}):
            lines.append(f"not the fused kernel: {why}")
        if self.not_adapted:
            more = f" and {len(self.not_adapted) - 5} more" if len(self.not_adapted) > 5 else ""
            lines.append(f"linear layers without an adapter: {', '.join(self.not_adapted[:5])}{more}")
        lines.append(
            f"base {self.base:,} parameters ({_size(self.base_bytes)}), adapters {self.adapters:,} "
            f"({self.added_percent:.3f} %), trainable {self.trainable:,} ({_size(self.trainable_bytes)})"
        )
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """What of ``model`` is adapted and how it computes: ``print(summary(model))``."""
    linears = linear_layers(model)
    layers = {path: layer for path, layer in linears.items() if isinstance(layer, FusedLoRALinear)}
    parameters = list(model.parameters())
    in_adapters = {id(p) for layer in layers.values() for p in layer.adapters.parameters()}
    base = [p for p in parameters if id(p) not in in_adapters]
    trainable = [p for p in parameters if p.requires_grad]
    return Summary(
        layers=tuple(_row(path, layer) for path, layer in layers.items()),
        not_adapted=tuple(path or "(model)" for path in linears if path not in layers),
        base=sum(p.numel() for p in base),
        adapters=sum(p.numel() for p in parameters if id(p) in in_adapters),
        trainable=sum(p.numel() for p in trainable),
        base_bytes=sum(p.nbytes for p in base),
        trainable_bytes=sum(p.nbytes for p in trainable),
    )


def _row(path: str, layer: FusedLoRALinear) -> LayerRow:
    name = layer.active_adapter
    adapter = None if name is None else layer.adapter(name)
    device, dtype = layer.weight.device, layer.weight.dtype
    implementation, why = "linear", None
    if layer.disabled:
        why = "adapters are disabled"
    elif layer.merged:
        why = "the adapter is merged into the weight"
    elif adapter is None:
        why = "no adapter is active"
    else:
        implementation = ops.choose_impl(layer.impl, device, dtype)
        if implementation == "eager":
            why = ops.why_unavailable("triton", device, dtype) or "impl='eager' was asked for"
    return LayerRow(
        path, layer.out_features, layer.in_features, name,
        None if adapter is None else adapter.rank, None if adapter is None else adapter.alpha,
        sum(p.numel() for p in layer.adapters.parameters()), implementation, why,
    )  # fmt: skip


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
