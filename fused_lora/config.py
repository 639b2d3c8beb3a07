"""``LoRAConfig``: which layers of a model get an adapter, and of what kind."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from . import validation

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoRAConfig:
    """What ``apply_lora`` and ``add_adapter`` do to a model.

    Args:
        rank: R ≥ 1.
        alpha: scale is alpha / rank, or alpha / sqrt(rank) with ``use_rslora``; None means alpha = rank.
        dropout: LoRA dropout in [0, 1).
        target_modules: "all-linear" (every plain ``nn.Linear`` but a Transformers model's output head), a regular
            expression that a module's whole path must match, or names: a whole path or its last parts ("q_proj").
        exclude_modules: the same, for what is left out.
        rank_pattern, alpha_pattern: other ranks and alphas, by regular expressions for the end of a path.
        init: "kaiming" or "gaussian"; see :class:`fused_lora.layer.LoRAAdapter`.
        adapter_dtype: dtype of A and B; None means the weight's, and float32 over a 16-bit weight, as PEFT does: small
            steps would be lost in 16 bits.
        modules_to_save, bias: PEFT's names. Only the adapters are trained so far: () and "none".

    Raises:
        TypeError, ValueError: naming the field, the rule and the value.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    use_rslora: bool = False
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    bias: str = "none"
    init: str = "kaiming"
    adapter_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        validation.check_rank(self.rank)
        if self.alpha is not None:
            validation.check_alpha(self.alpha)
        validation.check_dropout(self.dropout)
        validation.check_init(self.init)
        _check_selection("target_modules", self.target_modules)
        if self.exclude_modules is not None:
            _check_selection("exclude_modules", self.exclude_modules)
        for pattern, rank in self.rank_pattern.items():
            _check_regex("rank_pattern", pattern)
            validation.check_rank(rank, f"rank_pattern[{pattern!r}]")
        for pattern, alpha in self.alpha_pattern.items():
            _check_regex("alpha_pattern", pattern)
            validation.check_alpha(alpha, f"alpha_pattern[{pattern!r}]")
        if tuple(self.modules_to_save):
            raise ValueError(f"modules_to_save must be empty: only adapters are trained, got {self.modules_to_save!r}")
        if self.bias != "none":
            raise ValueError(f"bias must be 'none': only adapters are trained, got {self.bias!r}")
        dtype = self.adapter_dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"adapter_dtype must be a floating point torch.dtype or None, got {dtype!r}")

    @classmethod
    def check_field_names(cls, names: Iterable[str]) -> None:
        known = [f.name for f in fields(cls)]
        for name in names:
            if name not in known:
                raise TypeError(f"LoRAConfig has no field {name!r}; fields: {', '.join(known)}")

    def targets(self, path: str) -> bool:
        """Whether a linear layer at this path is chosen, as far as its path tells."""
        if self.exclude_modules is not None and selects(self.exclude_modules, path):
            return False
        return self.target_modules == ALL_LINEAR or selects(self.target_modules, path)

    def rank_of(self, path: str) -> int:
        return next((rank for pattern, rank in self.rank_pattern.items() if ends_with(pattern, path)), self.rank)

    def alpha_of(self, path: str) -> float:
        default = self.rank_of(path) if self.alpha is None else self.alpha
        return next((alpha for pattern, alpha in self.alpha_pattern.items() if ends_with(pattern, path)), default)

    def dtype_over(self, weight_dtype: torch.dtype) -> torch.dtype:
        """The dtype of A and B beside a weight of weight_dtype."""
        return self.adapter_dtype or torch.promote_types(weight_dtype, torch.float32)


def selects(selection: str | Sequence[str], path: str) -> bool:
    """A regular expression for the whole path, or names that are the path or its last parts: PEFT's rule."""
    if isinstance(selection, str):
        return re.fullmatch(selection, path) is not None
    return any(path == name or path.endswith("." + name) for name in selection)


def ends_with(pattern: str, path: str) -> bool:
    """PEFT's rule for the keys of rank_pattern and alpha_pattern."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _check_regex(name: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{name} must hold regular expressions, got {pattern!r}: {error}") from None


def _check_selection(name: str, selection: Any) -> None:
    if isinstance(selection, str):
        _check_regex(name, selection)
    elif not isinstance(selection, Iterable) or not all(isinstance(item, str) and item for item in selection):
        raise TypeError(f"{name} must be a regular expression or a list of names, got {selection!r}")
    elif not list(selection):
        raise ValueError(f"{name} must name at least one module, got {selection!r}")
