"""The operators as PyTorch sees them: schemas, shapes of results, and which implementation runs. Imports torch alone.

``fused_lora::lora_matmul`` and ``fused_lora::adapter_grad`` mean what their eager implementations in ``reference.py``
compute. They carry no autograd of their own: ``functional.py`` does.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from . import extension, reference

LIBRARY = torch.library.Library("fused_lora", "DEF")

LIBRARY.define(
    "lora_matmul(Tensor a, Tensor w, Tensor u, Tensor v, Tensor? bias, float scale, "
    "Tensor? seed, float dropout_p, bool dropout_on_output, str impl) -> (Tensor out, Tensor thin)"
)
LIBRARY.define(
    "adapter_grad(Tensor? x, Tensor? g, Tensor? dy, Tensor? h, float scale, "
    "Tensor? seed, float dropout_p, ScalarType dtype_A, ScalarType dtype_B, str impl) -> (Tensor dA, Tensor dB)"
)

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_CAPABILITY = (8, 0)


# --------------------------------------------------------------------------------------------------
# Which implementations can run, and why others can't
# --------------------------------------------------------------------------------------------------


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU, for testing."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


# asked at import, as extension.py asks for the extension; looking for it does not import it
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_installed() -> bool:
    return _TRITON_INSTALLED


def why_unavailable(impl: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``impl`` cannot compute on tensors of this device and dtype, or None when it can."""
    if impl == "eager":
        return None
    if impl == "native":
        return extension.why_unavailable(device, dtype)
    if not triton_installed():
        return "Triton is not installed"
    if dtype not in TRITON_DTYPES:
        return f"the Triton kernels take float16, bfloat16 and float32, not {dtype}"
    if interpreting():
        return None
    if device.type != "cuda":
        return f"Triton needs a CUDA device (or TRITON_INTERPRET=1), and the tensors are on {device.type}"
    capability = extension.capability(device)
    if capability < MIN_CAPABILITY:
        return f"the GPU has compute capability {capability}; the Triton kernels need {MIN_CAPABILITY} or later"
    return None


# A compiler that traces a call asks once and keeps the answer: what is installed, and what a GPU can do, stays. This is
# torch.compiler.assume_constant_result without its import of Dynamo, which would double that of this package.
why_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_impl(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation that runs: the one asked for, or RuntimeError; for "auto", by this rule:

    on a CPU "native" where the extension is built; on a CUDA device "triton" where it can run, else "native" where it
    can; everywhere else "eager". On an H100 (benchmarks/results) "native" is ahead of "triton" for few tokens, where
    the host decides, and level with it or behind above: the order is that of the sizes that are trained.

    On a CPU it is measured (benchmarks/results/native): beside "eager", a step of RichBoyNet and a token's forward take
    a third to a half less, and a step of 512 tokens the same.
    """
    if impl == "auto":
        # the CPU is asked first: it is where a microsecond shows
        if device.type == "cpu":
            return "native" if extension.available() and dtype in extension.DTYPES else "eager"
        if device.type != "cuda":
            return "eager"
        # a loop: Dynamo of torch 2.8 knows no next() with a default
        for name in ("triton", "native"):
            if why_unavailable(name, device, dtype) is None:
                return name
        return "eager"
    if impl != "eager":
        why = why_unavailable(impl, device, dtype)
        if why is not None:
            raise RuntimeError(f"impl={impl!r} cannot run here: {why}")
    return impl


# --------------------------------------------------------------------------------------------------
# Dispatch
# --------------------------------------------------------------------------------------------------


def _implementation(impl: str):  # type: ignore[no-untyped-def]  # a module with lora_matmul and adapter_grad
    if impl == "eager":
        return reference
    if impl == "native":
        return extension
    # here, not at the top: importing fused_lora must not import Triton
    from .kernels import launch

    return launch


def _lora_matmul(
    a: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, scale: float,
    seed: Tensor | None, dropout_p: float, dropout_on_output: bool, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _implementation(impl).lora_matmul(a, w, u, v, bias, scale, seed, dropout_p, dropout_on_output)


def _adapter_grad(
    x: Tensor | None, g: Tensor | None, dy: Tensor | None, h: Tensor | None, scale: float,
    seed: Tensor | None, dropout_p: float, dtype_A: torch.dtype, dtype_B: torch.dtype, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dA, dB = _implementation(impl).adapter_grad(x, g, dy, h, scale, seed, dropout_p, dtype_A, dtype_B)
    # an operator must return tensors: an empty one stands for a gradient that was not asked for
    like = x if x is not None else dy
    assert like is not None
    return (like.new_empty(0) if dA is None else dA), (like.new_empty(0) if dB is None else dB)


def _lora_matmul_shapes(
    a: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, scale: float,
    seed: Tensor | None, dropout_p: float, dropout_on_output: bool, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = 1
    for size in a.shape[:-1]:
        rows = rows * size
    return a.new_empty((*a.shape[:-1], w.shape[1])), a.new_empty((rows, u.shape[1]))


def _adapter_grad_shapes(
    x: Tensor | None, g: Tensor | None, dy: Tensor | None, h: Tensor | None, scale: float,
    seed: Tensor | None, dropout_p: float, dtype_A: torch.dtype, dtype_B: torch.dtype, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    like = x if x is not None else dy
    assert like is not None
    dA = like.new_empty(0) if x is None or g is None else x.new_empty((g.shape[1], x.shape[-1]), dtype=dtype_A)
    dB = like.new_empty(0) if dy is None or h is None else dy.new_empty((dy.shape[-1], h.shape[1]), dtype=dtype_B)
    return dA, dB


LIBRARY.impl("lora_matmul", _lora_matmul, "CompositeExplicitAutograd")
LIBRARY.impl("adapter_grad", _adapter_grad, "CompositeExplicitAutograd")
torch.library.register_fake("fused_lora::lora_matmul", _lora_matmul_shapes, lib=LIBRARY)
torch.library.register_fake("fused_lora::adapter_grad", _adapter_grad_shapes, lib=LIBRARY)


def lora_matmul(
    a: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, scale: float,
    seed: Tensor | None, dropout_p: float, dropout_on_output: bool, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator, or its eager implementation itself: only a compiler needs the boundary, and it costs a small step
    more than its arithmetic."""
    if impl == "eager" and not torch.compiler.is_compiling():
        return reference.lora_matmul(a, w, u, v, bias, scale, seed, dropout_p, dropout_on_output)
    return torch.ops.fused_lora.lora_matmul.default(a, w, u, v, bias, scale, seed, dropout_p, dropout_on_output, impl)


def adapter_grad(
    x: Tensor | None, g: Tensor | None, dy: Tensor | None, h: Tensor | None, scale: float,
    seed: Tensor | None, dropout_p: float, dtype_A: torch.dtype, dtype_B: torch.dtype, impl: str,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """As :func:`lora_matmul`. A gradient that was not asked for is None or empty."""
    if impl == "eager" and not torch.compiler.is_compiling():
        return reference.adapter_grad(x, g, dy, h, scale, seed, dropout_p, dtype_A, dtype_B)
    return torch.ops.fused_lora.adapter_grad.default(x, g, dy, h, scale, seed, dropout_p, dtype_A, dtype_B, impl)
