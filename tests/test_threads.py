"""Threads that call layers at once: the same and different ones, forward and backward, while plans come and go."""

import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import stub_process
import torch

from fused_lora import FusedLoRALinear, plans

THREADS = 8


@pytest.fixture
def _often_interrupted():
    """Python changes threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def few_plans(monkeypatch):
    """So few that threads give up each other's."""
    monkeypatch.setattr(plans, "CALLS", plans.Cache(4))
    monkeypatch.setattr(plans, "_MOST_ALIKE", 2)


def at_once(work):
    """What ``work(number)`` returns on each of THREADS, all started together."""
    start = threading.Barrier(THREADS)

    def started(number):
        start.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(started, range(THREADS)))


def drawn_calls():
    """Layers, and (layer, input, whether with gradients) of many calls."""
    layers = [FusedLoRALinear(*sizes, rank=3) for sizes in ((16, 12), (16, 12), (20, 16), (16, 16))]
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B)
    every = []
    for layer in layers:
        for rows in (1, 5, 17):
            x = torch.randn(rows, layer.in_features)
            every += [(layer, made, step) for made in (x, x.t().contiguous().t()) for step in (False, True)]
    return every


def results(call):
    layer, x, step = call
    if not step:
        with torch.no_grad():
            return [layer(x)]
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (leaf, layer.lora_A, layer.lora_B))]


@pytest.mark.usefixtures("cpu_impl", "_often_interrupted", "few_plans")
def test_threads_at_once_get_what_each_would_get_alone():
    calls = drawn_calls()
    expected = [results(call) for call in calls]

    def work(number):
        rng = random.Random(number)
        order = [rng.randrange(len(calls)) for _ in range(150)]
        return [(index, results(calls[index])) for index in order]

    for found in at_once(work):
        for index, got in found:
            for one, other in zip(got, expected[index], strict=True):
                torch.testing.assert_close(one, other)
    assert len(plans.CALLS) <= 4
    assert all(len(alike) <= 2 for alike in plans.CALLS._entries.values())


@pytest.mark.usefixtures("cpu_impl", "_often_interrupted")
def test_wrong_input_on_one_thread_is_an_error_there_alone():
    layer, x = FusedLoRALinear(16, 12, rank=3), torch.randn(5, 16)
    expected = layer(x)

    def work(number):
        for _ in range(100):
            if number % 2:
                with pytest.raises(ValueError, match=r"x must be \(\.\.\., K\) with K = 16, got shape \(5, 15\)"):
                    layer(x[:, 1:])
            else:
                torch.testing.assert_close(layer(x), expected)
        return True

    assert all(at_once(work))


@pytest.mark.usefixtures("_often_interrupted")
def test_a_cache_holds_no_more_than_it_should_whoever_puts():
    cache = plans.Cache(5)

    def work(number):
        for value in range(500):
            assert cache.put((number, value % 7), value) == value
            # what is found is whole: put by this thread, or given up
            assert cache.get((number, value % 7)) in (None, value)
            if value % 100 == 99:
                cache.clear()
        return len(cache)

    assert max(at_once(work)) <= 5
    assert len(cache) <= 5


def test_kernels_that_threads_launch_at_once_are_given_what_each_would_be_alone(libcuda):
    launched, planned = map(int, stub_process.run("threaded_launches.py", libcuda, THREADS).split())
    assert launched > 1000
    assert planned > launched // 4
