"""Scratch memory and counters: each stream has its own, and its launches use them one after the other.

By counters programs of one launch hand results to each other: all are zero before it, and again after it.

A launch that uses them sets them back itself, so launches on one stream share one set in turn, without a memset.
Graphs captured on a stream share what it had by then: replay them in turn, as graphs that share memory are, and not
beside other launches on that stream.

Both are allocated on a thread of their own. A memory pool that is current on the caller's thread must not own either:
``torch.compile(mode="reduce-overhead")`` makes one current for its warm-up, before it captures anything, and refuses
tensors that stay in it. Since torch 2.8 a pool is current on one thread alone (``torch.cuda.use_mem_pool`` says so). A
pool of our own within it would not do: in 2.8 the outer one wins (pytorch/pytorch#161193).
That the module does this is tested with a simulated allocator; that torch does what is said here was read in its
sources, of 2.8, 2.11 and 2.13, and has not run on a GPU.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ...torch_internals import raw_stream
from .configs import next_power_of_2

# flags for 16,000 rows of tiles: two million tokens
LEAST = 1 << 14
SPARES = 8

_counters: dict[tuple[torch.device, int], Tensor] = {}
_scratch: dict[tuple[torch.device, int], Tensor] = {}
_spares: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
# kept, because a captured graph may hold their addresses
_outgrown: list[Tensor] = []
# two threads on one stream must find one set
_lock = threading.Lock()


def stream_of(device: torch.device) -> int:
    """The handle of the device's current stream; on a CPU a thread's number, as each is a stream of its own."""
    return raw_stream(device.index) if device.type == "cuda" else threading.get_ident()


def counters(device: torch.device, count: int, stream: int | None = None) -> Tensor | None:
    """At least count int32 zeros for launches on device's current stream; None where none may be allocated.

    That is while a CUDA graph is captured, unless this stream has had counters before or a spare set, put aside at the
    first use of the device, is left.  stream: :func:`stream_of` device, from who knows it.
    """
    key = (device, stream_of(device) if stream is None else stream)
    known = _counters.get(key)
    on_gpu = device.type == "cuda"
    if known is not None and known.numel() >= count and (_spares[device] or not on_gpu):
        return known
    with _lock:
        return _found(key, count) if on_gpu and _capturing(device) else _made(key, count)


def scratch(device: torch.device, size: int, stream: int) -> Tensor | None:
    """At least size bytes for what launches on this stream need beside their results, one after the other.

    None while a CUDA graph is captured, unless this stream has had as many before.
    """
    key, size = (device, stream), max(next_power_of_2(size), LEAST)
    with _lock:
        known = _scratch.get(key)
        if known is not None and known.nbytes >= size:
            return known
        if device.type == "cuda" and _capturing(device):
            return None
        made = _apart(device, lambda: torch.empty(size, dtype=torch.uint8, device=device))
        if known is not None:
            _outgrown.append(known)
        _scratch[key] = made
        return made


def _capturing(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _found(key: tuple[torch.device, int], count: int) -> Tensor | None:
    """Counters that are there already."""
    known, spares = _counters.get(key), _spares[key[0]]
    if known is None and spares:
        known = _counters[key] = spares.pop()
    return known if known is not None and known.numel() >= count else None


def _made(key: tuple[torch.device, int], count: int) -> Tensor:
    """Counters that are there or made now, and spare ones with them."""
    device, known = key[0], _counters.get(key)
    if device.type == "cuda" and not _spares[device]:
        _spares[device] += _zeros(device, SPARES * LEAST).split(LEAST)
    if known is None or known.numel() < count:
        made = _zeros(device, max(next_power_of_2(count), LEAST))
        if known is not None:
            _outgrown.append(known)
        known = _counters[key] = made
    return known


def _zeros(device: torch.device, count: int) -> Tensor:
    """count int32 zeros."""
    return _apart(device, lambda: torch.zeros(count, dtype=torch.int32, device=device))


def _apart(device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """What ``make`` makes, for any stream; no pool of this thread owns it."""

    def finished() -> Tensor:
        made = make()
        if device.type == "cuda":
            # it is written on this thread's stream, and used on another
            torch.cuda.current_stream(device).synchronize()
        return made

    with ThreadPoolExecutor(max_workers=1) as elsewhere:
        return elsewhere.submit(finished).result()
