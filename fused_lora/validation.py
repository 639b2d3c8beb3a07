"""Every error that a caller can meet, worded once: it names the argument, the rule and the value.

Nothing here changes anything; every public function calls its checks before its first effect.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor, nn

IMPLS = ("auto", "triton", "native", "eager")


def check_rank(rank: Any, name: str = "rank") -> int:
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral):
        raise TypeError(f"{name} must be an int of at least 1, got {rank!r}")
    if rank < 1:
        raise ValueError(f"{name} must be at least 1, got {rank}")
    return int(rank)


def _finite(value: Any, name: str) -> float:
    # numbers.Real is slow to ask, and a call of a layer asks twice
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{name} must be a finite number, got {value!r}")
    # a compiled call may have a symbolic number, which has no such test
    if not torch.compiler.is_compiling() and not _is_finite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    return float(value)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_alpha(alpha: Any, name: str = "alpha") -> float:
    return _finite(alpha, name)


def check_scale(scale: Any) -> float:
    return _finite(scale, "scale")


def check_weight(weight: Any) -> float:
    return _finite(weight, "weights")


def check_dropout(dropout: Any, name: str = "dropout") -> float:
    value = _finite(dropout, name)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
    return value


def check_impl(impl: Any) -> str:
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    return impl


def check_init(init: Any) -> str:
    if init not in ("kaiming", "gaussian"):
        raise ValueError(f"init must be 'kaiming' or 'gaussian', got {init!r}")
    return init


def check_adapter_name(name: Any) -> str:
    """Adapters are submodules, so their names must be ones that a module can bear."""
    if not isinstance(name, str):
        raise TypeError(f"adapter name must be a str, got {name!r}")
    if not name or "." in name or "/" in name or "\\" in name:
        raise ValueError(f"adapter name must be non-empty, without '.', '/' and '\\', got {name!r}")
    if hasattr(nn.ModuleDict, name) or name == "training":
        raise ValueError(f"adapter name must not be an attribute of torch.nn.ModuleDict, got {name!r}")
    return name


def check_adapter_names(names: Any) -> tuple[str, ...]:
    """One name, several, or None for none, as a tuple."""
    if names is None:
        return ()
    if isinstance(names, str):
        return (names,)
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"adapter names must be a str, a list of them, or None, got {names!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"adapter names must differ, got {names!r}")
    return tuple(names)


def check_known_adapter(name: Any, known: Any) -> None:
    if name not in known:
        listed = ", ".join(repr(n) for n in sorted(known)) or "none"
        raise ValueError(f"adapter {name!r} is not here; adapters: {listed}")


def check_new_adapter(name: str, known: Any) -> None:
    if name in known:
        raise ValueError(f"adapter {name!r} is here already; delete it first or choose another name")


def check_operands(x: Any, weight: Any, lora_A: Any, lora_B: Any, bias: Any) -> None:
    """Types, dimensions and shapes, then devices and dtypes, of ``lora_linear``'s tensors."""
    for name, value in (("x", x), ("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a Tensor or None, got {type(bias).__name__}")
    if weight.dim() != 2:
        raise ValueError(f"weight must be (N, K), got shape {tuple(weight.shape)}")
    N, K = weight.shape
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"x must be (..., K) with K = {K}, got shape {tuple(x.shape)}")
    if lora_A.dim() != 2 or lora_A.shape[1] != K or lora_A.shape[0] < 1:
        raise ValueError(f"lora_A must be (R, K) with R >= 1 and K = {K}, got shape {tuple(lora_A.shape)}")
    if lora_B.shape != (N, lora_A.shape[0]):
        raise ValueError(f"lora_B must be (N, R) = {(N, lora_A.shape[0])}, got shape {tuple(lora_B.shape)}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias must be (N,) = {(N,)}, got shape {tuple(bias.shape)}")
    device = x.device
    for name, value in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B), ("bias", bias)):
        if value is not None and value.device != device:
            raise ValueError(f"{name} must be on x's device, {device}, got {value.device}")


def check_dtypes(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> None:
    """x and bias have the weight's dtype; adapters that or float32, and are rounded to the weight's."""
    dtype = weight.dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(f"weight must be float16, bfloat16, float32 or float64, got {dtype}")
    if x.dtype != dtype:
        raise TypeError(f"x must have weight's dtype, {dtype}, got {x.dtype}; cast x, or use torch.autocast")
    if bias is not None and bias.dtype != dtype:
        raise TypeError(f"bias must have weight's dtype, {dtype}, got {bias.dtype}")
    for name, adapter in (("lora_A", lora_A), ("lora_B", lora_B)):
        if adapter.dtype not in (dtype, torch.float32):
            raise TypeError(f"{name} must have weight's dtype, {dtype}, or torch.float32, got {adapter.dtype}")
