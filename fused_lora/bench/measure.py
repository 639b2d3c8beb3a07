"""Time and memory: candidates take turns, so that what slows the machine down slows them all."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .results import Spread

Thunk = Callable[[], object]
# (call, count) -> milliseconds a call, over count calls in a row
Timer = Callable[[Thunk, int], float]

# at least this much is written to flush a GPU's cache
MIN_FLUSH = 1 << 28
# how much longer than the slowest candidate's host a GPU is kept busy; what that grows by where it was too short,
# and how often, before a call is taken for one whose host can't be hidden
MARGIN, GROWTH, ATTEMPTS = 1.5, 1.5, 5
HEAD_START_MS = 1.0
# that a GPU spins for to learn how many of them are a millisecond
CALIBRATION_CYCLES = 1_000_000


@dataclass(frozen=True)
class Staged:
    """A call of which a part is not timed. ready: does that part, and gives the call that does the rest, once."""

    ready: Callable[[], Thunk]

    def __call__(self) -> object:
        return self.ready()()


def ready(call: Thunk, count: int) -> Iterable[Thunk]:
    """What is to be timed in count calls: all that comes before is done."""
    if isinstance(call, Staged):
        return [call.ready() for _ in range(count)]
    return itertools.repeat(call, count)


@dataclass(frozen=True)
class Plan:
    """How long to measure a group: rounds to fill ``seconds``, within bounds; samples of at least ``sample_ms``."""

    seconds: float
    min_rounds: int
    max_rounds: int
    sample_ms: float


def plan_for(device: torch.device, quick: bool) -> Plan:
    if device.type == "cuda":
        # the cache is flushed before every call, so a sample is one call
        return Plan(0.3, 10, 20, 0.0) if quick else Plan(1.0, 20, 60, 0.0)
    return Plan(0.5, 5, 50, 0.5) if quick else Plan(5.0, 15, 200, 2.0)


# of what a GPU's user waits for, many calls in a row; and of the host alone, which must find an empty queue
WALL_PLAN, HOST_PLAN = Plan(0.5, 5, 20, 5.0), Plan(0.1, 5, 20, 0.0)


def _at_once() -> None:
    """Nothing to wait for."""


class HostTimer:
    """The host's clock. now: seconds.  before, after: waits for what is under way, before and within the time."""

    def __init__(
        self,
        now: Callable[[], float] = time.perf_counter,
        before: Callable[[], None] = _at_once,
        after: Callable[[], None] = _at_once,
    ) -> None:
        self._now, self._before, self._after = now, before, after

    def __call__(self, call: Thunk, count: int) -> float:
        calls = ready(call, count)
        self._before()
        start = self._now()
        for one in calls:
            one()
        self._after()
        return (self._now() - start) * 1e3 / count


class CudaTimer:
    """Device time between two events, with an L2 that holds nothing of the call's, and the host hidden.

    Before the first event the device flushes its cache and then spins, and the host issues the call meanwhile. An event
    that is reached before the host is done would time the host: the sample is taken again behind a longer spin, which
    stays for all that follows.

    head_start_ms: how long it spins.  exposed: calls whose host no spin hides, because they wait for the device or
    outgrow its queue; their times may hold the host's.  gpu: ``torch.cuda``, or its stand-in in a test.
    """

    def __init__(self, device: torch.device, head_start_ms: float = HEAD_START_MS, gpu: Any = torch.cuda) -> None:
        self.head_start_ms, self.exposed = head_start_ms, set[Thunk]()
        self._gpu = gpu
        cache = gpu.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(4 * cache, MIN_FLUSH), dtype=torch.int8, device=device)
        self._start, self._end = gpu.Event(enable_timing=True), gpu.Event(enable_timing=True)
        # the first time is that of a device that sleeps
        self._cycles_per_ms = [self._calibrate() for _ in range(2)][-1]

    def __call__(self, call: Thunk, count: int) -> float:
        return sum(self._once(call) for _ in range(count)) / count

    def _once(self, call: Thunk) -> float:
        head_start_ms = self.head_start_ms
        for _ in range(ATTEMPTS):
            ms, hidden = self._sample(call, head_start_ms)
            if hidden:
                self.head_start_ms = head_start_ms
                return ms
            if call in self.exposed:
                return ms
            head_start_ms *= GROWTH
        self.exposed.add(call)
        return ms

    def _sample(self, call: Thunk, head_start_ms: float) -> tuple[float, bool]:
        """Milliseconds, and whether all was issued before the first event came."""
        (one,) = ready(call, 1)
        self._flush.zero_()
        self._gpu._sleep(round(head_start_ms * self._cycles_per_ms))
        self._start.record()
        one()
        self._end.record()
        hidden = not self._start.query()
        self._end.synchronize()
        return self._start.elapsed_time(self._end), hidden

    def _calibrate(self) -> float:
        self._start.record()
        self._gpu._sleep(CALIBRATION_CYCLES)
        self._end.record()
        self._end.synchronize()
        return CALIBRATION_CYCLES / self._start.elapsed_time(self._end)


def timer_for(device: torch.device) -> Timer:
    return CudaTimer(device) if device.type == "cuda" else HostTimer()


@dataclass(frozen=True)
class Measurement:
    """samples: by name, milliseconds a call, one a round."""

    samples: dict[str, list[float]]

    def time(self, name: str) -> Spread:
        return Spread.of(self.samples[name])

    def ratio(self, name: str, baseline: str) -> Spread:
        """The spread of the ratios within each round, in which what slowed both down cancels."""
        pairs = zip(self.samples[name], self.samples[baseline], strict=True)
        return Spread.of(mine / base for mine, base in pairs)


def interleave(calls: Mapping[str, Thunk], timer: Timer, plan: Plan) -> Measurement:
    """Sample every call once a round, in another order each round: none always follows the same one."""
    for call in calls.values():
        call()
    cost = {name: min(timer(call, 1) for _ in range(3)) for name, call in calls.items()}
    count = {name: max(1, math.ceil(plan.sample_ms / ms)) if ms > 0 else 1 for name, ms in cost.items()}
    round_ms = sum(cost[name] * count[name] for name in calls)
    rounds = plan.max_rounds if round_ms <= 0 else int(plan.seconds * 1e3 / round_ms)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for _ in range(min(max(rounds, plan.min_rounds), plan.max_rounds)):
        shuffle(order)
        for name in order:
            samples[name].append(timer(calls[name], count[name]))
    return Measurement(samples)


@dataclass(frozen=True)
class Clocks:
    """time: a GPU's own, or a CPU's.  wall, host: what a GPU's user waits for one call of many, and what of it the host
    needs to issue it; None on a CPU, where all three are one.  exposed: names whose time may hold the host's.
    """

    time: Measurement
    wall: Measurement | None = None
    host: Measurement | None = None
    exposed: frozenset[str] = frozenset()


def on_every_clock(
    calls: Mapping[str, Thunk],
    device: torch.device,
    plan: Plan,
    gpu: Any = torch.cuda,
    now: Callable[[], float] = time.perf_counter,
) -> Clocks:
    """On a GPU the host is timed first: the device spins for longer than the slowest candidate's needs.

    gpu, now: as CudaTimer and HostTimer take them.
    """
    if device.type != "cuda":
        return Clocks(interleave(calls, HostTimer(now), plan))

    def wait() -> None:
        gpu.synchronize(device)

    host = interleave(calls, HostTimer(now, before=wait), HOST_PLAN)
    wall = interleave(calls, HostTimer(now, before=wait, after=wait), WALL_PLAN)
    timer = CudaTimer(device, MARGIN * max(host.time(name).median for name in calls), gpu)
    measured = interleave(calls, timer, plan)
    return Clocks(measured, wall, host, frozenset(name for name, call in calls.items() if call in timer.exposed))


def saved_bytes(call: Thunk, parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward, without the parameters', each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    for parameter in parameters:
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def peak_bytes(call: Thunk, device: torch.device) -> int:
    """The most memory that PyTorch's allocator had out during the call, above what it had out before it.

    What a library takes by other ways, such as a GEMM's packed operands on a CPU, is not in it. On a CPU only what the
    call itself allocates counts: what it releases of what was there before takes nothing off.
    """
    (one,) = ready(call, 1)
    if device.type != "cuda":
        return _host_peak(one)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    one()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _host_peak(call: Thunk) -> int:
    """From the profiler's record of every allocation and every release."""
    # or the profiler announces every recording on stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    changes.sort(key=lambda event: event["ts"])
    # address -> bytes. The release of an older block is recorded or not, with the size of whatever the profiler last
    # saw allocated at its address
    out: dict[int, int] = {}
    total = peak = 0
    for change in changes:
        address, size = change["args"]["Addr"], change["args"]["Bytes"]
        if size > 0:
            out[address] = size
            total += size
        else:
            total -= out.pop(address, 0)
        peak = max(peak, total)
    return peak
