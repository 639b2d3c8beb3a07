"""What ``torch.autocast`` asks for, where it can be asked."""

from __future__ import annotations

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast computes in on such a device, or None where it is off. Of meta PyTorch can't be asked."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)
