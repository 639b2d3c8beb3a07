"""What is asked of PyTorch's private parts: here and nowhere else, so that a new version is one file to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction
from torch.utils import _python_dispatch, checkpoint

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError as error:
    GUARDS_PROBLEM: str | None = f"PyTorch {torch.__version__} has no guards of tensors: {error}"
else:
    GUARDS_PROBLEM = None

Guard = Callable[..., bool]

# modes that see every operator, as selective checkpointing's does: how many are active
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
in_functorch: Callable[[], bool] = torch._C._are_functorch_transforms_active
# on any kind of device: asking about one by its name takes a microsecond
any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
# -1 outside of a backward
graph_task: Callable[[], int] = torch._C._current_graph_task_id
is_tracing: Callable[[], bool] = torch._C._is_tracing
# a device's index, and its current stream as an int; a build without CUDA has neither
current_device: Callable[[], int | None] = getattr(torch._C, "_cuda_getDevice", lambda: None)
raw_stream: Callable[[int | None], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)

# (tensor, sizes): the same memory in another shape, and no view to autograd; nobody else may hold the tensor
unsafe_view: Callable[[Tensor, tuple[int, ...]], Tensor] = torch.ops.aten._unsafe_view.default._op


def guard(*tensors: Tensor) -> Guard:
    """Whether other tensors are like these, in as many arguments: of their very classes, layouts, shapes, strides,
    dtypes, devices, with requires_grad as theirs, and seen by the same modes, transforms, tracers and autocast. What
    ``torch.compile`` guards a graph with: one call of C++. Only where GUARDS_PROBLEM is None."""
    sizes: list[Any]
    strides: list[Any]
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


_float32_precision: Callable[[str, str], str] | None = getattr(torch._C, "_get_fp32_precision_getter", None)


def allows_tf32() -> bool:
    """Whether float32 products on a GPU may be made in TF32, however that was set.

    PyTorch has older settings (``torch.set_float32_matmul_precision``) and, from 2.9 on, newer ones
    (``torch.backends.cuda.matmul.fp32_precision``). The older question raises once a newer setting was made; the newer
    one is answered after either.
    """
    if _float32_precision is None:
        return torch.get_float32_matmul_precision() != "highest"
    return _float32_precision("cuda", "matmul") == "tf32"


def passes(frame: FrameType | None) -> Iterator[tuple[object, bool]]:
    """The passes of autograd that call the code of this frame, innermost first, and whether each is a backward.

    A pass is what checkpointing does first in a forward and again in a backward, under one object that both have: the
    ``ctx`` of an ``autograd.Function``, as reentrant checkpointing is, or what ``checkpoint`` keeps of a block.
    """
    while frame is not None:
        code = frame.f_code
        found: Any = None
        if code.co_varnames[:1] == ("ctx",):
            found = frame.f_locals.get("ctx")
            found = found if isinstance(found, BackwardCFunction) else None
        elif code.co_filename == checkpoint.__file__:
            found = frame.f_locals.get("frame")
            if (generator := frame.f_locals.get("gen")) is not None and generator.gi_frame is not None:
                found = generator.gi_frame.f_locals.get("new_frame")
        if found is not None:
            yield found, code.co_name in ("backward", "vjp", "unpack_hook")
        frame = frame.f_back


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in on such a device now, or None where it is off.

    Of the meta device PyTorch can't be asked; nothing is cast there.
    """
    if not any_autocast() or device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


# for who asks in every call: ``in_forward_ad`` without a call
FORWARD_AD: Any = forward_ad


def in_forward_ad() -> bool:
    return forward_ad._current_level >= 0


def active_modes() -> list[Any]:
    """The modes that see every operator, outermost first."""
    return _python_dispatch._get_current_dispatch_mode_stack()


def exports() -> bool:
    """Whether this call is recorded as a program that others run: by ``torch.export``, ``torch.jit.trace`` or
    ``torch.onnx.export``."""
    if torch.compiler.is_compiling():
        # the flag itself: under Dynamo, is_exporting() is always True in some versions
        return torch.compiler._is_exporting_flag
    return is_tracing()


def function_of(operator: Any) -> Callable[..., Any]:
    """The C++ function that an operator of ``torch.ops``, of one overload, hands its arguments to."""
    return operator._op


def has_kernel(operator: str, key: str) -> bool:
    """Whether an operator ("library::name") is implemented for a dispatch key ("CUDA")."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)
