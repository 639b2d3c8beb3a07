"""What ``torch.autocast`` asks for, where it can be asked."""

from __future__ import annotations

import torch

from .torch_internals import any_autocast


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in on such a device now, or None where it is off.

    Of the meta device PyTorch can't be asked; nothing is cast there.
    """
    if not any_autocast() or device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
