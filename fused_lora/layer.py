"""``FusedLoRALinear``: an ``nn.Linear`` whose weight is frozen and beside which adapters are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from . import validation
from .adapter import AdapterOptions, LoRAAdapter, OptionFields, by_dropout
from .called import Called
from .composed import plus_adapter
from .functional import lora_linear
from .instances import become, check_not_offloaded
from .parameters import exchange, made_of
from .renamed import renamed
from .switching import Adapted

# attributes that a plain nn.Linear does not have
STATE = (
    "adapters", "impl", "_called", "_switch", "_unmerged_weight", "_unmerged_bias",
)  # fmt: skip


class FusedLoRALinear(Adapted, nn.Linear):
    """``y = x Wᵀ + scale · (D(x) Aᵀ) Bᵀ + bias`` with W and bias frozen, in one kernel where Triton runs.

    A drop-in ``nn.Linear``: ``weight`` and ``bias`` keep their names, so plain checkpoints load; adapters add
    ``adapters.<name>.lora_A`` and ``.lora_B``. A new layer holds one adapter, "default", and it is active.

    Several adapters may be active: their products are summed, in one kernel too, their ranks put together. In training
    with dropout, adapters of the same dropout share one mask, as one adapter of all their ranks would; for each further
    dropout rate two low-rank products are added by plain PyTorch. Adapters that are not active cost nothing.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        impl: "auto", "triton", "native" or "eager"; see :func:`fused_lora.lora_linear`.
        options: the adapter's, ``rank=8, alpha=None, dropout=0.0, use_rslora=False, init="kaiming"``; see
            :class:`fused_lora.adapter.AdapterOptions`.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value, before anything is made.

    LoRA: https://arxiv.org/abs/2106.09685.
    """

    # PEFT's word for a weight that is (K, N)
    fan_in_fan_out = False

    impl: str
    _unmerged_weight: Tensor | None
    _unmerged_bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[OptionFields],
    ) -> None:
        checked = AdapterOptions(**options)
        validation.check_impl(impl)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._become_fused(impl)
        self.install("default", LoRAAdapter.beside(self, checked))
        self.set_adapter("default")

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, impl: str = "auto", **options: Unpack[OptionFields]) -> FusedLoRALinear:
        """A layer of ``linear``'s own weight and bias (the same Parameters, now frozen), with one fresh adapter."""
        validation.check_no_pefts([("", linear)])
        adapter = LoRAAdapter.beside(linear, AdapterOptions(**options))
        layer = made_of(linear.weight, linear.bias, like=linear, kind=_class_for(linear, cls))
        layer._become_fused(impl)
        layer.install("default", adapter)
        layer.set_adapter("default")
        return layer

    @classmethod
    def adopt(cls, linear: nn.Linear, *, impl: str = "auto") -> FusedLoRALinear:
        """Turn ``linear`` itself into a FusedLoRALinear without adapters: its identity, hooks and places are kept."""
        validation.check_impl(impl)
        become(linear, _class_for(linear, cls))
        assert isinstance(linear, FusedLoRALinear)
        linear._become_fused(impl)
        return linear

    def _become_fused(self, impl: str) -> None:
        self.impl = validation.check_impl(impl)
        self._adapt()
        self._called = Called()
        # W and bias before a merge; buffers, so that .to() moves them along
        self.register_buffer("_unmerged_weight", None, persistent=False)
        self.register_buffer("_unmerged_bias", None, persistent=False)
        self.requires_grad_(False)

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype that the weight has in products."""
        return self.weight.dtype

    @property
    def plain_class(self) -> type[nn.Module]:
        """What the layer is once its adapters are dropped."""
        return nn.Linear

    # ---------------------------------------------------------------- adapters

    @renamed(name="adapter")
    def add_adapter(
        self, adapter: str, *, dtype: torch.dtype | None = None, **options: Unpack[OptionFields]
    ) -> LoRAAdapter:
        """Add a fresh adapter, of the weight's dtype unless told; it is not active, and not trainable before it is."""
        validation.check_new_adapter(validation.check_adapter_name(adapter), self.adapters)
        validation.check_whole(self.weight)
        return self.install(adapter, LoRAAdapter.beside(self, AdapterOptions(**options), dtype=dtype))

    def install(self, name: str, adapter: LoRAAdapter) -> LoRAAdapter:
        """Put a finished adapter here, not active: unless it takes the place of one that is."""
        if name in self.active_adapters:
            self.unmerge()
            trained = any(parameter.requires_grad for parameter in self.trained_parameters(name))
        else:
            trained = False
        for parameter in adapter.trained():
            parameter.requires_grad_(trained)
        self.adapters[name] = adapter.train(self.training)
        return adapter

    def trained_parameters(self, name: str) -> list[nn.Parameter]:
        return self.adapter(name).trained()

    def check_together(self, names: Sequence[str]) -> None:
        with_bias = [name for name in names if self.adapter(name).trains_bias] if len(names) > 1 else []
        if len(with_bias) > 1:
            raise ValueError(f"only one active adapter may train modules_to_save or biases, got {with_bias}")

    @property
    def strengths(self) -> dict[str, float]:
        return {
            name: adapter.strength for name, adapter in zip(self.active_adapters, self.active_modules(), strict=True)
        }

    def _activate(self, strengths: Mapping[str, float]) -> None:
        super()._activate(strengths)
        for name, adapter in self.adapters.items():
            if adapter.strength != strengths.get(name, 1.0):
                adapter.strength = strengths.get(name, 1.0)  # type: ignore[assignment]

    @property
    def active_adapter(self) -> str | None:
        """The one that is active; None without one.

        Raises:
            RuntimeError: several are; ``active_adapters`` has them.
        """
        if len(self.active_adapters) > 1:
            raise RuntimeError(f"one adapter must be active to speak of it alone, got {list(self.active_adapters)}")
        return self.active_adapters[0] if self.active_adapters else None

    def adapter(self, name: str) -> LoRAAdapter:
        """The adapter of this name."""
        validation.check_known_adapter(name, self.adapters)
        return self.adapters[name]  # type: ignore[return-value]

    def _the_active(self) -> LoRAAdapter | None:
        name = self.active_adapter
        return None if name is None else self.adapters.computing[0]  # type: ignore[return-value]

    @property
    def lora_A(self) -> nn.Parameter | None:
        """(R, K) of the one active adapter; None without one."""
        adapter = self._the_active()
        return None if adapter is None else adapter.lora_A

    @property
    def lora_B(self) -> nn.Parameter | None:
        """(N, R) of the one active adapter; None without one."""
        adapter = self._the_active()
        return None if adapter is None else adapter.lora_B

    @property
    def scale(self) -> float:
        """The scale of the one active adapter; 0.0 without one."""
        adapter = self._the_active()
        return 0.0 if adapter is None else adapter.scale

    def __dir__(self) -> list[str]:
        """Without the attributes that can't be read while several adapters are active: ``torch.jit.trace`` reads all
        that are listed."""
        of_one = {"active_adapter", "lora_A", "lora_B", "scale"} if len(self.active_adapters) > 1 else set()
        return [name for name in super().__dir__() if name not in of_one]

    # ---------------------------------------------------------------- computing

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self._called.ever = True
        if self._switch.used and self._switch.off():
            return self._plain(x, *self._base())
        adapters: Any = self._modules["adapters"]
        computing: tuple[Any, ...] = adapters.computing
        if not computing or adapters.merged:
            if computing and self.training:
                adapters.warn_of_training_merged()
            return self._plain(x, self.weight, self.bias)
        if len(computing) > 1:
            return self._forward_several(x, computing)
        (adapter,) = computing
        if adapter.hooked:
            return self._forward_hooked(x, computing)
        try:
            # past nn.Module's own search for each of them, which costs the host as much as a launch
            own: dict[str, Any] = self._parameters
            trained = adapter._parameters
            weight, A, B = own["weight"], trained["lora_A"], trained["lora_B"]
            bias = trained["bias"] if adapter.trains_bias else own["bias"]
        except KeyError:
            # torch.nn.utils.parametrize makes properties of them
            weight, A, B = self.weight, adapter.lora_A, adapter.lora_B
            bias = adapter.bias if adapter.trains_bias else self.bias
        return lora_linear(
            x, self._nk(weight) if self.fan_in_fan_out else weight, A, B, adapter.scale, bias,
            dropout_p=adapter.dropout, training=self.training, impl=self.impl,
        )  # fmt: skip

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer computes without adapters, of this weight and bias."""
        return F.linear(x, self._nk(weight), bias)

    def _with(self, x: Tensor, bias: Tensor | None, dropout: float, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """What the layer computes with one adapter, of this bias."""
        weight = self._nk(self.weight)
        return lora_linear(x, weight, A, B, scale, bias, dropout_p=dropout, training=self.training, impl=self.impl)

    def _forward_several(self, x: Tensor, adapters: Sequence[LoRAAdapter]) -> Tensor:
        if any(adapter.hooked for adapter in adapters):
            return self._forward_hooked(x, adapters)
        bias = next((adapter.bias for adapter in adapters if adapter.trains_bias), self.bias)
        (dropout, first), *others = by_dropout(adapters, self.training).items()
        y = self._with(x, bias, dropout, *first)
        for dropout, adapter in others:
            y = plus_adapter(y, x, adapter, dropout)
        return y

    def _forward_hooked(self, x: Tensor, adapters: Sequence[LoRAAdapter]) -> Tensor:
        """Each adapter called as a module, so that its hooks run."""
        bias = None if any(adapter.trains_bias for adapter in adapters) else self.bias
        y = self._plain(x, self.weight, bias)
        for adapter in adapters:
            y = y + adapter(x)
        return y

    def active_modules(self) -> list[LoRAAdapter]:
        """The active adapters, in order."""
        return list(self.adapters.computing)  # type: ignore[arg-type]

    def _nk(self, weight: Tensor) -> Tensor:
        """The weight, or a tensor of its shape, as (N, K)."""
        return weight.t() if self.fan_in_fan_out else weight

    def _base(self) -> tuple[Tensor, Tensor | None]:
        """The weight and bias of the base, merged or not."""
        weight = self.weight if self._unmerged_weight is None else self._unmerged_weight
        return weight, self.bias if self._unmerged_bias is None else self._unmerged_bias

    def base_state(self) -> dict[str, Tensor]:
        """The base's own part of the state dict, merged or not."""
        named = zip(("weight", "bias"), self._base(), strict=True)
        return {name: tensor.detach() for name, tensor in named if tensor is not None}

    # ---------------------------------------------------------------- merging

    @property
    def merged(self) -> bool:
        return self.adapters.merged

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the active adapters into W: ``W + Σ scale · B A``, summed in float32, rounded once; their bias as well.

        What was there before is kept beside it (a second (N, K) tensor), so ``unmerge`` restores it bit for bit.
        Merging again, or without an active adapter, does nothing. A layer doesn't know whether its weight is another
        layer's too; :func:`fused_lora.merge` does.

        Raises:
            ValueError: the sum has a NaN or an infinity; the layer is left as it was.
        """
        if not self.active_adapters or self.merged:
            return
        weight, bias = self._sum()
        self._buffers["_unmerged_weight"] = self._put(weight)
        if bias is not None:
            self._unmerged_bias = exchange(self.bias, bias)
        self.adapters.merged = True

    def check_finite(self) -> None:
        if self.active_adapters and not self.merged:
            self._sum()

    def replaced(self) -> dict[str, Tensor]:
        if not self.active_adapters or self.merged:
            return {}
        trains_bias = any(adapter.trains_bias for adapter in self.active_modules())
        return {"weight": self.weight, "bias": self.bias} if trains_bias else {"weight": self.weight}

    def _sum(self) -> tuple[Tensor, Tensor | None]:
        """What W becomes, and the bias where an adapter has one: new tensors."""
        check_not_offloaded(self, "merged into")
        adapters = self.active_modules()
        validation.check_own_weight(self)
        # in place: this is all the memory that merging a model needs
        total = self._wide()
        for adapter in adapters:
            self._nk(total).addmm_(adapter.lora_B.to(total.dtype), adapter.lora_A.to(total.dtype), alpha=adapter.scale)
        weight = self._rounded(total)
        bias = next((adapter.bias.detach().clone() for adapter in adapters if adapter.bias is not None), None)
        for name, tensor in (("W + scale · B A", weight), ("its bias", bias)):
            if tensor is not None and not validation.is_finite(tensor):
                names = ", ".join(map(repr, self.active_adapters))
                raise ValueError(f"adapter {names} must merge to a finite weight, got NaN or infinity in {name}")
        return weight, bias

    def _wide(self) -> Tensor:
        """The weight in a dtype to add in, a tensor of its own."""
        return self.weight.detach().to(torch.promote_types(self.weight.dtype, torch.float32), copy=True)

    def _rounded(self, total: Tensor) -> Tensor:
        return total.to(self.weight.dtype)

    def _put(self, weight: Tensor) -> Tensor:
        """Give the layer this weight and return the one that it had."""
        return exchange(self.weight, weight)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the very W that ``merge`` set aside. Does nothing on a layer that is not merged."""
        if self.merged:
            assert self._unmerged_weight is not None
            self._put(self._unmerged_weight)
            if self._unmerged_bias is not None:
                exchange(self.bias, self._unmerged_bias)
            self._unmerged_weight = self._unmerged_bias = None
            self.adapters.merged = False

    @torch.no_grad()
    def unload(self) -> nn.Module:
        if self.active_adapters and not self.merged:
            weight, bias = self._sum()
            self._put(weight)
            if bias is not None:
                exchange(self.bias, bias)
        become(self, self.plain_class)
        for name in STATE:
            delattr(self, name)
        return self

    @torch.no_grad()
    def to_linear(self) -> Any:
        """A plain ``nn.Linear`` that computes what this layer computes now, with a weight of its own.

        A ``Conv1D`` where this layer was one.
        """
        weight, bias = self.weight.data.clone(), None if self.bias is None else self.bias.data.clone()
        if self.active_adapters and not self.merged:
            weight, trained_bias = self._sum()
            bias = bias if trained_bias is None else trained_bias
        bias = None if bias is None else nn.Parameter(bias)
        return made_of(nn.Parameter(weight), bias, like=self, kind=self.plain_class)

    def extra_repr(self) -> str:
        active = repr(self.active_adapters[0] if len(self.active_adapters) == 1 else list(self.active_adapters) or None)
        return f"{super().extra_repr()}, active_adapter={active}, impl={self.impl!r}" + (
            ", merged" if self.merged else ""
        )


# layers that are no plain nn.Linear: each entry tells the class for its own, or None
CLASSES: list[Callable[[nn.Module], type[FusedLoRALinear] | None]] = []


def _class_for(linear: nn.Module, otherwise: type[FusedLoRALinear]) -> type[FusedLoRALinear]:
    return next((found for of in CLASSES if (found := of(linear)) is not None), otherwise)
