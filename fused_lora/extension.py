"""The optional compiled extension ``fused_lora._C``: built by ``make native``, never needed.

Its operators mean what ``reference.lora_matmul`` and ``reference.adapter_grad`` mean. They run on CPU tensors, and on
CUDA tensors where it was built with nvcc against a PyTorch with CUDA.
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)


def _load() -> str | None:
    """Register the extension's operators; why that can't be, or None."""
    try:
        importlib.import_module("fused_lora._C")  # loading it registers its operators
    except ModuleNotFoundError:
        return "the compiled extension fused_lora._C is not built; build it with `make native`"
    except ImportError as error:
        return f"the compiled extension fused_lora._C does not load: {error}"
    return None


# at import: a call of a layer asks, and a compiler that traces it can't import
_PROBLEM = _load()
_HAS_CUDA = _PROBLEM is None and torch._C._dispatch_has_kernel_for_dispatch_key(
    "fused_lora_native::lora_matmul", "CUDA"
)  # fmt: skip


def available() -> bool:
    """Whether the extension is built and loads."""
    return _PROBLEM is None


def why_unavailable(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Why the extension cannot compute on tensors of this device and dtype, or None when it can."""
    cuda = device if device is not None and device.type == "cuda" else None
    if device is not None and device.type not in ("cpu", "cuda"):
        return f"the compiled extension computes on CPUs and CUDA devices, and the tensors are on {device.type}"
    dtypes = DTYPES if cuda is None else CUDA_DTYPES
    if dtype is not None and dtype not in dtypes:
        where = "" if cuda is None else " on a CUDA device"
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        return f"the compiled extension takes {names}{where}, not {dtype}"
    return _PROBLEM if _PROBLEM is not None or cuda is None else _cuda_problem(cuda)


def _cuda_problem(device: torch.device) -> str | None:
    if not _HAS_CUDA:
        return "the compiled extension was built without CUDA, which needs nvcc and a PyTorch with CUDA"
    gpu = capability(device)
    if gpu < MIN_CAPABILITY:
        return f"the GPU has compute capability {gpu}; the compiled extension needs {MIN_CAPABILITY} or later"
    return None


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; one without an index is the current one."""
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def lora_matmul(
    a: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, scale: float,
    seed: Tensor | None, dropout_p: float, dropout_on_output: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.ops.fused_lora_native.lora_matmul.default(a, w, u, v, bias, scale, seed, dropout_p, dropout_on_output)


def adapter_grad(
    x: Tensor | None, g: Tensor | None, dy: Tensor | None, h: Tensor | None, scale: float,
    seed: Tensor | None, dropout_p: float, dtype_A: torch.dtype, dtype_B: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    return torch.ops.fused_lora_native.adapter_grad.default(x, g, dy, h, scale, seed, dropout_p, dtype_A, dtype_B)


def lora_linear(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scale: float,
    seed: Tensor | None, dropout_p: float,
) -> Tensor:  # fmt: skip
    """The layer with its autograd, which ``functional._LoRALinear`` has for the other implementations."""
    return torch.ops.fused_lora_native.lora_linear.default(x, weight, lora_A, lora_B, bias, scale, seed, dropout_p)
