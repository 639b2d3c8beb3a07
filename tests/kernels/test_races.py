"""Hand-over between programs that run side by side, in any order: no race, no deadlock, the same bits."""

import functools
import threading

import oracle
import pytest
import torch
import triton
import triton.language as tl

from fused_lora.backends.environment import interpreting
from fused_lora.backends.triton import launch
from fused_lora.backends.triton.configs import DecodeConfig, ReductionConfig, Schedule, ScheduleConfig, TileConfig
from fused_lora.backends.triton.workspace import counters

if not interpreting():
    pytest.skip("only the interpreter can be interleaved; test_device.py has races on a GPU", allow_module_level=True)

from interleaving import StuckError, interleaved

TILE = TileConfig(BLOCK_M=16, BLOCK_P=16, BLOCK_Q=16, BLOCK_R=16, GROUP_M=2, num_warps=4, num_stages=1)
DECODE = DecodeConfig(BLOCK_P=16, BLOCK_Q=16, BLOCK_R=16, SPLIT=3, SPLIT_H=2, num_warps=4, num_stages=1)
REDUCTION = ReductionConfig(BLOCK_M=16, BLOCK_C=16, BLOCK_R=16, num_warps=4, num_stages=1)


def matmul(schedule, rank=3, dropout=False):
    inputs = oracle.draw(35, 40, 50, rank)
    rest = (torch.tensor([5]), 0.3, False) if dropout else (None, 0.0, False)
    operands = (inputs.x, inputs.weight.t(), inputs.lora_A.t(), inputs.lora_B.t(), inputs.bias, inputs.scale)
    return lambda: launch.lora_matmul(*operands, *rest, config=TILE, schedule=schedule)


def decode(rank=3, rows=3):
    inputs = oracle.draw(rows, 70, 50, rank)
    operands = (inputs.x, inputs.weight.t(), inputs.lora_A.t(), inputs.lora_B.t(), inputs.bias, inputs.scale)
    return lambda: launch.lora_matmul(*operands, None, 0.0, False, config=DECODE)


def adapter_grad():
    inputs = oracle.draw(100, 20, 40, 20)
    g, h = torch.randn(100, 20), torch.randn(100, 20)
    rest = (0.5, None, 0.0, torch.float32, torch.float32)
    return lambda: launch.adapter_grad(inputs.x, g, inputs.dy, h, *rest, config=REDUCTION, parts=3)


CALLS = {
    "recompute": lambda: matmul(ScheduleConfig(Schedule.RECOMPUTE), dropout=True),
    "publish": lambda: matmul(ScheduleConfig(Schedule.PUBLISH)),
    "publish, many ranks": lambda: matmul(ScheduleConfig(Schedule.PUBLISH), rank=20),
    "produce": lambda: matmul(ScheduleConfig(Schedule.PRODUCE, 3), dropout=True),
    "produce, many ranks": lambda: matmul(ScheduleConfig(Schedule.PRODUCE, 2), rank=20),
    "decode": decode,
    "decode, many ranks": lambda: decode(20),
    "decode, blocks of rows": lambda: decode(rows=35),
    "adapter gradients": adapter_grad,
}


@pytest.mark.parametrize("resident", [1, 3, 1000])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_programs_side_by_side_neither_race_nor_wait_forever_and_give_the_same_bits(call, resident):
    call, results = call(), []
    for seed in range(2):
        with interleaved(seed, resident) as launches:
            results.append(call())
        assert [made.races() for made in launches] == [[]]
    results.append(call())
    for got in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(got, results[0], strict=True))
    assert not counters(torch.device("cpu"), 1).any()


# --------------------------------------------------------------------------------------------------
# The detector itself: one kernel, right, and wrong in each way
# --------------------------------------------------------------------------------------------------


@triton.jit
def _relay_kernel(
    data_ptr, out_ptr, flag_ptr,
    BARRIER_BEFORE: tl.constexpr, RELEASE: tl.constexpr, WAITS: tl.constexpr, ACQUIRE: tl.constexpr,
    BARRIER_AFTER: tl.constexpr, BY_TICKET: tl.constexpr, RESETS_EARLY: tl.constexpr,
):  # fmt: skip
    """The program of the lowest ticket, or of the lowest index, stores data that all others read."""
    ticket = tl.program_id(0)
    if BY_TICKET:
        ticket = tl.atomic_add(flag_ptr + 1, 1, sem="relaxed")
    offsets = tl.arange(0, 16)
    if ticket == 0:
        tl.store(data_ptr + offsets, offsets)
        if BARRIER_BEFORE:
            tl.debug_barrier()
        tl.atomic_add(flag_ptr, 1, sem=RELEASE)
    else:
        if WAITS:
            while tl.atomic_add(flag_ptr, 0, sem=ACQUIRE) < 1:
                pass
        else:
            tl.atomic_add(flag_ptr, 0, sem=ACQUIRE)
        if BARRIER_AFTER:
            tl.debug_barrier()
        tl.store(out_ptr + ticket * 16 + offsets, tl.load(data_ptr + offsets))
        if RESETS_EARLY:
            tl.store(flag_ptr, 1)


RIGHT = {
    "BARRIER_BEFORE": True,
    "RELEASE": "release",
    "WAITS": True,
    "ACQUIRE": "acquire",
    "BARRIER_AFTER": True,
    "BY_TICKET": True,
    "RESETS_EARLY": False,
}


def relay(seed, resident=1000, **flags):
    data, out, flag = torch.full((16,), -1.0), torch.empty(6, 16), torch.zeros(2, dtype=torch.int32)
    with interleaved(seed, resident) as launches:
        _relay_kernel[(6,)](data, out, flag, **{**RIGHT, **flags})
    return launches[0].races(), out


@pytest.mark.parametrize("resident", [1, 3, 1000])
def test_a_right_relay_has_no_race(resident):
    for seed in range(10):
        races, out = relay(seed, resident)
        assert races == []
        assert torch.equal(out[1:], torch.arange(16.0).expand(5, 16))


@pytest.mark.parametrize(
    "wrong",
    [
        {"BARRIER_BEFORE": False},
        {"RELEASE": "relaxed"},
        {"WAITS": False},
        {"ACQUIRE": "relaxed"},
        {"BARRIER_AFTER": False},
        {"RESETS_EARLY": True},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_each_fault_of_a_relay_is_found(wrong):
    assert any(relay(seed, **wrong)[0] for seed in range(10))


def test_waiting_for_a_program_that_may_not_have_begun_is_found_and_every_program_ended():
    """Work by program index, not by ticket: with one program resident at a time, whoever waits waits forever."""
    relay_by_index = functools.partial(relay, resident=1, BY_TICKET=False)
    threads = threading.active_count()
    with pytest.raises(Exception, match="wait for each other") as error:
        list(map(relay_by_index, range(10)))
    assert isinstance(error.value.__cause__, StuckError)
    assert threading.active_count() == threads
