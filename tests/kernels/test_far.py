"""Elements further apart than int32 reaches: every kernel finds them."""

import dataclasses

import oracle
import pytest
import torch

from fused_lora.backends import eager as eager_backend
from fused_lora.backends.triton import launch
from fused_lora.backends.triton.configs import DecodeConfig, Schedule, ScheduleConfig

# the last row begins beyond 2**31 elements, and so does a step of 32 rows
ROWS, APART = 33, 2**26 + 64
NO_DROPOUT = (None, 0.0, False)


@pytest.fixture(scope="module")
def far(device):
    """(ROWS, 32), whose rows are APART elements apart: 4 GiB of addresses, of which a few pages are touched."""
    torch.use_deterministic_algorithms(False)  # which would fill all of it with NaN
    rows = torch.empty((ROWS - 1) * APART + 32, dtype=torch.float16, device=device).as_strided((ROWS, 32), (APART, 1))
    return rows.copy_(torch.randn(ROWS, 32))


def both_ways(inputs):
    yield inputs.x, inputs.weight.t(), inputs.lora_A.t(), inputs.lora_B.t(), inputs.bias, inputs.scale
    yield inputs.dy, inputs.weight, inputs.lora_B, inputs.lora_A, None, inputs.scale


def check(near, far, **options):
    """Far operands are within the budget that near ones of the same values set."""
    for plain, exact, args in zip(both_ways(near), both_ways(near.to(torch.float64)), both_ways(far), strict=True):
        eager, truth = (eager_backend.lora_matmul(*operands, *NO_DROPOUT) for operands in (plain, exact))
        got = launch.lora_matmul(*args, *NO_DROPOUT, **options)
        for name, *values in zip(("out", "h"), got, eager, truth, strict=True):
            oracle.within(name, *values)


@pytest.mark.parametrize("kind", [Schedule.RECOMPUTE, Schedule.PUBLISH, Schedule.PRODUCE])
@pytest.mark.parametrize("name", ["x", "weight"])
def test_rows_of_tokens_and_of_the_weight(name, kind, far, device):
    near = oracle.draw(ROWS, 32, ROWS, 2, dtype=torch.float16, device=device)
    setattr(near, name, far.contiguous())
    check(near, dataclasses.replace(near, **{name: far}), schedule=ScheduleConfig(kind))


@pytest.mark.parametrize("parts", [1, 2])
def test_rows_of_the_weight_in_decode(parts, far, device):
    near = oracle.draw(3, 32, ROWS, 2, dtype=torch.float16, device=device)
    near.weight = far.contiguous()
    check(near, dataclasses.replace(near, weight=far), config=DecodeConfig(32, 32, 16, parts, parts, 4, 1))


def test_rows_of_tokens_in_the_adapter_gradients(far, device):
    g = torch.randn(ROWS, 3, device=device).half()
    near, rest = far.contiguous(), (1.0, None, 0.0)
    eager = eager_backend.adapter_grad(near, g, near, g, *rest, torch.float32, torch.float32)
    wide, low = near.double(), g.double()
    truth = eager_backend.adapter_grad(wide, low, wide, low, *rest, torch.float64, torch.float64)
    for x in (far, far.t().contiguous().t()):
        got = launch.adapter_grad(x, g, x, g, 1.0, None, 0.0, torch.float32, torch.float32, parts=1)
        for name, *values in zip(("dA", "dB"), got, eager, truth, strict=True):
            oracle.within(name, *values)
