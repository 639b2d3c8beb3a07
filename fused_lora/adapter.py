"""``LoRAAdapter``: the two thin matrices beside a linear layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import validation


class LoRAAdapter(nn.Module):
    """A pair of thin matrices and how much they count: ``lora_A (R, K)``, ``lora_B (N, R)``, ``scale``.

    Args:
        init: "kaiming" draws A as ``nn.Linear`` draws its weight (Kaiming-uniform, a = sqrt(5), as PEFT and loralib
            do); "gaussian" draws it from N(0, 1). B is zero, so a fresh adapter changes nothing.
        bias: (N,), of which the adapter trains a copy instead of the layer's own; None where it trains none.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    bias: nn.Parameter | None
    rank: int
    dropout: float
    use_rslora: bool
    scale: float
    _alpha: float
    trains_bias: bool
    init: str

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
        bias: Tensor | None = None,
    ) -> None:
        rank = validation.check_rank(rank)
        alpha = float(rank) if alpha is None else validation.check_alpha(alpha)
        dropout = validation.check_dropout(dropout)
        validation.check_init(init)
        super().__init__()
        self._hold(
            torch.empty(rank, in_features, device=device, dtype=dtype),
            torch.zeros(out_features, rank, device=device, dtype=dtype),
            alpha, dropout, use_rslora, None if bias is None else bias.detach().clone(), init,
        )  # fmt: skip
        self.reset_parameters()

    @classmethod
    def of(
        cls, lora_A: Tensor, lora_B: Tensor, *, alpha: float | None, dropout: float, use_rslora: bool,
        bias: Tensor | None = None,
    ) -> LoRAAdapter:  # fmt: skip
        """One that holds these very tensors, A (R, K), B (N, R) and bias (N,), without drawing anything."""
        alpha = float(lora_A.shape[0]) if alpha is None else validation.check_alpha(alpha)
        adapter = cls.__new__(cls)
        nn.Module.__init__(adapter)
        adapter._hold(lora_A, lora_B, alpha, validation.check_dropout(dropout), use_rslora, bias, "kaiming")
        return adapter

    def _hold(
        self, A: Tensor, B: Tensor, alpha: float, dropout: float, use_rslora: bool, bias: Tensor | None, init: str
    ) -> None:
        # past nn.Module, which looks at each value set whether it is a parameter or a module
        vars(self).update(
            rank=A.shape[0], dropout=dropout, use_rslora=bool(use_rslora), trains_bias=bias is not None, init=init,
        )  # fmt: skip
        self._parameters.update(
            lora_A=nn.Parameter(A), lora_B=nn.Parameter(B), bias=None if bias is None else nn.Parameter(bias)
        )
        self.alpha = alpha

    @property
    def alpha(self) -> float:
        """Setting it sets scale: alpha / R, or alpha / sqrt(R) for rsLoRA."""
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        # scale is stored, because a compiled graph takes a stored number as an input and computes no other
        vars(self).update(_alpha=alpha, scale=alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank))

    @classmethod
    def beside(cls, linear: nn.Linear, *, trains_bias: bool = False, **options: Any) -> LoRAAdapter:
        """A fresh one for this layer, on its device; with trains_bias, of its bias too where it has one."""
        bias = linear.bias if trains_bias else None
        return cls(linear.in_features, linear.out_features, device=linear.weight.device, bias=bias, **options)

    def trained(self) -> list[nn.Parameter]:
        """A, B, and the bias where it trains one."""
        return [self.lora_A, self.lora_B] if self.bias is None else [self.lora_A, self.lora_B, self.bias]

    def reset_parameters(self) -> None:
        if self.init == "gaussian":
            nn.init.normal_(self.lora_A)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def delta(self) -> Tensor:
        """``scale · B A``: (N, K), at least float32."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        with torch.no_grad():
            return (self.lora_B.to(dtype) @ self.lora_A.to(dtype)).mul_(self.scale)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}" + (
            ", rslora" if self.use_rslora else ""
        )
