"""``FusedLoRALinear``: an ``nn.Linear`` whose weight is frozen and beside which adapters are trained."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import validation
from .functional import lora_linear


class LoRAAdapter(nn.Module):
    """A pair of thin matrices and how much they count: ``lora_A (R, K)``, ``lora_B (N, R)``, ``scale = alpha / R``.

    Args:
        init: "kaiming" draws A as ``nn.Linear`` draws its weight (Kaiming-uniform, a = sqrt(5), as PEFT and loralib
            do); "gaussian" draws it from N(0, 1). B is zero, so a fresh adapter changes nothing.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        alpha: float | None,
        dropout: float,
        use_rslora: bool,
        init: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        rank = validation.check_rank(rank)
        alpha = float(rank) if alpha is None else validation.check_alpha(alpha)
        dropout = validation.check_dropout(dropout)
        validation.check_init(init)
        super().__init__()
        self.rank, self.alpha, self.dropout, self.use_rslora = rank, alpha, dropout, bool(use_rslora)
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))
        self.init = init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.init == "gaussian":
            nn.init.normal_(self.lora_A)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def scale(self) -> float:
        """alpha / R, or alpha / sqrt(R) for rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def delta(self) -> Tensor:
        """``scale · B A``: (N, K), at least float32."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        with torch.no_grad():
            return (self.lora_B.to(dtype) @ self.lora_A.to(dtype)).mul_(self.scale)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}" + (
            ", rslora" if self.use_rslora else ""
        )


class FusedLoRALinear(nn.Linear):
    """``y = x Wᵀ + scale · (D(x) Aᵀ) Bᵀ + bias`` with W and bias frozen, in one kernel where Triton runs.

    A drop-in ``nn.Linear``: ``weight`` and ``bias`` keep their names, so plain checkpoints load; adapters add
    ``adapters.<name>.lora_A`` and ``.lora_B``. A new layer holds one adapter, "default", and it is active.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        rank: R ≥ 1, any.
        alpha: scale is alpha / rank, or alpha / sqrt(rank) with ``use_rslora``; None means alpha = rank.
        dropout: LoRA dropout in [0, 1), on x before A, in training mode.
        impl: "auto", "triton", "native" or "eager"; see :func:`fused_lora.lora_linear`.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value, before anything is made.

    LoRA: https://arxiv.org/abs/2106.09685. Initialisation: see :class:`LoRAAdapter`.
    """

    adapters: nn.ModuleDict
    impl: str
    disabled: bool
    _active: str | None
    _computing: tuple[LoRAAdapter, ...]
    _merged: str | None
    _unmerged_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        validation.check_rank(rank)
        validation.check_impl(impl)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._become_fused(impl)
        self.add_adapter("default", rank=rank, alpha=alpha, dropout=dropout, use_rslora=use_rslora)
        self.set_adapter("default")

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        init: str = "kaiming",
        impl: str = "auto",
    ) -> FusedLoRALinear:
        """A layer of ``linear``'s own weight and bias (the same Parameters, now frozen), with one fresh adapter."""
        adapter = LoRAAdapter(
            linear.in_features, linear.out_features, rank=rank, alpha=alpha, dropout=dropout, use_rslora=use_rslora,
            init=init, device=linear.weight.device, dtype=linear.weight.dtype,
        )  # fmt: skip
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.training = linear.training
        layer._become_fused(impl)
        layer.adapters["default"] = adapter
        layer.set_adapter("default")
        return layer

    @classmethod
    def adopt(cls, linear: nn.Linear, *, impl: str = "auto") -> FusedLoRALinear:
        """Turn ``linear`` itself into a FusedLoRALinear without adapters: its identity, hooks and places are kept."""
        validation.check_impl(impl)
        linear.__class__ = cls
        assert isinstance(linear, FusedLoRALinear)
        linear._become_fused(impl)
        return linear

    def _become_fused(self, impl: str) -> None:
        self.impl = validation.check_impl(impl)
        self.adapters = nn.ModuleDict()
        # within disable_adapters
        self.disabled = False
        self._activate(None)
        self._merged = None
        # W before a merge; a buffer, so that .to() moves it along
        self.register_buffer("_unmerged_weight", None, persistent=False)
        self.requires_grad_(False)

    # ---------------------------------------------------------------- adapters

    def add_adapter(
        self,
        name: str,
        *,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        init: str = "kaiming",
        dtype: torch.dtype | None = None,
    ) -> LoRAAdapter:
        """Add a fresh adapter, of the weight's dtype unless told; it is not active, and not trainable before it is."""
        validation.check_new_adapter(validation.check_adapter_name(name), self.adapters)
        validation.check_whole(self.weight)
        adapter = LoRAAdapter(
            self.in_features, self.out_features, rank=rank, alpha=alpha, dropout=dropout, use_rslora=use_rslora,
            init=init, device=self.weight.device, dtype=dtype or self.weight.dtype,
        )  # fmt: skip
        self.adapters[name] = adapter.requires_grad_(False).train(self.training)
        return adapter

    def delete_adapter(self, name: str) -> None:
        validation.check_known_adapter(name, self.adapters)
        if self._merged == name:
            self.unmerge()
        if self._active == name:
            self._activate(None)
        del self.adapters[name]

    def set_adapter(self, name: str | None) -> None:
        """Make one adapter active and trainable, and the others not; None leaves the bare linear. Unmerges first."""
        if name is not None:
            validation.check_known_adapter(name, self.adapters)
        if name == self._active:
            return
        self.unmerge()
        for other, adapter in self.adapters.items():
            adapter.requires_grad_(other == name)
        self._activate(name)

    def _activate(self, name: str | None) -> None:
        self._active = name
        # what forward reads: a compiled call guards the shapes that it finds there, and not the name
        self._computing = () if name is None else (self.adapters._modules[name],)  # type: ignore[assignment]

    @property
    def active_adapter(self) -> str | None:
        return self._active

    def adapter(self, name: str) -> LoRAAdapter:
        """The adapter of this name."""
        validation.check_known_adapter(name, self.adapters)
        return self.adapters[name]  # type: ignore[return-value]

    def _active_module(self) -> LoRAAdapter | None:
        return None if self._active is None else self.adapters._modules[self._active]  # type: ignore[return-value]

    @property
    def lora_A(self) -> nn.Parameter | None:
        """(R, K) of the active adapter; None without one."""
        adapter = self._active_module()
        return None if adapter is None else adapter.lora_A

    @property
    def lora_B(self) -> nn.Parameter | None:
        """(N, R) of the active adapter; None without one."""
        adapter = self._active_module()
        return None if adapter is None else adapter.lora_B

    @property
    def scale(self) -> float:
        """Of the active adapter; 0.0 without one."""
        adapter = self._active_module()
        return 0.0 if adapter is None else adapter.scale

    # ---------------------------------------------------------------- computing

    def forward(self, x: Tensor) -> Tensor:
        if self.disabled:
            return F.linear(x, self.weight if self._unmerged_weight is None else self._unmerged_weight, self.bias)
        if not self._computing or self._merged is not None:
            return F.linear(x, self.weight, self.bias)
        (adapter,) = self._computing
        return lora_linear(
            x, self.weight, adapter.lora_A, adapter.lora_B, adapter.scale, self.bias,
            dropout_p=adapter.dropout, training=self.training, impl=self.impl,
        )  # fmt: skip

    # ---------------------------------------------------------------- merging

    @property
    def merged(self) -> bool:
        return self._merged is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the active adapter into W: ``W + scale · B A``, summed in float32, rounded once.

        W before the merge is kept beside it (a second (N, K) tensor), so ``unmerge`` restores it bit for bit.
        Merging again, or without an active adapter, does nothing.

        Raises:
            ValueError: the sum has a NaN or an infinity; W is left as it was.
        """
        adapter = self._active_module()
        if adapter is None or self.merged:
            return
        self._unmerged_weight = _exchange(self.weight, self._sum(adapter))
        self._merged = self._active

    def _sum(self, adapter: LoRAAdapter) -> Tensor:
        delta = adapter.delta()
        total = delta.add_(self.weight).to(self.weight.dtype)
        if not bool(whole(torch.isfinite(total).all())):
            raise ValueError(
                f"adapter {self._active!r} must merge to a finite weight, got NaN or infinity in W + scale · B A"
            )
        return total

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the very W that ``merge`` set aside. Does nothing on a layer that is not merged."""
        if self.merged:
            assert self._unmerged_weight is not None
            _exchange(self.weight, self._unmerged_weight)
            self._unmerged_weight = None
            self._merged = None

    def unload(self) -> nn.Linear:
        """Turn this layer itself into a plain ``nn.Linear`` with the weight it has now; adapters are dropped."""
        for name in ("adapters", "impl", "disabled", "_active", "_computing", "_merged", "_unmerged_weight"):
            delattr(self, name)
        self.__class__ = nn.Linear  # type: ignore[assignment]
        return self

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear`` that computes what this layer computes now, with a weight of its own."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        adapter = self._active_module()
        weight = self.weight.data.clone() if adapter is None or self.merged else self._sum(adapter)
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.data.clone())
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, active_adapter={self._active!r}, impl={self.impl!r}" + (
            ", merged" if self.merged else ""
        )


def _exchange(parameter: Tensor, value: Tensor) -> Tensor:
    """Give the Parameter this value and return what it had."""
    if validation.is_dtensor(parameter):
        # assigning .data would leave its shard as it was
        had = parameter.detach().clone()
        parameter.copy_(value)
    else:
        had, parameter.data = parameter.data, value
    return had


def whole(tensor: Any) -> Tensor:
    """The tensor itself; of a DTensor, what the ranks of its mesh hold together: every one of them must come here."""
    return tensor.full_tensor() if validation.is_dtensor(tensor) else tensor
