"""The Triton kernels as a backend. Importing this imports no Triton: the first call does."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .. import environment

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot compute on tensors of this device and dtype, or None when they can."""
    if not environment.TRITON_INSTALLED:
        return "Triton is not installed"
    if dtype not in DTYPES:
        return f"the Triton kernels take float16, bfloat16 and float32, not {dtype}"
    if environment.interpreting():
        return None
    if device.type != "cuda":
        return f"Triton needs a CUDA device (or TRITON_INTERPRET=1), and the tensors are on {device.type}"
    return environment.capability_problem(device, "the Triton kernels")


def lora_matmul(*operands: Any) -> Any:
    return _launch().lora_matmul(*operands)


def adapter_grad(*operands: Any) -> Any:
    return _launch().adapter_grad(*operands)


def plan(*operands: Any) -> Any:
    """``lora_matmul`` of operands like these, all but its scale, as something to be called: see ``launch.MatmulPlan``.

    None where every launch is to be looked at anew.
    """
    return None if environment.interpreting() else _launch().matmul_plan(*operands)


@functools.cache
def _launch() -> Any:
    from . import launch

    return launch
