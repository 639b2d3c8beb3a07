"""Adapters switched off, by one thread alone."""

import contextlib
import copy
import pickle
import threading

import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from two_adapters import X, net, two

from fused_lora import FusedLoRALinear, disable_adapters, summary


def in_thread(action):
    result = []
    thread = threading.Thread(target=lambda: result.append(action()))
    thread.start()
    thread.join()
    return result[0]


def test_a_thread_that_disables_adapters_leaves_them_to_the_others():
    model, expected = two(), net()(X)
    tuned = model(X)
    entered, leave, seen = threading.Event(), threading.Event(), {}

    def disable():
        with disable_adapters(model), disable_adapters(model[0]):
            entered.set()
            leave.wait(30)
            seen["within"] = model(X)
        seen["after"] = model(X)

    thread = threading.Thread(target=disable)
    thread.start()
    assert entered.wait(30)
    assert torch.equal(model(X), tuned)
    with disable_adapters(model):
        assert torch.equal(model(X), expected)
        assert torch.equal(in_thread(lambda: model(X)), tuned)
    leave.set()
    thread.join(30)
    assert torch.equal(seen["within"], expected)
    assert torch.equal(seen["after"], tuned)
    assert not any(m._switch.used for m in model.modules() if isinstance(m, FusedLoRALinear))


def test_many_threads_disable_and_compute_at_once_and_each_sees_its_own():
    model, base = two(), net()(X)
    tuned, wrong = model(X), []

    def work(off):
        context = disable_adapters(model) if off else contextlib.nullcontext()
        for _ in range(50):
            with context if not off else disable_adapters(model):
                if not torch.equal(model(X), base if off else tuned):
                    wrong.append(off)

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_disabling_survives_nesting_exceptions_and_copies():
    model, expected = two(), net()(X)
    tuned = model(X)
    with contextlib.suppress(KeyError), disable_adapters(model):
        with disable_adapters(model[2]):
            assert torch.equal(model(X), expected)
        assert torch.equal(model(X), expected)
        assert "adapters are disabled" in str(summary(model))
        for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(duplicate(X), tuned)
        raise KeyError
    assert torch.equal(model(X), tuned)


def test_recomputing_in_a_backward_on_autograds_own_thread_sees_what_the_forward_saw():
    """A device's backward runs on a thread of autograd's; here a new thread runs the backward, as that one would."""
    model = two()
    x = X.clone().requires_grad_()
    with disable_adapters(model):
        (expected,) = torch.autograd.grad(model(x).sin().sum(), x)
        y = checkpoint(model, x, use_reentrant=False).sin().sum()
        (got,) = in_thread(lambda: torch.autograd.grad(y, x))
    assert torch.equal(got, expected)


def test_compiled_models_follow_the_thread_and_compile_once_for_each_state():
    torch._dynamo.reset()
    model, expected = two(), net()(X)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        tuned = model(X)
        for _ in range(4):
            torch.testing.assert_close(compiled(X), tuned)
            with disable_adapters(model):
                assert torch.equal(compiled(X), expected)
                torch.testing.assert_close(in_thread(lambda: compiled(X)), tuned)
    # on, off, and on while another thread has them off; a thread of its own guards its grad mode too
    assert counter.frame_count <= 4
    torch._dynamo.reset()
