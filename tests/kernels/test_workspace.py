"""Where a stream's counters and scratch are allocated, and when none are, on a simulated GPU."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from simulated_gpu import GPU, OTHER_GPU, SimulatedGPU

from fused_lora.backends.triton import launch, workspace
from fused_lora.backends.triton.workspace import LEAST, SPARES, counters, scratch


@pytest.fixture
def gpu(monkeypatch):
    gpu = SimulatedGPU()
    for patch in gpu.patches():
        monkeypatch.setattr(*patch)
    return gpu


def test_the_simulated_pool_takes_what_its_thread_allocates(gpu):
    with gpu.pool():
        made = torch.zeros(3, dtype=torch.int32, device=GPU)
    assert [tensor is made for tensor in gpu.pooled] == [True]


def test_counters_of_a_warm_up_are_outside_its_pool_and_serve_the_capture(gpu):
    with gpu.pool():
        warm = counters(GPU, 100)
        grown = counters(GPU, 2 * LEAST)
    assert gpu.made
    assert not gpu.pooled
    assert warm.numel() >= 100
    assert grown.numel() >= 2 * LEAST
    with gpu.pool(), gpu.capture():
        assert counters(GPU, 2 * LEAST) is grown
        assert counters(GPU, 1) is grown


def test_counters_are_zero_before_any_stream_uses_them(gpu):
    assert not counters(GPU, 100).any()
    assert len(gpu.made) == 2
    assert not any(gpu.unfinished.values())


def test_a_capture_on_a_device_that_was_never_used_gets_none(gpu):
    with gpu.capture():
        assert counters(GPU, 1) is None
    assert not gpu.made


def test_a_capture_on_a_new_stream_takes_a_spare_set_and_keeps_it(gpu):
    first = counters(GPU, 1)
    taken = []
    for stream in range(100, 100 + SPARES):
        with gpu.capture(stream):
            taken.append(counters(GPU, LEAST))
            assert counters(GPU, 1) is taken[-1]
    assert len({tensor.data_ptr() for tensor in (first, *taken)}) == 1 + SPARES
    with gpu.capture(200):
        assert counters(GPU, 1) is None
    # the next launch outside of a capture puts new ones aside, on a stream that has its own too
    assert counters(GPU, 1) is first
    with gpu.capture(200):
        assert counters(GPU, 1) is not None


def test_sets_do_not_overlap(gpu):
    sets = [counters(GPU, 1)]
    for stream in range(100, 100 + SPARES):
        with gpu.capture(stream):
            sets.append(counters(GPU, 1))
    for number, one in enumerate(sets):
        one.fill_(number)
    assert [set(one.tolist()) for one in sets] == [{number} for number in range(len(sets))]


def test_a_capture_that_needs_more_than_there_is_gets_none(gpu):
    counters(GPU, 1)
    with gpu.capture():
        assert counters(GPU, LEAST + 1) is None
    with gpu.capture(200):
        assert counters(GPU, LEAST + 1) is None


def test_outgrown_counters_stay_for_the_graphs_that_hold_them(gpu):
    small = counters(GPU, 1)
    assert counters(GPU, LEAST + 1) is not small
    assert any(tensor is small for tensor in workspace._outgrown)


def test_streams_and_devices_have_counters_of_their_own(gpu):
    one, other = counters(GPU, 1), counters(OTHER_GPU, 1)
    gpu.stream = 8
    third = counters(GPU, 1)
    assert len({tensor.data_ptr() for tensor in (one, other, third)}) == 3
    gpu.stream = 7
    assert counters(GPU, 1) is one
    assert counters(OTHER_GPU, 1) is other


def test_threads_on_one_stream_find_one_set(gpu):
    start = threading.Barrier(4)

    def ask(_):
        start.wait()
        return counters(GPU, 1)

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(ask, range(4)))
    assert len({tensor.data_ptr() for tensor in found}) == 1
    assert len(gpu.made) == 2


def test_what_cannot_be_allocated_is_said_and_nothing_is_lost(gpu):
    first = counters(GPU, 1)
    gpu.full = True
    with pytest.raises(torch.OutOfMemoryError):
        counters(GPU, LEAST + 1)
    assert counters(GPU, 1) is first
    gpu.full = False
    assert counters(GPU, LEAST + 1).numel() > LEAST


# ---------------------------------------------------------------- scratch


def test_scratch_of_a_warm_up_is_outside_its_pool_and_serves_the_capture(gpu):
    with gpu.pool():
        warm = scratch(GPU, 100_000, gpu.stream)
    assert gpu.made
    assert not gpu.pooled
    assert not any(gpu.unfinished.values())
    with gpu.pool(), gpu.capture():
        assert scratch(GPU, 100_000, gpu.stream) is warm
        assert scratch(GPU, 1, gpu.stream) is warm


def test_a_capture_gets_no_scratch_on_a_new_stream_nor_more_than_there_is(gpu):
    had = scratch(GPU, LEAST, 7)
    with gpu.capture():
        assert scratch(GPU, LEAST, 8) is None
        assert scratch(GPU, LEAST + 1, 7) is None
        assert scratch(GPU, LEAST, 7) is had
    assert gpu.made == [had]


def test_streams_and_devices_have_scratch_of_their_own(gpu):
    every = [scratch(device, 1, stream) for device in (GPU, OTHER_GPU) for stream in (7, 8)]
    assert len({tensor.data_ptr() for tensor in every}) == 4
    assert scratch(GPU, 1, 7) is every[0]


def test_outgrown_scratch_stays_for_the_graphs_that_hold_it_and_is_less_than_what_replaced_it(gpu):
    first = scratch(GPU, 1, 7)
    for size in range(1000, 300_000, 1000):
        last = scratch(GPU, size, 7)
    assert any(tensor is first for tensor in workspace._outgrown)
    assert sum(tensor.nbytes for tensor in workspace._outgrown) < last.nbytes
    # a graph outlives the plans that it was captured by
    launch.forget_plans()
    assert any(tensor is first for tensor in workspace._outgrown)
    assert scratch(GPU, 1, 7) is last


def test_threads_on_one_stream_find_one_scratch(gpu):
    start = threading.Barrier(4)

    def ask(_):
        start.wait()
        return scratch(GPU, 1, 7)

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(ask, range(4)))
    assert len({tensor.data_ptr() for tensor in found}) == 1


def test_scratch_that_cannot_be_allocated_is_said_and_nothing_is_lost(gpu):
    first = scratch(GPU, 1, 7)
    gpu.full = True
    with pytest.raises(torch.OutOfMemoryError):
        scratch(GPU, LEAST + 1, 7)
    assert scratch(GPU, 1, 7) is first
    assert not workspace._outgrown
    gpu.full = False
    assert scratch(GPU, LEAST + 1, 7).nbytes > LEAST
