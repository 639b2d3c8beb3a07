"""Counters by which the programs of one launch hand results to each other: all zero before it, and again after it.

A launch that uses them sets them back itself: launches on one stream share one set, in turn, and no memset is needed.
Two graphs captured on one stream share its counters too: replay them in turn, as graphs that share memory are.
"""

from __future__ import annotations

import threading
from collections import defaultdict

import torch
from torch import Tensor

from .configs import next_power_of_2

# flags for 16,000 rows of tiles: two million tokens
LEAST = 1 << 14
SPARES = 8

_counters: dict[tuple[torch.device, int], Tensor] = {}
_spares: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
# kept, because a captured graph may hold their addresses
_outgrown: list[Tensor] = []


def counters(device: torch.device, count: int) -> Tensor | None:
    """At least count int32 zeros for launches on device's current stream; None where none may be allocated.

    That is while a CUDA graph is captured, unless this stream has had counters before or a spare set, put aside at the
    first use of the device, is left.
    """
    if device.type != "cuda":
        return _grown((device, threading.get_ident()), count)
    stream = torch.cuda.current_stream(device)
    key = (device, stream.cuda_stream)
    with torch.cuda.device(device):
        if not torch.cuda.is_current_stream_capturing():
            if not _spares[device]:
                _spares[device] = [torch.zeros(LEAST, dtype=torch.int32, device=device) for _ in range(SPARES)]
            return _grown(key, count)
    known = _counters.get(key)
    if known is None and _spares[device]:
        known = _counters[key] = _spares[device].pop()
    return known if known is not None and known.numel() >= count else None


def _grown(key: tuple[torch.device, int], count: int) -> Tensor:
    known = _counters.get(key)
    if known is None or known.numel() < count:
        if known is not None:
            _outgrown.append(known)
        known = _counters[key] = torch.zeros(max(next_power_of_2(count), LEAST), dtype=torch.int32, device=key[0])
    return known
