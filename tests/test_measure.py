"""Measuring itself: turns, spreads, what is kept and what is out at most; no time is held to anything here."""

from __future__ import annotations

import types

import pytest
import torch

from fused_lora.bench import baselines, measure, workloads
from fused_lora.bench.shapes import BACKWARD, DECODE, FORWARD, STEP, Shape
from fused_lora.bench.workloads import LayerWorkload

CPU = torch.device("cpu")
SMALL = Shape("small", 6, 20, 12, 3, ("cpu",), bias=True)


class Clock:
    """Time that passes in calls alone; ``slowness`` stands for a machine with other work."""

    def __init__(self):
        self.seconds, self.slowness = 0.0, 1.0
        self.calls = []

    def __call__(self):
        return self.seconds

    def takes(self, name, ms):
        def call():
            self.calls.append(name)
            self.seconds += ms * 1e-3 * self.slowness

        return call


def test_every_candidate_is_sampled_once_a_round_in_changing_order():
    clock = Clock()
    calls = {name: clock.takes(name, ms) for name, ms in (("frozen", 1.0), ("ours", 1.5), ("eager", 3.0))}
    plan = measure.Plan(seconds=0.055, min_rounds=2, max_rounds=50, sample_ms=0.0)
    measured = measure.interleave(calls, measure.HostTimer(clock), plan)
    assert {name: len(samples) for name, samples in measured.samples.items()} == dict.fromkeys(calls, 10)
    assert measured.time("ours").median == pytest.approx(1.5)
    assert measured.ratio("eager", "frozen").median == pytest.approx(3.0)
    rounds = [tuple(clock.calls[-3 * n : len(clock.calls) - 3 * n + 3]) for n in range(1, 11)]
    assert all(set(order) == set(calls) for order in rounds)
    assert len(set(rounds)) > 1


def test_short_calls_are_repeated_to_fill_a_sample():
    clock = Clock()
    plan = measure.Plan(seconds=0.0, min_rounds=2, max_rounds=2, sample_ms=2.0)
    measured = measure.interleave({"a": clock.takes("a", 0.03)}, measure.HostTimer(clock), plan)
    assert len(clock.calls) == 1 + 3 + 2 * 67
    assert measured.time("a").median == pytest.approx(0.03)


class Gpu(Clock):
    """``torch.cuda`` of a device that runs what the host issues, in order, on the host's clock; a cycle is a ns."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.idle_at, gpu = 0.0, self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                gpu.calls.append("record")
                self.at = max(gpu.idle_at, gpu.seconds)

            def query(self):
                return self.at <= gpu.seconds

            def synchronize(self):
                gpu.seconds = max(gpu.seconds, self.at)

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        class Buffer(torch.Tensor):
            def zero_(self):
                gpu.calls.append("flush")

        self.Event = Event
        monkeypatch.setattr(torch, "empty", lambda size, **options: torch.zeros(16).as_subclass(Buffer))

    def get_device_properties(self, device):
        return types.SimpleNamespace(L2_cache_size=100)

    def synchronize(self, device=None):
        self.seconds = max(self.seconds, self.idle_at)

    def _sleep(self, cycles):
        self.calls.append("sleep")
        self.idle_at = max(self.idle_at, self.seconds) + cycles * 1e-9

    def issues(self, name, host_ms, device_ms, launches=4):
        """A call: launches that take the host and the device so long in all."""

        def call():
            self.calls.append(name)
            for _ in range(launches):
                self.seconds += host_ms / launches * 1e-3 * self.slowness
                self.idle_at = max(self.idle_at, self.seconds) + device_ms / launches * 1e-3

        return call


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


def test_the_cache_is_flushed_and_the_gpu_kept_busy_before_every_call(gpu):
    timer = measure.CudaTimer(CPU, gpu=gpu)
    gpu.calls.clear()
    assert timer(gpu.issues("call", 0.1, 0.3), 2) == pytest.approx(0.3)
    assert gpu.calls == ["flush", "sleep", "record", "call", "record"] * 2


def test_the_gpu_is_kept_busy_for_as_long_as_the_slowest_host_needs(gpu):
    timer, slow, quick = measure.CudaTimer(CPU, 1.0, gpu), gpu.issues("slow", 3.0, 0.2), gpu.issues("quick", 0.1, 0.2)
    assert timer(quick, 1) == pytest.approx(0.2)
    assert timer.head_start_ms == 1.0
    # too short for this one: its samples that hold the host's time are thrown away
    assert timer(slow, 1) == pytest.approx(0.2)
    assert 3.0 < timer.head_start_ms < 3.0 * measure.GROWTH
    assert gpu.calls.count("slow") == 4
    # and it stays as long
    assert timer(slow, 3) == pytest.approx(0.2)
    assert gpu.calls.count("slow") == 7
    assert timer.exposed == set()


def test_a_host_that_cannot_be_hidden_is_said_to_show_and_costs_the_others_nothing(gpu):
    call = gpu.issues("waits", 1.0, 0.2)

    def waits():
        gpu.synchronize()
        call()

    timer = measure.CudaTimer(CPU, 2.0, gpu)
    assert timer(waits, 1) > 0.9
    assert timer.exposed == {waits}
    assert (timer.head_start_ms, gpu.calls.count("waits")) == (2.0, measure.ATTEMPTS)
    # it is not tried for over and over
    timer(waits, 1)
    assert gpu.calls.count("waits") == measure.ATTEMPTS + 1


def test_a_sample_that_is_taken_again_is_made_ready_again(gpu):
    made = []

    def ready():
        made.append(gpu.issues("backward", 3.0, 0.5))
        return made[-1]

    assert measure.CudaTimer(CPU, 1.0, gpu)(measure.Staged(ready), 1) == pytest.approx(0.5)
    assert len(made) == gpu.calls.count("backward") == 4


def test_device_wall_and_host_are_told_apart(gpu):
    calls = {"ours": gpu.issues("ours", 1.0, 0.2), "big": gpu.issues("big", 0.1, 2.0)}
    plan = measure.Plan(0.0, 3, 3, 0.0)
    clocks = measure.on_every_clock(calls, torch.device("cuda"), plan, gpu, gpu)
    assert [clocks.time.time(name).median for name in calls] == pytest.approx([0.2, 2.0])
    assert [clocks.host.time(name).median for name in calls] == pytest.approx([1.0, 0.1])
    # the one waits for its host, the other for the device; the last launch of the one, the first of the other show too
    assert [clocks.wall.time(name).median for name in calls] == pytest.approx([1.0, 2.0], rel=0.02)
    assert clocks.exposed == frozenset()


def test_on_a_cpu_there_is_one_clock():
    clock = Clock()
    clocks = measure.on_every_clock({"a": clock.takes("a", 1.0)}, CPU, measure.Plan(0.0, 2, 2, 0.0), now=clock)
    assert clocks.time.time("a").median == pytest.approx(1.0)
    assert (clocks.wall, clocks.host) == (None, None)


def test_what_slows_a_whole_round_cancels_in_the_ratio():
    samples = {"frozen": [1.0, 8.0, 2.0, 1.0], "ours": [1.1, 8.8, 2.2, 1.1]}
    spread = measure.Measurement(samples).ratio("ours", "frozen")
    assert (spread.median, spread.p20, spread.p80) == pytest.approx((1.1, 1.1, 1.1))


def test_spread_is_median_and_fifths():
    spread = measure.Spread.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (spread.median, spread.p20, spread.p80) == (3.5, 2.0, 5.0)


def test_ours_keeps_x_and_the_low_rank_product_and_parametrize_a_whole_weight():
    workload = LayerWorkload(STEP, SMALL, "float32", CPU)

    def kept(name):
        candidate = workload.candidate(name)
        return measure.saved_bytes(candidate.call, candidate.parameters)

    x, h = SMALL.M * SMALL.K * 4, SMALL.M * SMALL.R * 4
    assert kept("frozen") == 0
    assert kept("ours-eager") == x + h
    assert kept("addmm") == x
    assert kept("parametrize") >= x + SMALL.N * SMALL.K * 4


def test_a_storage_is_counted_once():
    a = torch.randn(4, 4, requires_grad=True)
    b = torch.randn(4, 4)
    assert measure.saved_bytes(lambda: (a * b).sum() + (a * b.t()).sum(), [a]) == 64


def test_what_comes_before_the_timed_part_takes_no_time_and_is_done_for_every_call():
    clock = Clock()

    def ready():
        clock.takes("before", 7.0)()
        return clock.takes("timed", 1.0)

    assert measure.HostTimer(clock)(measure.Staged(ready), 3) == pytest.approx(1.0)
    assert clock.calls == ["before"] * 3 + ["timed"] * 3


def test_the_peak_is_the_most_that_was_out_at_once():
    def call():
        first, second = torch.zeros(1000), torch.zeros(2000)
        del first
        third = torch.zeros(500)
        return second, third

    old = torch.zeros(5000)
    assert measure.peak_bytes(call, CPU) == 4 * 3000
    assert measure.peak_bytes(lambda: old.zero_(), CPU) == 0


def test_what_a_call_releases_that_was_there_before_takes_nothing_off_its_peak():
    # the profiler knows the size of a block that an earlier recording saw allocated, and of others not
    kept = []
    assert measure.peak_bytes(lambda: kept.append(torch.zeros(5000)), CPU) == 4 * 5000
    kept.append(torch.zeros(3000))

    def call():
        kept.clear()
        return torch.zeros(1000)

    assert measure.peak_bytes(call, CPU) == 4 * 1000


def test_the_peak_of_a_step_is_what_the_formulas_make():
    tokens, h = SMALL.M * 4, SMALL.M * SMALL.R * 4

    def peak(name, pass_):
        return measure.peak_bytes(LayerWorkload(pass_, SMALL, "float32", CPU).candidate(name).call, CPU)

    # y, then dx beside it
    assert peak("frozen", FORWARD) == tokens * SMALL.N
    assert peak("frozen", STEP) == tokens * (SMALL.N + SMALL.K)
    # what the forward made was there before
    assert peak("frozen", BACKWARD) == tokens * SMALL.K
    assert peak("addmm", FORWARD) == tokens * SMALL.N + h
    assert peak("eager", FORWARD) >= 3 * tokens * SMALL.N


@pytest.mark.parametrize("pass_", [FORWARD, BACKWARD, STEP, DECODE])
def test_calls_take_the_copies_of_their_inputs_in_turn(monkeypatch, pass_):
    seen = []

    class Watching(baselines.EagerLoRA):
        def forward(self, x):
            seen.append(x.data_ptr())
            return super().forward(x)

    monkeypatch.setitem(baselines.CANDIDATES, "addmm", baselines.Recipe(Watching))
    workload = LayerWorkload(pass_, SMALL, "float32", CPU)
    call = workload.candidate("addmm").call
    results = [call() for _ in range(workload.copies + 1)]
    assert len(set(seen)) == workload.copies == 16
    assert seen[-1] == seen[0]
    assert all(torch.equal(one[key], results[0][key]) for one in results for key in one)


def test_copies_outgrow_a_cache_and_stay_few():
    assert workloads.copies_of(CPU, 1 << 23) == 8
    assert (workloads.copies_of(CPU, 100), workloads.copies_of(CPU, 1 << 30)) == (16, 1)
    assert workloads.copies_of(torch.device("cuda"), 100) == 1
