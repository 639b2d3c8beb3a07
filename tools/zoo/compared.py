"""One model with the same adapters in several ways, their results, and how far these may lie apart.

The ways are ours, PEFT's, and the formula itself: a hook behind each linear layer of the base that adds
``scale · (x Aᵀ) Bᵀ``. What the formula's results in float32 err by, against the same in float64, is the budget: ours
may err by twice that, and by one rounding of the largest value.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fused_lora import apply_lora
from fused_lora.models.apply import lora_layers

from .entry import Entry

RANK, ALPHA = 4, 8
SCALE = ALPHA / RANK
EPS = torch.finfo(torch.float32).eps
# a model whose results are decided by roundings shows nothing
MOST_ROUNDING = 1e-4
OK, ROUNDED, WARNED, DIFFERS = "ok", "rounded", "warned", "differs"

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Finding:
    """verdict: ok; rounded, where bits differ and no more; warned, where it differs and a warning names the layers; or
    differs. note: what differs."""

    verdict: str
    note: str = ""


class Formula(nn.Module):
    """The base, and behind the forward of each layer the low-rank product of its pair."""

    def __init__(self, base: nn.Module, pairs: Mapping[str, Pair], dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base.to(dtype).requires_grad_(False)
        self.pairs = {path: tuple(nn.Parameter(t.to(dtype)) for t in pair) for path, pair in pairs.items()}
        if dtype == torch.float64 and hasattr(config := getattr(base, "config", None), "_experts_implementation"):
            # PyTorch's grouped product has no float64
            setattr(config, "_experts_implementation", "eager")  # noqa: B010
        modules = dict(base.named_modules())
        for path, (A, B) in self.pairs.items():
            modules[path].register_forward_hook(
                # a router may compute in a dtype of its own
                lambda _, given, y, A=A, B=B: (y + SCALE * ((given[0].to(A.dtype) @ A.mT) @ B.mT)).to(y.dtype)
            )

    def forward(self, *given: Any, **named: Any) -> Any:
        with no_fast_path():
            return self.base(*given, **named)


class Compared:
    """A model of the zoo, made anew for each of the ways."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.warned: list[str] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Warnings are kept, for the checks that may be answered by one."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        self.warned += [str(warning.message) for warning in caught]

    # ---------------------------------------------------------------- the ways

    def fresh(self) -> nn.Module:
        """The base with adapters by ``apply_lora``."""
        with self.listening():
            torch.manual_seed(3)
            return apply_lora(self.entry.base(), rank=RANK, alpha=ALPHA, target_modules=self.entry.targets)

    def adapted(self) -> nn.Module:
        """The same, and B is drawn."""
        model = self.fresh()
        drawn = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for _, layer in lora_layers(model):
                assert layer.lora_B is not None
                layer.lora_B.normal_(0.0, 0.1, generator=drawn)
        return model

    @cached_property
    def pairs(self) -> dict[str, Pair]:
        """path -> A and B of every adapted layer."""
        found = {path: (layer.lora_A, layer.lora_B) for path, layer in lora_layers(self.adapted())}
        return {path: (A.detach(), B.detach()) for path, (A, B) in found.items()}  # type: ignore[union-attr]

    def formula(self, dtype: torch.dtype = torch.float32) -> Formula:
        return Formula(self.entry.base(), self.pairs, dtype)

    def theirs(self) -> Any:
        """The base with the same adapters by PEFT."""
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(self.pairs))
        with self.listening():
            model = peft.get_peft_model(self.entry.base(), config).eval()
        layers = peft_layers(model)
        if layers.keys() != self.pairs.keys():
            raise ValueError(f"PEFT adapts other layers of these names: {some(layers.keys() ^ self.pairs.keys())}")
        with torch.no_grad():
            for path, (A, B) in self.pairs.items():
                layers[path].lora_A["default"].weight.copy_(A)
                layers[path].lora_B["default"].weight.copy_(B)
        return model

    # ---------------------------------------------------------------- their results

    def results(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The output as "y", and the gradients of A and B by the layers' paths."""
        y = self.output_and_backward(model, dtype)
        found = {"y": y}
        for path, pair in gradients_of(model).items():
            for name, gradient in zip("AB", pair, strict=True):
                if gradient is not None and gradient.any():
                    found[f"{path}.lora_{name}"] = gradient.detach().clone()
        return found

    def output_and_backward(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        y = self.entry.output(model, dtype)
        if y.requires_grad:
            weights = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
            y.backward(weights.to(dtype))
        return y.detach()

    @cached_property
    def rounded(self) -> dict[str, Tensor]:
        """The formula's results in float32."""
        return self.results(self.formula())

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        """The formula's results in float64."""
        return self.results(self.formula(torch.float64), torch.float64)

    @cached_property
    def budget(self) -> dict[str, float]:
        """By name of a result. A tensor may round well by luck: each has at least the median's relative error."""
        sizes = {name: float(value.abs().max()) for name, value in self.exact.items()}
        errors = {
            name: distance(self.rounded[name], self.exact[name]) if name in self.rounded else 0.0 for name in sizes
        }
        relative = sorted(errors[name] / sizes[name] for name in sizes)
        median = relative[len(relative) // 2]
        if median > MOST_ROUNDING:
            raise ValueError(f"float32 must say something about this model, got errors of {median:.1e}")
        return {name: 3 * max(errors[name], median * sizes[name]) + EPS * sizes[name] for name in sizes}

    @cached_property
    def needed(self) -> set[str]:
        """The paths of adapted layers whose frozen weights the adapted model's output depends on."""
        model = self.formula()
        modules = dict(model.base.named_modules())
        weights = {path: modules[path].weight.requires_grad_(True) for path in self.pairs}
        self.output_and_backward(model)
        return {path for path, weight in weights.items() if weight.grad is not None and bool(weight.grad.any())}

    def against(self, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Finding:
        """Whether two results agree: what rounding explains is no difference."""
        worst, where = 1.0, ""
        for name in sorted(got.keys() | expected.keys()):
            a, b = got.get(name), expected.get(name)
            if a is None or b is None:
                if self.budget.get(name, 0.0) > 0.0:
                    return Finding(DIFFERS, f"{_spoken(name)} is on one side only")
                continue
            off = distance(a, b)
            if off > worst * self.budget.get(name, 0.0):
                worst = off / self.budget[name] if self.budget.get(name) else float("inf")
                where = f"{_spoken(name)} differs by {off / (float(b.abs().max()) or 1.0):.1e}"
        if where:
            return Finding(DIFFERS, where)
        same = all(torch.equal(got[name], expected[name]) for name in got.keys() & expected.keys())
        return Finding(OK if same else ROUNDED)

    def outputs_agree(self, model: nn.Module, expected: Tensor) -> Finding:
        return self.against({"y": self.entry.output(model).detach()}, {"y": expected})


def peft_layers(model: Any) -> dict[str, Any]:
    """path in the base -> PEFT's layer."""
    base = model.get_base_model()
    return {path: module for path, module in base.named_modules() if isinstance(module, LoraLayer)}


def gradients_of(model: Any) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """path -> the gradients of A and B."""
    pairs: dict[str, tuple[Any, Any]]
    if isinstance(model, Formula):
        pairs = {path: (A, B) for path, (A, B) in model.pairs.items()}
    elif isinstance(model, peft.PeftModel):
        layers = peft_layers(model)
        pairs = {p: (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for p, layer in layers.items()}
    else:
        pairs = {path: (layer.lora_A, layer.lora_B) for path, layer in lora_layers(model)}
    return {path: (A.grad, B.grad) for path, (A, B) in pairs.items()}


@contextmanager
def no_fast_path() -> Iterator[None]:
    """In eval mode PyTorch's nn.TransformerEncoder reads its linear layers' weights by name, and so leaves out what
    PEFT puts beside them. What PEFT means is what it computes without that."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def names_layer(message: str, path: str) -> bool:
    """Whether a message has this path, and not as a part of another."""
    return re.search(rf"(?<![\w.]){re.escape(path)}(?!\w|\.\w)", message) is not None


def some(names: Iterable[str]) -> str:
    """Paths, those that differ in a block's number as one."""
    return ", ".join(sorted({re.sub(r"(?<=\.)\d+(?=\.)", "N", name) for name in names}))


def brief(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 160 else text[:157] + "..."


def _spoken(name: str) -> str:
    return "the output" if name == "y" else f"the gradient of {name}"
