"""``LoRAConfig``: which layers of a model get an adapter, and of what kind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any

import torch

from .. import validation
from ..adapter import PEFT_NAMES, AdapterOptions, OptionFields
from .patterns import Budget, matcher

ALL_LINEAR = "all-linear"

Selector = Callable[[str], bool]


class ConfigFields(OptionFields, total=False):
    """The fields of :class:`LoRAConfig` as keywords, for editors and type checkers."""

    target_modules: str | Sequence[str]
    exclude_modules: str | Sequence[str] | None
    modules_to_save: Sequence[str]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    bias: str
    adapter_dtype: torch.dtype | None
    ensure_weight_tying: bool


@dataclass(frozen=True)
class LoRAConfig(AdapterOptions):
    """What ``apply_lora`` and ``add_adapter`` do to a model.

    Args:
        rank, alpha, dropout, use_rslora, init: see :class:`fused_lora.adapter.AdapterOptions`.
        target_modules: "all-linear" (every plain ``nn.Linear`` and Transformers' ``Conv1D``, but the output head of a
            Transformers model), a regular expression that a module's whole path must match, or names: a whole path or
            its last parts ("q_proj").
        exclude_modules: the same, for what is left out.
        rank_pattern, alpha_pattern: other ranks and alphas, by regular expressions for the end of a path; the first
            that matches counts. A key is also the very path of a layer that none matches.
        adapter_dtype: dtype of A and B; None means the weight's, and float32 over a 16-bit weight, as PEFT does: small
            steps would be lost in 16 bits.
        modules_to_save: modules to be trained whole beside the adapters, without A and B, a classification head for
            instance; whole paths or their last parts. The adapter trains a copy, the base keeps its own.
        ensure_weight_tying: where ``modules_to_save`` names a module whose weight is another's too, as an output head's
            may be the embedding's, train one copy for all of them. Without it each module that is named gets a copy of
            its own, as in PEFT, and they drift apart.
        bias: "none", or biases to be trained, as copies too: "lora_only", those of the adapted layers, or "all".

    Raises:
        TypeError, ValueError: naming the field, the rule and the value.
    """

    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    bias: str = "none"
    adapter_dtype: torch.dtype | None = None
    _: KW_ONLY
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_selection("target_modules", self.target_modules, self._budget)
        if self.exclude_modules is not None:
            _check_selection("exclude_modules", self.exclude_modules, self._budget)
        for name, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            if not isinstance(patterns, Mapping):
                raise TypeError(f"{name} must be a mapping of regular expressions, got {patterns!r}")
        for pattern, rank in self.rank_pattern.items():
            _check_regex("rank_pattern", pattern, self._budget, ends=True)
            validation.check_rank(rank, f"rank_pattern[{pattern!r}]")
        for pattern, alpha in self.alpha_pattern.items():
            _check_regex("alpha_pattern", pattern, self._budget, ends=True)
            validation.check_alpha(alpha, f"alpha_pattern[{pattern!r}]")
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save must be a list of names, got {self.modules_to_save!r}")
        if self.modules_to_save:
            _check_selection("modules_to_save", self.modules_to_save, self._budget)
        validation.check_flag(self.ensure_weight_tying, "ensure_weight_tying")
        if self.bias not in ("none", "lora_only", "all"):
            raise ValueError(f"bias must be 'none', 'lora_only' or 'all', got {self.bias!r}")
        dtype = self.adapter_dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"adapter_dtype must be a floating point torch.dtype or None, got {dtype!r}")

    def __getstate__(self) -> dict[str, Any]:
        # the fields alone: what is cached beside them are functions, which can't be pickled
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def targets(self, path: str) -> bool:
        """Whether a linear layer at this path is chosen, as far as its path tells."""
        return not self.excludes(path) and self._includes(path)

    @functools.cached_property
    def _budget(self) -> Budget:
        return Budget()

    @functools.cached_property
    def _includes(self) -> Selector:
        return selector(".*" if self.target_modules == ALL_LINEAR else self.target_modules, self._budget)

    @functools.cached_property
    def excludes(self) -> Selector:
        return selector(self.exclude_modules or (), self._budget)

    def rank_of(self, path: str) -> int:
        # a key that is a layer's very name counts where no key matches as a regular expression, as in PEFT
        return next((rank for matches, rank in self._ranks if matches(path)), self.rank_pattern.get(path, self.rank))

    def alpha_of(self, path: str) -> float:
        default = self.rank_of(path) if self.alpha is None else self.alpha
        default = self.alpha_pattern.get(path, default)
        return next((alpha for matches, alpha in self._alphas if matches(path)), default)

    def idle_patterns(self, paths: Collection[str]) -> dict[str, list[str]]:
        """Field -> its keys that stand for none of these layers, of ``rank_pattern`` and ``alpha_pattern``."""
        fields = {
            "rank_pattern": zip(self.rank_pattern, self._ranks, strict=True),
            "alpha_pattern": zip(self.alpha_pattern, self._alphas, strict=True),
        }
        return {
            field: [key for key, (matches, _) in pairs if key not in paths and not any(map(matches, paths))]
            for field, pairs in fields.items()
        }

    @functools.cached_property
    def _ranks(self) -> list[tuple[Selector, int]]:
        return [(matcher(pattern, self._budget, ends=True), rank) for pattern, rank in self.rank_pattern.items()]

    @functools.cached_property
    def _alphas(self) -> list[tuple[Selector, float]]:
        return [(matcher(pattern, self._budget, ends=True), alpha) for pattern, alpha in self.alpha_pattern.items()]

    def options_for(self, path: str) -> AdapterOptions:
        """The options of the adapter at this path."""
        options = {name: getattr(self, name) for name in PEFT_NAMES}
        return AdapterOptions(**options | {"rank": self.rank_of(path), "alpha": self.alpha_of(path)})

    def dtype_over(self, weight_dtype: torch.dtype) -> torch.dtype:
        """The dtype of A and B beside a weight of weight_dtype."""
        return self.adapter_dtype or torch.promote_types(weight_dtype, torch.float32)


def selector(selection: str | Sequence[str], budget: Budget | None = None) -> Selector:
    """PEFT's test of paths: a regular expression for the whole path, or names that are the path or its last parts."""
    if isinstance(selection, str):
        return matcher(selection, budget or Budget())
    names = frozenset(selection)
    return lambda path: any(end in names for end in ends_of(path))


def ends_of(path: str) -> Iterator[str]:
    """The path and each of its ends: "a.b.c", "b.c", "c"."""
    while path:
        yield path
        path = path.partition(".")[2]


def _check_regex(name: str, pattern: Any, budget: Budget, *, ends: bool) -> None:
    try:
        matcher(pattern, budget, ends=ends)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def _check_selection(name: str, selection: Any, budget: Budget) -> None:
    if isinstance(selection, str):
        _check_regex(name, selection, budget, ends=False)
    elif not isinstance(selection, Iterable) or not all(isinstance(item, str) and item for item in selection):
        raise TypeError(f"{name} must be a regular expression or a list of names, got {selection!r}")
    elif not list(selection):
        raise ValueError(f"{name} must name at least one module, got {selection!r}")
