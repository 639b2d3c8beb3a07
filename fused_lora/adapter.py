"""``LoRAAdapter``: the two low-rank matrices beside a linear layer, and ``AdapterOptions``: what they are made by."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import validation
from .functional import concatenate_adapters
from .instances import bring_back, device_of, offloading, value_of
from .quantized import weight_dtype


def _option(default: Any, peft: str) -> Any:
    return field(default=default, metadata={"peft": peft})


class OptionFields(TypedDict, total=False):
    """The fields of :class:`AdapterOptions` as keywords, for editors and type checkers."""

    rank: int
    alpha: float | None
    dropout: float
    use_rslora: bool
    init: str


@dataclass(frozen=True)
class AdapterOptions:
    """Every option of an adapter, with its default, its name in PEFT's files, and its check.

    Layers, configs and adapters take these fields as they stand here, and folders hold them under PEFT's names.

    Args:
        rank: R ≥ 1, any.
        alpha: scale is alpha / rank, or alpha / sqrt(rank) with ``use_rslora``; None means alpha = rank.
        dropout: LoRA dropout in [0, 1), on x before A, in training mode.
        init: "kaiming" draws A as ``nn.Linear`` draws its weight (Kaiming-uniform, a = sqrt(5), as PEFT and loralib
            do); "gaussian" draws it from N(0, 1/rank²), as PEFT does; "normal" from N(0, 1). B is zero, so a fresh
            adapter changes nothing.

    Raises:
        TypeError, ValueError: naming the field, the rule and the value.
    """

    rank: int = _option(8, "r")
    alpha: float | None = _option(None, "lora_alpha")
    dropout: float = _option(0.0, "lora_dropout")
    use_rslora: bool = _option(False, "use_rslora")
    _: KW_ONLY
    init: str = _option("kaiming", "init_lora_weights")

    def __new__(cls, *args: Any, **named: Any) -> Any:
        theirs = {peft: name for name, peft in PEFT_NAMES.items()}
        validation.check_field_names(cls.__name__, named, [f.name for f in fields(cls)], theirs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        # past the frozen fields: numbers of other kinds become Python's own
        vars(self).update(
            rank=validation.check_rank(self.rank),
            alpha=None if self.alpha is None else validation.check_alpha(self.alpha),
            dropout=validation.check_dropout(self.dropout),
            use_rslora=validation.check_flag(self.use_rslora, "use_rslora"),
            init=validation.check_init(self.init),
        )

    @property
    def scale(self) -> float:
        alpha = float(self.rank) if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


# every option, and what PEFT calls it
PEFT_NAMES: dict[str, str] = {f.name: f.metadata["peft"] for f in fields(AdapterOptions)}


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is Transformers' ``Conv1D``, GPT-2's linear layer: its weight is (K, N). Told by name, as Transformers
    may not be installed."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def features(linear: Any) -> tuple[int, int]:
    """(K, N) of a linear layer."""
    return (linear.nx, linear.nf) if is_conv1d(linear) else (linear.in_features, linear.out_features)


class LoRAAdapter(nn.Module):
    """A pair of low-rank matrices and how much they count: ``lora_A (R, K)``, ``lora_B (N, R)``, ``scale``.

    The options are its attributes, of the names that they have in :class:`AdapterOptions`; ``alpha`` may be set, and
    ``strength``, by which ``scale`` is multiplied.

    Args:
        bias: (N,), of which the adapter trains a copy instead of the layer's own; None where it trains none.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    bias: nn.Parameter | None
    rank: int
    dropout: float
    use_rslora: bool
    init: str
    scale: float
    trains_bias: bool

    def __init__(
        self,
        in_features: int,
        out_features: int,
        options: AdapterOptions,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        if options.scale == 0.0:
            warnings.warn("alpha=0 makes scale 0: the adapter changes no output, and trains nothing", stacklevel=2)
        A = torch.empty(options.rank, in_features, device=device, dtype=dtype)
        B = torch.zeros(out_features, options.rank, device=device, dtype=dtype)
        self._hold(A, B, options, None if bias is None else bias.detach().clone())
        self.reset_parameters()

    @classmethod
    def of(cls, lora_A: Tensor, lora_B: Tensor, options: AdapterOptions, bias: Tensor | None = None) -> LoRAAdapter:
        """One that holds these very tensors, A (R, K), B (N, R) and bias (N,), without drawing anything."""
        adapter = cls.__new__(cls)
        nn.Module.__init__(adapter)
        adapter._hold(lora_A, lora_B, options, bias)
        return adapter

    def _hold(self, A: Tensor, B: Tensor, options: AdapterOptions, bias: Tensor | None) -> None:
        # past nn.Module, which looks at each value set whether it is a parameter or a module
        vars(self).update({name: getattr(options, name) for name in PEFT_NAMES}, trains_bias=bias is not None)
        alpha = float(options.rank) if options.alpha is None else options.alpha
        vars(self).update(alpha=alpha, strength=1.0, scale=options.scale)
        self._parameters.update(
            lora_A=nn.Parameter(A), lora_B=nn.Parameter(B), bias=None if bias is None else nn.Parameter(bias)
        )

    @property
    def options(self) -> AdapterOptions:
        return AdapterOptions(**{name: getattr(self, name) for name in PEFT_NAMES})

    @property
    def alpha(self) -> float:
        """Setting it sets scale: strength · alpha / R, or strength · alpha / sqrt(R) for rsLoRA."""
        return vars(self)["alpha"]

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        self._count(alpha, self.strength)

    @property
    def strength(self) -> float:
        """How much of it counts while it is active: a factor of scale that is not saved. 1.0 unless set."""
        return vars(self)["strength"]

    @strength.setter
    def strength(self, strength: float) -> None:
        self._count(self.alpha, validation.check_strength(strength))

    def _count(self, alpha: float, strength: float) -> None:
        # scale is stored, because a compiled graph takes a stored number as an input and computes no other
        options = replace(self.options, alpha=alpha)
        vars(self).update(alpha=options.alpha, strength=strength, scale=strength * options.scale)

    @property
    def _hf_hook(self) -> Any:
        """Where accelerate puts the hook of a module, once it has put what that holds on meta.

        A hook acts when its module is called, and the layer reads A and B itself, in training with an optimizer that
        holds them: so they are brought back at once, and stay.
        """
        raise AttributeError("an adapter keeps no hook of accelerate's")

    @_hf_hook.setter
    def _hf_hook(self, hook: Any) -> None:
        if (offload := offloading(hook)) is not None:
            bring_back(self, offload)

    @classmethod
    def beside(
        cls, linear: nn.Linear, options: AdapterOptions, *, dtype: torch.dtype | None = None, trains_bias: bool = False
    ) -> LoRAAdapter:
        """A fresh one for this layer, of its weight's device and dtype; with trains_bias, of its bias too, if any."""
        bias = value_of(linear, "bias") if trains_bias and linear.bias is not None else None
        return cls(*features(linear), options, device=device_of(linear), dtype=dtype or weight_dtype(linear), bias=bias)

    @property
    def hooked(self) -> bool:
        """Whether hooks are registered on it: a layer then calls it as a module."""
        own = self.__dict__
        return bool(
            own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
        )

    def forward(self, x: Tensor) -> Tensor:
        """``scale · (D(x) Aᵀ) Bᵀ``, and the bias where it trains one.

        A layer computes by this only where hooks are registered on the adapter, as Opacus registers them for gradients
        per sample. Everywhere else it computes the whole at once.

        Args:
            x: (..., K).  Returns (..., N) of x's dtype, or autocast's.
        """
        h = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))
        product = F.linear(h, self.lora_B.to(h.dtype)) * self.scale
        return product if self.bias is None else product + self.bias

    def trained(self) -> list[nn.Parameter]:
        """A, B, and the bias where it trains one."""
        return [self.lora_A, self.lora_B] if self.bias is None else [self.lora_A, self.lora_B, self.bias]

    def reset_parameters(self) -> None:
        if self.init == "kaiming":
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        else:
            nn.init.normal_(self.lora_A, std=1 / self.rank if self.init == "gaussian" else 1.0)
        nn.init.zeros_(self.lora_B)

    def extra_repr(self) -> str:
        told = f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"
        told += f", strength={self.strength:g}" if self.strength != 1.0 else ""
        return told + (", rslora" if self.use_rslora else "")


def by_dropout(adapters: Iterable[LoRAAdapter], training: bool) -> dict[float, tuple[Tensor, Tensor, float]]:
    """dropout -> (lora_A, lora_B, scale) of the adapters that have it now, as one adapter of all their ranks."""
    groups: dict[float, list[tuple[Tensor, Tensor, float]]] = {}
    for adapter in adapters:
        group = groups.setdefault(adapter.dropout if training else 0.0, [])
        group.append((adapter.lora_A, adapter.lora_B, adapter.scale))
    return {dropout: concatenate_adapters(group) for dropout, group in groups.items()}
