"""Who computes the low-rank product: every schedule gives the same, waits for none that is later, leaves no trace."""

from typing import NamedTuple

import oracle
import pytest
import torch
import triton
import triton.language as tl

from fused_lora.backends import eager as eager_backend
from fused_lora.backends.triton import launch
from fused_lora.backends.triton.configs import Device, Problem, Schedule, ScheduleConfig, TileConfig, default_schedule
from fused_lora.backends.triton.kernels.lora_matmul import SYNC_HEADER, _tile
from fused_lora.backends.triton.workspace import counters

RECOMPUTE, PUBLISH = ScheduleConfig(Schedule.RECOMPUTE), ScheduleConfig(Schedule.PUBLISH)
SCHEDULES = [RECOMPUTE, PUBLISH, ScheduleConfig(Schedule.PRODUCE, 1), ScheduleConfig(Schedule.PRODUCE, 3)]
TILE = TileConfig(BLOCK_M=32, BLOCK_P=32, BLOCK_Q=32, BLOCK_R=16, GROUP_M=2, num_warps=4, num_stages=2)
# M, K, N, R, dropout
CASES = [(1, 96, 123, 1, False), (70, 123, 90, 16, True), (129, 100, 96, 3, True), (33, 130, 70, 40, False)]
# as tensor descriptors take them: rows of whole 16 bytes
ALIGNED_CASES = [(70, 120, 88, 16, False), (33, 136, 72, 40, True)]


def both_ways(inputs):
    """Operands of the forward and of the input gradient."""
    yield inputs.x, inputs.weight.t(), inputs.lora_A.t(), inputs.lora_B.t(), inputs.bias, inputs.scale
    yield inputs.dy, inputs.weight, inputs.lora_B, inputs.lora_A, None, inputs.scale


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.kind.name} {s.split}")
def test_every_schedule_is_within_the_budget_and_leaves_counters_at_zero(schedule, case, dtype, device):
    check(schedule, case, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ALIGNED_CASES, ids=str)
@pytest.mark.parametrize("kind", [Schedule.RECOMPUTE, Schedule.PUBLISH, Schedule.PRODUCE], ids=lambda kind: kind.name)
def test_tensor_descriptors_are_within_the_budget_in_every_schedule(kind, case, dtype, device):
    if device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("this GPU has no tensor memory accelerator")
    check(ScheduleConfig(kind, 2 if kind == Schedule.PRODUCE else 1, descriptors=True), case, dtype, device)


def check(schedule, case, dtype, device):
    *shape, dropout = case
    inputs = oracle.draw(*shape, dtype=dtype, device=device)
    exact_inputs = inputs.to(torch.float64)
    rest = (torch.tensor([5], device=device), 0.3) if dropout else (None, 0.0)
    for on_output, args, exact_args in zip((False, True), both_ways(inputs), both_ways(exact_inputs), strict=True):
        assert launch.aligned(*args[:2]) or not schedule.descriptors
        got = launch.lora_matmul(*args, *rest, on_output, config=TILE, schedule=schedule)
        with oracle.in_one_chain():
            eager = eager_backend.lora_matmul(*args, *rest, on_output)
        exact = eager_backend.lora_matmul(*exact_args, *rest, on_output)
        for name, *values in zip(("out", "h"), got, eager, exact, strict=True):
            oracle.within(name, *values)
    assert not counters(torch.device(inputs.x.device), 1).any()


def test_same_bits_whatever_was_computed_between(device):
    cases = [(CASES[1], PUBLISH), (CASES[3], SCHEDULES[3]), (CASES[2], RECOMPUTE)]
    draws = [(next(both_ways(oracle.draw(*case[:4], device=device))), schedule) for case, schedule in cases]
    turns = [
        [launch.lora_matmul(*args, None, 0.0, False, config=TILE, schedule=schedule) for args, schedule in draws]
        for _ in range(3)
    ]
    for turn in turns[1:]:
        for got, expected in zip(turn, turns[0], strict=True):
            assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    assert not counters(draws[0][0][0].device, 1).any()


def test_descriptors_take_16_bit_elements_in_whole_rows_of_16_bytes_and_nothing_else(device):
    def draw(*shape, dtype=torch.float16):
        return torch.zeros(shape, dtype=dtype, device=device)

    x, weight = draw(64, 32), draw(48, 32)
    assert launch.aligned(x, weight.t())
    assert launch.aligned(draw(64, 48), weight)
    assert launch.aligned(draw(64, 64)[:, :32], weight.t())
    refused = {
        "float32": (x.float(), weight.float().t()),
        "transposed tokens": (draw(32, 64).t(), weight.t()),
        "expanded tokens": (draw(1, 32).expand(64, 32), weight.t()),
        "a base between two 16 bytes": (draw(64, 40)[:, 1:33], weight.t()),
        "rows of 66 bytes": (draw(64, 33)[:, :32], weight.t()),
        "a weight's rows of 66 bytes": (x, draw(48, 33)[:, :32].t()),
        "every second element of the weight": (x, draw(48, 64)[:, ::2].t()),
    }
    assert not [name for name, operands in refused.items() if launch.aligned(*operands)]


def test_plain_is_the_bare_product(device):
    inputs = oracle.draw(70, 123, 90, 16, device=device)
    args = next(both_ways(inputs))
    out, _ = launch.lora_matmul(*args, None, 0.0, False, config=TILE, schedule=ScheduleConfig(Schedule.PLAIN))
    expected = torch.nn.functional.linear(inputs.x, inputs.weight, inputs.bias)
    exact = torch.nn.functional.linear(inputs.x.double(), inputs.weight.double(), inputs.bias.double())
    oracle.within("out", out, expected, exact)


class _Order(NamedTuple):
    PUBLISH: bool
    GROUP_M: int


@triton.jit
def _tiles_kernel(out_ptr, tiles_m, tiles_p, V: tl.constexpr):
    index = tl.program_id(0)
    pid_m, pid_p = _tile(index, tiles_m, tiles_p, V)
    tl.store(out_ptr + 2 * index, pid_m)
    tl.store(out_ptr + 2 * index + 1, pid_p)


@pytest.mark.parametrize(("tiles_m", "tiles_p"), [(1, 1), (1, 7), (7, 1), (5, 4), (17, 3)])
@pytest.mark.parametrize("publishers_first", [False, True])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_every_tile_has_one_place_and_no_tile_waits_for_a_later_one(tiles_m, tiles_p, publishers_first, group, device):
    out = torch.full((tiles_m * tiles_p, 2), -1, dtype=torch.int32, device=device)
    _tiles_kernel[(tiles_m * tiles_p,)](out, tiles_m, tiles_p, _Order(publishers_first, group))
    places = {tuple(tile): place for place, tile in enumerate(out.tolist())}
    assert places.keys() == {(m, p) for m in range(tiles_m) for p in range(tiles_p)}
    if publishers_first:
        assert all(places[m, 0] <= place for (m, _), place in places.items())


def test_schedule_recomputes_in_narrow_outputs_produces_in_small_launches_and_else_publishes():
    device = Device((10, 0), 227 * 1024, 132)
    tile = TileConfig(128, 128, 64, 16, 8, 8, 3)

    def chosen(M, P, Q=4096, aligned=False):
        return default_schedule(Problem(M, P, Q, 16, 2, 2, aligned=aligned), tile, device)

    assert chosen(8192, 4096) == PUBLISH
    assert chosen(8192, 4096, aligned=True) == ScheduleConfig(Schedule.PUBLISH, descriptors=True)
    assert chosen(8192, 256, aligned=True) == ScheduleConfig(Schedule.RECOMPUTE, descriptors=False)
    assert chosen(16384, 256, aligned=True) == ScheduleConfig(Schedule.RECOMPUTE, descriptors=True)
    assert chosen(256, 4096, aligned=True) == ScheduleConfig(Schedule.PRODUCE, 8)
    assert chosen(8192, 256) == RECOMPUTE
    assert chosen(256, 4096) == ScheduleConfig(Schedule.PRODUCE, 8)
    # a wave of tiles, with room for no producer: nothing is left to do when publishers are done
    assert chosen(1024, 2048, Q=4096) == RECOMPUTE
    assert chosen(256, 4096, Q=100) == ScheduleConfig(Schedule.PRODUCE, 2)
    for M in (1, 100, 1000, 10_000):
        schedule = chosen(M, 4096)
        programs = -(-M // 128) * (32 + (schedule.split if schedule.kind == Schedule.PRODUCE else 0))
        assert schedule.kind != Schedule.PRODUCE or programs <= 132


def test_without_counters_the_launch_recomputes(monkeypatch, device):
    """As while a CUDA graph is captured on a stream that never had any."""
    monkeypatch.setattr(launch, "counters", lambda *_: None)
    inputs = oracle.draw(70, 123, 130, 4, device=device)
    args = next(both_ways(inputs))
    got = launch.lora_matmul(*args, None, 0.0, False, config=TILE, schedule=PUBLISH)
    expected = launch.lora_matmul(*args, None, 0.0, False, config=TILE, schedule=RECOMPUTE)
    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))


def test_counters_grow_and_stay_zero(device):
    place = torch.zeros(0, device=device).device
    many = counters(place, 1 << 15)
    assert many.numel() >= 1 << 15
    assert not many.any()
    assert counters(place, 3) is many
    assert SYNC_HEADER == 2
