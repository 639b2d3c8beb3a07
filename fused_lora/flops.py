"""How many floating-point operations the operators are, for ``torch.utils.flop_counter.FlopCounterMode``."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch

from .torch_internals import active_modes

Shape = Sequence[int]


def _lora_matmul(a: Shape, w: Shape, u: Shape, v: Shape, *rest: Any, **also: Any) -> int:
    M, (Q, P), R = math.prod(a[:-1]), w, u[1]
    return 2 * M * (Q * P + Q * R + R * P)


def _adapter_grad(x: Shape | None, g: Shape | None, dy: Shape | None, h: Shape | None, *rest: Any, **also: Any) -> int:
    of_A = 0 if x is None or g is None else g[0] * g[1] * x[-1]
    of_B = 0 if dy is None or h is None else h[0] * h[1] * dy[-1]
    return 2 * (of_A + of_B)


_FORMULAS = {"lora_matmul": _lora_matmul, "adapter_grad": _adapter_grad}


def register() -> None:
    """Tell PyTorch's counter, where it has been imported; importing it would take half a second, and Triton.

    A counter copies the known formulas when it is made, so one that counts already is told too.
    """
    module: Any = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    counting = [mode.counter.flop_registry for mode in active_modes() if hasattr(mode, "counter")]
    for name, formula in _FORMULAS.items():
        operator = getattr(torch.ops.fused_lora, name)
        if operator not in module.flop_registry:
            module.register_flop_formula(operator)(formula)
        for registry in counting:
            registry.setdefault(operator, module.flop_registry[operator])
