"""Where counters are allocated, and when none are, on a simulated GPU.

Simulated: ``torch.cuda``'s current stream, whether it captures, and an allocator that knows one thing: a pool is
current on the thread that made it current, and on no other. The counters themselves are tensors on the CPU. That
PyTorch's own allocator does the same is not tested here: ``test_compiled.py`` does, where there is a GPU.
"""

import contextlib
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from fused_lora.backends.triton import workspace
from fused_lora.backends.triton.workspace import LEAST, SPARES, counters

GPU, OTHER_GPU = torch.device("cuda", 0), torch.device("cuda", 1)
ZEROS = torch.zeros


class SimulatedGPU:
    def __init__(self):
        self.stream, self.capturing, self.full = 7, False, False
        self.here = threading.local()
        self.made = []
        self.pooled = []
        # tensors whose zeros nobody has waited for, by thread
        self.unfinished = defaultdict(list)

    def current_stream(self, device):
        thread = threading.get_ident()
        return SimpleNamespace(cuda_stream=self.stream, synchronize=self.unfinished[thread].clear)

    def zeros(self, count, *, dtype, device):
        assert not self.capturing, "an allocation while a graph is captured"
        if self.full:
            raise torch.OutOfMemoryError("the simulated GPU is full")
        made = ZEROS(count, dtype=dtype)
        self.made.append(made)
        if getattr(self.here, "pool", False):
            self.pooled.append(made)
        self.unfinished[threading.get_ident()].append(made)
        return made

    @contextlib.contextmanager
    def pool(self):
        """A pool is current on this thread, as in the warm-up of ``mode="reduce-overhead"``."""
        self.here.pool = True
        yield
        self.here.pool = False

    @contextlib.contextmanager
    def capture(self, stream=None):
        before, self.stream, self.capturing = self.stream, stream or self.stream, True
        yield
        self.stream, self.capturing = before, False


@pytest.fixture
def gpu(monkeypatch):
    gpu = SimulatedGPU()
    monkeypatch.setattr(torch.cuda, "current_stream", gpu.current_stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    monkeypatch.setattr(torch, "zeros", gpu.zeros)
    for name, empty in (("_counters", {}), ("_spares", defaultdict(list)), ("_outgrown", [])):
        monkeypatch.setattr(workspace, name, empty)
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
