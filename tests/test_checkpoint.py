"""Activation checkpointing: the same masks, the same gradients, whatever is kept and whatever is computed again."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from fused_lora import FusedLoRALinear
from fused_lora.backends.triton import launch

pytestmark = pytest.mark.usefixtures("cpu_impl")

MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
FUSED = (torch.ops.fused_lora.lora_matmul.default,)


def net(dropout, impl="auto"):
    layers = [FusedLoRALinear(*sizes, rank=3, dropout=dropout, impl=impl) for sizes in ((12, 20), (20, 12))]
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    return nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU())


def gradients(model, call, shape=(9, 12)):
    torch.manual_seed(2)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    call(x).square().sum().backward()
    grads = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    model.zero_grad()
    return grads


def selective(kept):
    def policy(context, operator, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(9, 12), (3, 3, 12)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"use_reentrant": True}, {"use_reentrant": False}, {"use_reentrant": False, "context_fn": selective(MATMULS)}],
    ids=["reentrant", "non-reentrant", "selective"],
)
def test_gradients_are_the_same_to_the_bit(options, shape, dropout):
    model = net(dropout)
    plain = gradients(model, model, shape)
    again = gradients(model, lambda x: checkpoint(model, x, **options), shape)
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))
    if dropout:
        torch.manual_seed(3)
        assert not torch.equal(model(torch.ones(9, 12)), model(torch.ones(9, 12)))


def test_a_policy_that_keeps_the_fused_operator_spares_its_second_run(monkeypatch):
    # the operator stands where the Triton kernels run
    model = net(0.5, impl="triton")
    runs = []
    matmul = launch.lora_matmul
    monkeypatch.setattr(launch, "lora_matmul", lambda *args: runs.append(args[8]) or matmul(*args))
    plain = gradients(model, model)
    assert runs.count(False) == 2
    runs.clear()
    kept = gradients(model, lambda x: checkpoint(model, x, use_reentrant=False, context_fn=selective(FUSED)))
    assert runs.count(False) == 2
    runs.clear()
    again = gradients(model, lambda x: checkpoint(model, x, use_reentrant=False))
    assert runs.count(False) == 4
    for others in (kept, again):
        assert all(torch.equal(one, two) for one, two in zip(plain, others, strict=True))


def test_a_sequence_of_checkpoints_nests_and_keeps_the_generator():
    model = net(0.5)
    plain = gradients(model, model)
    after = torch.rand(1)
    again = gradients(model, lambda x: checkpoint_sequential(model, 2, x, use_reentrant=False))
    assert torch.equal(after, torch.rand(1))
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))


def test_a_backward_within_autocast_recomputes_a_checkpoint_once():
    model, x = net(0.0), torch.randn(6, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        # as loops do that call backward before they leave autocast
        checkpoint(model, x, use_reentrant=False).sum().backward()
    assert x.grad is not None
