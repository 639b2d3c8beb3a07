"""The optional compiled extension ``fused_lora._C``: built by ``make native``, never needed.

It runs on CPU tensors, and on CUDA tensors where it was built with nvcc against a PyTorch with CUDA.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..torch_internals import function_of
from . import environment

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available() -> bool:
    """Whether the extension is built and loads."""
    return environment.EXTENSION_PROBLEM is None


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the extension cannot compute on tensors of this device and dtype, or None when it can."""
    if device.type not in ("cpu", "cuda"):
        return f"the compiled extension computes on CPUs and CUDA devices, and the tensors are on {device.type}"
    on_gpu = device.type == "cuda"
    dtypes = CUDA_DTYPES if on_gpu else DTYPES
    if dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        return f"the compiled extension takes {names}{' on a CUDA device' if on_gpu else ''}, not {dtype}"
    if environment.EXTENSION_PROBLEM is not None or not on_gpu:
        return environment.EXTENSION_PROBLEM
    if not environment.EXTENSION_HAS_CUDA:
        return "the compiled extension was built without CUDA, which needs nvcc and a PyTorch with CUDA"
    return environment.capability_problem(device, "the compiled extension's kernels")


@functools.cache
def _operator(name: str) -> Callable[..., Any]:
    # to look it up takes the host as long as a small product
    return function_of(getattr(torch.ops.fused_lora_native, name).default)


def lora_matmul(
    a: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, scale: float,
    seed: Tensor | None, dropout_p: float, dropout_on_output: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _operator("lora_matmul")(a, w, u, v, bias, scale, seed, dropout_p, dropout_on_output)


def adapter_grad(
    x: Tensor | None, g: Tensor | None, dy: Tensor | None, h: Tensor | None, scale: float,
    seed: Tensor | None, dropout_p: float, dtype_A: torch.dtype, dtype_B: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    return _operator("adapter_grad")(x, g, dy, h, scale, seed, dropout_p, dtype_A, dtype_B)


def lora_linear(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scale: float,
    seed: Tensor | None, dropout_p: float,
) -> Tensor:  # fmt: skip
    """The layer with its autograd, which ``functional._LoRALinear`` has for the other implementations."""
    return _operator("lora_linear")(x, weight, lora_A, lora_B, bias, scale, seed, dropout_p)


def why_not_hopper(device: torch.device, M: int, K: int, N: int, R: int, dtype: torch.dtype) -> str | None:
    """Why the extension's forward of a layer of these sizes is not by the kernels that Hopper alone has, or None.

    device: a CUDA device that the extension can run on.
    """
    x, weight = (torch.empty(size, K, dtype=dtype, device=device) for size in (M, N))
    lora_A, lora_B = torch.empty(R, K, dtype=dtype, device=device), torch.empty(N, R, dtype=dtype, device=device)
    return _operator("why_not_hopper")(x, weight.t(), lora_A.t(), lora_B.t(), None, 0.0, False) or None
