"""``summary(model)``: a table of what is adapted, how it computes, and what is trained."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .. import backends
from ..adapter import features
from ..backends import LayerPass
from ..called import never_called
from ..instances import device_of
from ..layer import FusedLoRALinear
from ..quantized import kind_of
from ..subclasses import FusedLoRABeside
from ..switching import adapted_modules, base_modules
from .modules_to_save import Trained
from .selection import linear_layers


@dataclass(frozen=True)
class LayerRow:
    """One adapted layer. why: the reason it does not run the fused kernel, or None where it does.

    adapter, rank and alpha are the active adapter's. Where several are active: their names joined, the sum of their
    ranks, and no alpha. A strength other than 1 stands before its name.

    base: how the frozen weight is kept, its dtype or "nf4" for instance.  base_bytes: of all that is kept of it.
    """

    path: str
    out_features: int
    in_features: int
    adapter: str | None
    rank: int | None
    alpha: float | None
    parameters: int
    implementation: str
    why: str | None
    base: str
    base_bytes: int


@dataclass(frozen=True)
class FrozenRow:
    """Weights that stay frozen without an adapter: one, or all whose names differ in numbers alone, which are ``*``.

    module: the class that they belong to.  parameters: of all of them.  percent: their share of the base's.
    """

    name: str
    module: str
    parameters: int
    percent: float


@dataclass(frozen=True)
class Summary:
    """Counts are of parameters, bytes of their storage; ``str()`` is the table.

    trained: names of what the active adapters train beside A and B: ``modules_to_save`` and biases.
    embeddings: paths of the model's ``nn.Embedding``, of which only PEFT makes adapters.
    frozen: what stays frozen without an adapter and is 1 % of the base or more, largest first.
    """

    layers: tuple[LayerRow, ...]
    trained: tuple[str, ...]
    not_adapted: tuple[str, ...]
    base: int
    adapters: int
    trainable: int
    base_bytes: int
    trainable_bytes: int
    embeddings: tuple[str, ...] = ()
    frozen: tuple[FrozenRow, ...] = ()

    @classmethod
    def of(
        cls, model: nn.Module, layers: tuple[LayerRow, ...], in_adapters: set[int], adapted: set[int],
        trained: Iterable[str], not_adapted: Iterable[str],
    ) -> Summary:  # fmt: skip
        """in_adapters, adapted: the ids of the model's parameters that are adapters', and that have one."""
        parameters = list(model.parameters())
        base = [p for p in parameters if id(p) not in in_adapters]
        # id of a quantized Parameter, which holds fewer or other elements than the weight has -> the weight's
        quantized = {
            id(module.weight): (features(module), kind.packed(module).nbytes)
            for _, module in base_modules(model)
            if (kind := kind_of(module)) is not None and kind.why_not(module) is None
        }
        counts = {id(p): math.prod(quantized[id(p)][0]) if id(p) in quantized else p.numel() for p in base}
        trainable = [p for p in parameters if p.requires_grad]
        return cls(
            layers=layers,
            trained=tuple(trained),
            not_adapted=tuple(path or "(model)" for path in not_adapted),
            base=sum(counts.values()),
            adapters=sum(p.numel() for p in parameters if id(p) in in_adapters),
            trainable=sum(p.numel() for p in trainable),
            base_bytes=sum(quantized[id(p)][1] if id(p) in quantized else p.nbytes for p in base),
            trainable_bytes=sum(p.nbytes for p in trainable),
            embeddings=tuple(
                path or "(model)" for path, module in base_modules(model) if isinstance(module, nn.Embedding)
            ),
            frozen=_frozen(model, counts, adapted),
        )

    @property
    def added_percent(self) -> float:
        """Parameters of all adapters, as a share of the base's."""
        return 100.0 * self.adapters / max(self.base, 1)

    def __str__(self) -> str:
        head = ("layer", "shape", "base", "adapter", "rank", "alpha", "parameters", "runs")
        rows = [
            (row.path or "(model)", f"{row.out_features}x{row.in_features}", f"{row.base} {size(row.base_bytes)}",
             str(row.adapter), "" if row.rank is None else str(row.rank),
             "" if row.alpha is None else f"{row.alpha:g}", f"{row.parameters:,}", row.implementation)
            for row in self.layers
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        table = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (head, *rows)]
        lines = ["  ".join(row).rstrip() for row in table]
        for why in sorted({row.why for row in self.layers if row.why is not None}):
            lines.append(f"not the fused kernel: {why}")
        if self.trained:
            lines.append(f"trained beside A and B: {_listed(self.trained)}")
        if self.not_adapted:
            lines.append(f"linear layers without an adapter: {_listed(self.not_adapted)}")
        if self.embeddings:
            lines.append(f"embeddings, whose adapters are left to PEFT: {_listed(self.embeddings)}")
        if self.frozen:
            shares = (f"{row.name} ({row.module}) {row.percent:.1f} %" for row in self.frozen)
            lines.append(f"frozen without an adapter, of the base's parameters: {', '.join(shares)}")
        lines.append(
            f"base {self.base:,} parameters ({size(self.base_bytes)}), adapters {self.adapters:,} "
            f"({self.added_percent:.3f} %), trainable {self.trainable:,} ({size(self.trainable_bytes)})"
        )
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """What of ``model`` is adapted and how it computes: ``print(summary(model))``."""
    linears = linear_layers(model)
    layers = {path: layer for path, layer in linears.items() if isinstance(layer, FusedLoRALinear)}
    adapted, idle = adapted_modules(model), set(never_called(model))
    return Summary.of(
        model,
        tuple(_row(path, layer, path in idle) for path, layer in layers.items()),
        in_adapters={id(p) for _, m in adapted for name in m.adapters for p in m.trained_parameters(name)},
        adapted={id(p) for _, m in adapted for p in _with_adapter(m)},
        trained=(name for path, module in adapted for name in _trained(path, module)),
        not_adapted=(path for path in linears if path not in layers),
    )


def _with_adapter(module: Any) -> Iterable[Tensor]:
    return module.parameters() if isinstance(module, FusedLoRALinear) else module.replaced().values()


def _frozen(model: nn.Module, counts: dict[int, int], adapted: set[int]) -> tuple[FrozenRow, ...]:
    """counts: id of a parameter of the base -> its size."""
    base, seen = max(sum(counts.values()), 1), set(adapted)
    # (name with * for its numbers, class) -> the whole names, and the count of all of them
    groups: dict[tuple[str, str], tuple[list[str], list[int]]] = {}
    for path, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.requires_grad or parameter.dim() < 2 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            whole = f"{path}.{name}" if path else name
            key = re.sub(r"(?<![^.])\d+(?![^.])", "*", whole), type(module).__name__
            names, sizes = groups.setdefault(key, ([], []))
            names.append(whole)
            sizes.append(counts.get(id(parameter), 0))
    rows = (
        FrozenRow(names[0] if len(names) == 1 else name, kind, sum(sizes), 100.0 * sum(sizes) / base)
        for (name, kind), (names, sizes) in groups.items()
    )
    return tuple(sorted((row for row in rows if row.percent >= 1.0), key=lambda row: -row.parameters))


def _row(path: str, layer: FusedLoRALinear, is_idle: bool) -> LayerRow:
    adapters = layer.active_modules()
    names = "+".join(_weighed(name, strength) for name, strength in layer.strengths.items())
    implementation, why = ("never called", NEVER_CALLED) if is_idle else _implementation(layer)
    return LayerRow(
        path, layer.out_features, layer.in_features, names or None,
        sum(adapter.rank for adapter in adapters) or None, adapters[0].alpha if len(adapters) == 1 else None,
        sum(p.numel() for p in layer.adapters.parameters()), implementation, why, *kept(layer),
    )  # fmt: skip


def kept(layer: Any) -> tuple[str, int]:
    """How a layer's weight is kept, in a word, and in how many bytes.

    Of a layer of PEFT's whose weights have other names, as those of an nn.MultiheadAttention, all of them.
    """
    kind = kind_of(layer)
    if kind is not None and kind.why_not(layer) is None:
        return kind.tell(layer), kind.packed(layer).nbytes
    weight = getattr(layer, "weight", None)
    own = [p for p in layer.parameters(recurse=False) if p.dim() > 1]
    weights = [weight] if isinstance(weight, Tensor) else own
    dtypes = sorted({str(w.dtype).removeprefix("torch.") for w in weights})
    return ", ".join(dtypes) or "no weight", sum(w.nbytes for w in weights)


def _weighed(name: str, strength: float) -> str:
    return name if strength == 1.0 else f"{strength:g}·{name}"


NEVER_CALLED = "other layers were called and this one was not: the model may read its weight by name, past the adapter"
BY_SIZE = "'auto' takes what was measured to be the fastest for so many tokens: `fused-lora info`"


def _implementation(layer: FusedLoRALinear) -> tuple[str, str | None]:
    """What a forward runs now, and why it is not the fused kernel."""
    if layer.disabled:
        return "linear", "adapters are disabled"
    if layer.merged:
        return "linear", "the adapter is merged into the weight"
    if not layer.active_adapters:
        return "linear", "no adapter is active"
    if isinstance(layer, FusedLoRABeside):
        kind = layer.plain_class.__name__
        return "beside", f"a {kind} has a forward of its own; it is not fused, the low-rank product is added beside it"
    device, dtype = device_of(layer), layer.weight_dtype
    unavailable = backends.why_not(layer.impl, device, dtype) if layer.impl != "auto" else None
    if unavailable is not None:
        return "nothing", f"impl={layer.impl!r} was asked for, which raises: {unavailable}"
    (K, N), (adapter, *_) = features(layer), layer.active_modules()
    rank = sum(other.rank for other in layer.active_modules())
    drops = layer.training and adapter.dropout > 0.0
    found = backends.runs(layer.impl, device, dtype, LayerPass(True, 1, K, N, rank, adapter.lora_A.dtype, drops))
    if found == ("triton",):
        return "triton", None
    if layer.impl != "auto":
        return found[0], f"impl={layer.impl!r} was asked for"
    why = backends.why_not("triton", device, dtype) or (
        f"on a CPU 'auto' takes {found[0]!r}" if device.type == "cpu" else BY_SIZE
    )
    return " or ".join(found), why


def _trained(path: str, module: object) -> list[str]:
    """Names of what the active adapters train here beside A and B."""
    if isinstance(module, FusedLoRALinear):
        names = ["bias"] if any(adapter.trains_bias for adapter in module.active_modules()) else []
    else:
        assert isinstance(module, Trained)
        names = list(module.replaced())
    return [f"{path}.{name}" if path else name for name in names]


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def size(count: float) -> str:
    """Of bytes."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
