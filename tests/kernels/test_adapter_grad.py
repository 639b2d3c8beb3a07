"""The adapter gradients: both, either, or neither, in one launch."""

import oracle
import pytest
import torch

from fused_lora.backends import eager as eager_backend
from fused_lora.backends.triton import launch
from fused_lora.backends.triton.workspace import counters

SHAPES = [(1, 33, 40, 1), (17, 123, 64, 3), (129, 40, 123, 20), (70, 64, 64, 100)]


def operands(M, K, N, R, dtype, device):
    inputs = oracle.draw(M, K, N, R, dtype=dtype, device=device)
    h = torch.randn(M, R, device=device).to(dtype)
    g = torch.randn(M, R, device=device).to(dtype)
    return inputs.x, g, inputs.dy, h


def check(given, rest, dtype, **options):
    got = launch.adapter_grad(*given, *rest, dtype, dtype, **options)
    with oracle.in_one_chain():
        eager = eager_backend.adapter_grad(*given, *rest, dtype, dtype)
    doubles = (None if t is None else t.double() for t in given)
    exact = eager_backend.adapter_grad(*doubles, *rest, torch.float64, torch.float64)
    for name, ours, low, truth in zip(("dA", "dB"), got, eager, exact, strict=True):
        assert (ours is None) == (truth is None)
        if ours is not None:
            oracle.within(name, ours, low, truth)


@pytest.mark.parametrize("wanted", ["both", "A", "B"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_within_the_budget_and_only_those_asked_for(shape, wanted, dtype, device):
    x, g, dy, h = operands(*shape, dtype, device)
    given = (x if wanted != "B" else None, g if wanted != "B" else None,
             dy if wanted != "A" else None, h if wanted != "A" else None)  # fmt: skip
    for rest in ((0.7, None, 0.0), (0.7, torch.tensor([11], device=device), 0.4)):
        check(given, rest, dtype)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("shape", [(1, 33, 20, 1), (251, 33, 20, 20)], ids=str)
def test_any_number_of_parts_is_within_the_budget_empty_ones_too(shape, parts, dtype, device):
    given = operands(*shape, dtype, device)
    dropout = (0.7, torch.tensor([11], device=device), 0.4)
    check(given, dropout, dtype, parts=parts)
    check((*given[:2], None, None), (0.7, None, 0.0), dtype, parts=parts)
    check((None, None, *given[2:]), dropout, dtype, parts=parts)


def test_counters_are_zero_after_every_call_so_shapes_may_take_turns(device):
    shapes = ((200, 70, 50, 5), (90, 33, 130, 40), (300, 20, 20, 1))
    cases = [(operands(*shape, torch.float32, device), parts) for shape, parts in zip(shapes, (3, 2, 7), strict=True)]
    rest = (1.3, None, 0.0, torch.float32, torch.float32)
    first = [launch.adapter_grad(*given, *rest, parts=parts) for given, parts in cases]
    for _ in range(3):
        for (given, parts), before in zip(cases, first, strict=True):
            again = launch.adapter_grad(*given, *rest, parts=parts)
            assert all(torch.equal(ours, others) for ours, others in zip(again, before, strict=True))
            assert counters(given[0].device, 1).count_nonzero() == 0


def test_without_counters_the_rows_are_not_split(device, monkeypatch):
    args = (*operands(200, 70, 50, 5, torch.float32, device), 1.3, None, 0.0, torch.float32, torch.float32)
    whole = launch.adapter_grad(*args, parts=1)
    monkeypatch.setattr(launch, "counters", lambda *_: None)
    for ours, unsplit in zip(launch.adapter_grad(*args, parts=3), whole, strict=True):
        assert torch.equal(ours, unsplit)


def test_no_tokens_give_zero_gradients(device):
    x, g, dy, h = operands(0, 33, 20, 3, torch.float32, device)
    for grad in launch.adapter_grad(x, g, dy, h, 1.0, None, 0.0, torch.float32, torch.float32):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_same_inputs_give_the_same_bits(parts, device):
    M = 20_000 if device == "cuda" else 200
    args = (*operands(M, 70, 50, 5, torch.float32, device), 1.3, None, 0.0, torch.float32, torch.float32)
    first = launch.adapter_grad(*args, parts=parts)
    for _ in range(5):
        for ours, again in zip(first, launch.adapter_grad(*args, parts=parts), strict=True):
            assert torch.equal(ours, again)
