"""What is asked of PyTorch's private parts: here and nowhere else, so that a new version is one file to look at."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

# modes that see every operator, as selective checkpointing's does: how many are active
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
in_functorch: Callable[[], bool] = torch._C._are_functorch_transforms_active
# on any kind of device: asking about one by its name takes a microsecond
any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
# -1 outside a thread of autograd's own
graph_task: Callable[[], int] = torch._C._current_graph_task_id
is_tracing: Callable[[], bool] = torch._C._is_tracing
# a device's index, and its current stream as an int; a build without CUDA has neither
current_device: Callable[[], int | None] = getattr(torch._C, "_cuda_getDevice", lambda: None)
raw_stream: Callable[[int | None], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)


def in_forward_ad() -> bool:
    return forward_ad._current_level >= 0


def has_kernel(operator: str, key: str) -> bool:
    """Whether an operator ("library::name") is implemented for a dispatch key ("CUDA")."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)
