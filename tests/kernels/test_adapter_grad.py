"""The adapter gradients: both, either, or neither, in one launch."""

import oracle
import pytest
import torch

from fused_lora import reference
from fused_lora.kernels import launch

SHAPES = [(1, 33, 40, 1), (17, 123, 64, 3), (129, 40, 123, 20), (70, 64, 64, 100)]


def operands(M, K, N, R, dtype, device):
    inputs = oracle.draw(M, K, N, R, dtype=dtype, device=device)
    h = torch.randn(M, R, device=device).to(dtype)
    g = torch.randn(M, R, device=device).to(dtype)
    return inputs.x, g, inputs.dy, h


@pytest.mark.parametrize("wanted", ["both", "A", "B"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_within_the_budget_and_only_those_asked_for(shape, wanted, dtype, device):
    x, g, dy, h = operands(*shape, dtype, device)
    given = (x if wanted != "B" else None, g if wanted != "B" else None,
             dy if wanted != "A" else None, h if wanted != "A" else None)  # fmt: skip
    seed = torch.tensor([11], device=device)
    for rest in ((0.7, None, 0.0), (0.7, seed, 0.4)):
        got = launch.adapter_grad(*given, *rest, dtype, dtype)
        eager = reference.adapter_grad(*given, *rest, dtype, dtype)
        exact = reference.adapter_grad(
            *(None if t is None else t.double() for t in given), *rest, torch.float64, torch.float64
        )
        for name, ours, low, truth in zip(("dA", "dB"), got, eager, exact, strict=True):
            assert (ours is None) == (truth is None)
            if ours is not None:
                oracle.within(name, ours, low, truth)


def test_no_tokens_give_zero_gradients(device):
    x, g, dy, h = operands(0, 33, 20, 3, torch.float32, device)
    for grad in launch.adapter_grad(x, g, dy, h, 1.0, None, 0.0, torch.float32, torch.float32):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_same_inputs_give_the_same_bits(device):
    args = (*operands(200, 70, 50, 5, torch.float32, device), 1.3, None, 0.0, torch.float32, torch.float32)
    first = launch.adapter_grad(*args)
    for _ in range(5):
        for ours, again in zip(first, launch.adapter_grad(*args), strict=True):
            assert torch.equal(ours, again)
