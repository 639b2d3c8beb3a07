"""Activation checkpointing computes a forward again in the backward: with the adapters that the forward had."""

import contextlib
import sys
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from two_adapters import X, net, two

from fused_lora import FusedLoRALinear, apply_lora, disable_adapters, lora_parameters


class Reentrant(torch.autograd.Function):
    """What Unsloth, DeepSpeed and Megatron write for themselves."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward(y, dy)
        return None, x.grad


KINDS = {
    "reentrant": lambda run, x: checkpoint(run, x, use_reentrant=True),
    "non-reentrant": lambda run, x: checkpoint(run, x, use_reentrant=False),
    "no early stop": lambda run, x: checkpoint(run, x, use_reentrant=False, early_stop=False),
    "of one's own": Reentrant.apply,
    "nested": lambda run, x: checkpoint(lambda x: checkpoint(run, x, use_reentrant=False), x, use_reentrant=False),
    "nested reentrant": lambda run, x: checkpoint(
        lambda x: checkpoint(run, x, use_reentrant=True), x, use_reentrant=True
    ),
    "one in the other": lambda run, x: checkpoint(
        lambda x: checkpoint(run, x, use_reentrant=True), x, use_reentrant=False
    ),
    "the other in one": lambda run, x: checkpoint(
        lambda x: checkpoint(run, x, use_reentrant=False), x, use_reentrant=True
    ),
}


def model_with_head():
    torch.manual_seed(0)
    model = apply_lora(net(), rank=2, target_modules=["0"], modules_to_save=["2"])
    with torch.no_grad():
        nn.init.normal_(model[0].lora_B)
        model[2].adapters["default"].weight.add_(1.0)
    return model


MODELS = {"two layers": two, "modules_to_save": model_with_head}


def on_a_thread(action):
    found = []
    thread = threading.Thread(target=lambda: found.append(action()))
    thread.start()
    thread.join(60)
    return found[0]


def gradients(model, x):
    return [tensor.grad for tensor in (x, *model.parameters())]


def expected_of(make, off):
    model, x = make(), X.clone().requires_grad_()
    with disable_adapters(model) if off else contextlib.nullcontext():
        y = model(x)
        y.sin().sum().backward()
    return y.detach(), gradients(model, x)


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


@contextlib.contextmanager
def another_thread_has_them_off(model):
    entered, leave = threading.Event(), threading.Event()

    def work():
        with disable_adapters(model):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    assert entered.wait(60)
    try:
        yield
    finally:
        leave.set()
        thread.join(60)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backward_thread", ["same", "another"])
@pytest.mark.parametrize("backward_in", ["nothing", "own", "other's"])
@pytest.mark.parametrize("off", [False, True])
def test_a_recompute_does_what_its_forward_did(make, kind, backward_thread, backward_in, off):
    model, x = make(), X.clone().requires_grad_()
    y_expected, expected = expected_of(make, off)
    with disable_adapters(model) if off else contextlib.nullcontext():
        y = KINDS[kind](model, x)
    assert torch.equal(y.detach(), y_expected)
    run = on_a_thread if backward_thread == "another" else lambda action: action()
    around = {
        "nothing": contextlib.nullcontext, "own": lambda: disable_adapters(model),
        "other's": lambda: another_thread_has_them_off(model),
    }[backward_in]  # fmt: skip
    with around():
        run(lambda: y.sin().sum().backward())
    assert_same(gradients(model, x), expected)
    y = None
    # nothing sticks, in any thread
    assert torch.equal(model(X), make()(X))
    assert torch.equal(on_a_thread(lambda: model(X)), make()(X))
    assert not any(m._switch.used for m in model.modules() if isinstance(m, FusedLoRALinear))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_checkpointed_block_switches_off_itself_is_off_again_in_its_recompute(kind):
    model = two()

    def block(x):
        y = model(x)
        with disable_adapters(model):
            reference = model(x)
        return y - 2.0 * reference + model(x)

    x, theirs = X.clone().requires_grad_(), X.clone().requires_grad_()
    block(theirs).sin().sum().backward()
    expected = gradients(model, theirs)
    model.zero_grad()
    y = KINDS[kind](block, x)
    with disable_adapters(model):
        y.sin().sum().backward()
    assert_same(gradients(model, x), expected)
    model.zero_grad()
    with disable_adapters(model):
        y = KINDS[kind](block, x)
    y.sin().sum().backward()
    assert all(p.grad is None for p in lora_parameters(model))


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_that_is_off_is_off_alone_in_a_recompute(kind):
    model, expected = two(), two()
    x, theirs = X.clone().requires_grad_(), X.clone().requires_grad_()
    with disable_adapters(model[0]):
        y = KINDS[kind](model, x)
    with disable_adapters(expected[0]):
        expected(theirs).sin().sum().backward()
    y.sin().sum().backward()
    assert_same(gradients(model, x), gradients(expected, theirs))


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_is_repeated_twice_in_the_state_of_its_forward(kind):
    model, x = two(), X.clone().requires_grad_()
    with disable_adapters(model):
        y = KINDS[kind](model, x).sin().sum()
    y.backward(retain_graph=True)
    first = x.grad.clone()
    y.backward()
    torch.testing.assert_close(x.grad, 2.0 * first)
    torch.testing.assert_close(first, expected_of(two, True)[1][0])


def test_a_thread_that_ran_a_backward_while_another_had_them_off_keeps_its_adapters_ever_after():
    model = two()
    expected, x = model(X), X.clone().requires_grad_()

    def work():
        y = checkpoint(model, x, use_reentrant=True)
        with another_thread_has_them_off(model):
            y.sum().backward()
        grads = [p.grad for p in lora_parameters(model)]
        with another_thread_has_them_off(model), torch.no_grad():
            return grads, model(X)

    grads, after = on_a_thread(work)
    assert all(grad is not None for grad in grads)
    assert torch.equal(after, expected)


def test_a_forward_in_a_hook_of_the_backward_follows_its_thread():
    model, base = two(), net()(X)
    tuned, seen = model(X), []
    for off in (False, True):
        x = X.clone().requires_grad_()
        x.register_hook(lambda grad: seen.append(model(X).detach()))
        with disable_adapters(model) if off else contextlib.nullcontext():
            model(x).sum().backward()
    assert torch.equal(seen[0], tuned)
    assert torch.equal(seen[1], base)


def test_a_layer_computes_one_choice_while_another_thread_sets_adapters():
    """Of a whole model that is not promised; of one layer it is."""
    layer = FusedLoRALinear(12, 5, rank=2)
    layer.add_adapter("other", rank=3)
    for adapter in layer.adapters.values():
        nn.init.normal_(adapter.lora_B)
    choices, right = ["default", ["default", "other"], "other", None], []
    with torch.no_grad():
        for names in choices:
            layer.set_adapter(names)
            right.append(layer(X))
        done, wrong = threading.Event(), []

        def compute():
            while not done.is_set():
                y = layer(X)
                if not any(torch.equal(y, each) for each in right):
                    wrong.append(y)

        def compute_and_tell():
            try:
                with torch.no_grad():
                    compute()
            except Exception as error:
                wrong.append(error)

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        threads = [threading.Thread(target=compute_and_tell) for _ in range(2)]
        for thread in threads:
            thread.start()
        for number in range(400):
            layer.set_adapter(choices[number % len(choices)])
        done.set()
        for thread in threads:
            thread.join(60)
        sys.setswitchinterval(before)
    assert not wrong


def test_a_choice_that_is_set_within_a_forward_is_the_next_ones(monkeypatch):
    layer = FusedLoRALinear(12, 5, rank=2)
    layer.add_adapter("other", rank=3)
    for adapter in layer.adapters.values():
        nn.init.normal_(adapter.lora_B)
    layer.set_adapter(["default", "other"])
    expected, several = layer(X), FusedLoRALinear._forward_several

    def interrupted(self, *args):
        # as another thread may do here
        self.set_adapter(None)
        return several(self, *args)

    monkeypatch.setattr(FusedLoRALinear, "_forward_several", interrupted)
    assert torch.equal(layer(X), expected)
    assert torch.equal(layer(X), nn.functional.linear(X, layer.weight, layer.bias))
