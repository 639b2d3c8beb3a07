"""What this machine offers: Triton, the compiled extension, GPUs, a CPU's libraries. Only this module looks.

What a layer's call needs to know is found at import, because a compiler that traces the call could not look.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pathlib

import torch

from ..torch_internals import has_kernel

# looking for it does not import it
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
MIN_CAPABILITY = (8, 0)


_BUILD = (
    "FUSED_LORA_BUILD_EXT=1 pip install --no-build-isolation --force-reinstall --no-deps "
    "git+https://github.com/fused-lora/fused_lora"
)


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU, for testing."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def extension_problem() -> str | None:
    """Load the compiled extension, which registers its operators; why that can't be, or None."""
    try:
        importlib.import_module("fused_lora._C")
    except ModuleNotFoundError:
        return f"the compiled extension fused_lora._C is not built; build it: `{_BUILD}`, or `make native` in a clone"
    except ImportError as error:
        return f"the compiled extension fused_lora._C does not load: {error}"
    return None


EXTENSION_PROBLEM = extension_problem()
EXTENSION_HAS_CUDA = EXTENSION_PROBLEM is None and has_kernel("fused_lora_native::lora_matmul", "CUDA")


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; one without an index is the current one."""
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def capability_problem(device: torch.device, who: str) -> str | None:
    """Why the kernels of ``who`` can't run on this CUDA device, or None."""
    gpu = capability(device)
    if gpu < MIN_CAPABILITY:
        return f"the GPU has compute capability {gpu}; {who} need {MIN_CAPABILITY} or later"
    return None


@functools.cache
def onednn_is_faster() -> bool:
    """Whether float32 products should be oneDNN's: PyTorch's own come from MKL, which is at its best on Intel alone."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
