"""The rule that picks tiles answers for every GPU and every size, within the limits."""

import dataclasses
import itertools

import pytest

from fused_lora.backends.triton.configs import (
    LEAST_ROWS,
    PROGRAMS,
    DecodeConfig,
    Device,
    Problem,
    Schedule,
    block_r,
    default_config,
    default_reduction,
    default_schedule,
    fits,
    reduction_parts,
)
from fused_lora.backends.triton.decode_configs import (
    MOST_ROWS,
    decode_programs,
    default_decode,
    fits_decode,
    takes_decode,
)

# shared memory that a program may use, from the CUDA programming guide, table of compute capabilities
DEVICES = {
    "sm_80": Device((8, 0), 163 * 1024),
    "sm_86": Device((8, 6), 99 * 1024),
    "sm_89": Device((8, 9), 99 * 1024),
    "sm_90": Device((9, 0), 227 * 1024),
    "sm_100": Device((10, 0), 227 * 1024),
    "sm_120": Device((12, 0), 99 * 1024),
    "unknown, small": Device((99, 0), 48 * 1024, 1),
    "unknown, large": Device((13, 0), 1024 * 1024, 1000),
}
HOPPER = Device((9, 0), 227 * 1024, 132)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
def test_default_config_fits_every_device(device):
    sizes = itertools.product((1, 17, 4096), (2, 4), (2, 4), (1, 16, 64, 100, 256, 1000), (False, True), (False, True))
    for M, itemsize, adapter_itemsize, rank, dropout, exact in sizes:
        problem = Problem(
            M, 4096, 4096, rank, itemsize, max(itemsize, adapter_itemsize), dropout, itemsize == 2 or not exact
        )
        config = default_config(problem, device)
        assert fits(config, problem, device), (problem, config)
        schedule = default_schedule(problem, config, device)
        assert schedule.split == 1 or schedule.kind == Schedule.PRODUCE
        for block in (config.BLOCK_M, config.BLOCK_P, config.BLOCK_Q, config.BLOCK_R):
            assert block >= 16
            assert block & (block - 1) == 0


def test_small_m_gets_a_low_tile():
    tall = default_config(Problem(4096, 4096, 4096, 16, 2, 2), DEVICES["sm_90"])
    low = default_config(Problem(3, 4096, 4096, 16, 2, 2), DEVICES["sm_90"])
    assert (tall.BLOCK_M, tall.BLOCK_P, low.BLOCK_M) == (128, 256, 16)


@pytest.mark.parametrize(
    ("rank", "block"), [(1, 16), (16, 16), (17, 32), (100, 128), (128, 128), (129, 128), (999, 128)]
)
def test_rank_is_padded_to_a_power_of_two_and_looped_beyond_the_limit(rank, block):
    assert block_r(rank) == block
    assert {default_reduction(rank, 2, device).BLOCK_R for device in DEVICES.values()} == {block}


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
def test_parts_of_a_reduction_run_at_once_and_have_rows_enough(device):
    for rows, tiles, itemsize, rank in itertools.product(
        (0, 1, 511, 8192, 10**6), (1, 2, 128, 5000), (2, 4), (1, 64, 500)
    ):
        parts = reduction_parts(default_reduction(rank, itemsize, device), rows, tiles, itemsize, device)
        assert parts == 1 or (parts * tiles <= PROGRAMS * device.sms and rows >= parts * LEAST_ROWS)


def test_tensor_descriptors_are_for_datacentre_blackwell_alone():
    problem = Problem(8192, 4096, 4096, 16, 2, 2, aligned=True)
    schedules = {name: default_schedule(problem, default_config(problem, d), d) for name, d in DEVICES.items()}
    assert {name for name, schedule in schedules.items() if schedule.descriptors} == {"sm_100"}


@pytest.mark.parametrize(("columns", "rank"), [(8192, 16), (8192, 64), (2048, 16), (20480, 16), (28672, 128)])
def test_a_training_step_fills_an_h100_with_loads(columns, rank):
    device = Device((9, 0), 227 * 1024, 132)
    config = default_reduction(rank, 2, device)
    tiles = columns // config.BLOCK_C
    programs = tiles * reduction_parts(config, 8192, tiles, 2, device)
    on_their_way = (config.num_stages - 1) * config.BLOCK_M * (config.BLOCK_C + config.BLOCK_R) * 2
    assert programs * on_their_way / device.sms >= 50 * 1024


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
def test_decoding_has_room_for_two_programs_on_every_device_and_no_part_is_empty(device):
    sizes = itertools.product((1, 123, 4096, 128_256), (1, 123, 4096, 14336), (1, 16, 100, 1000), (2, 4), (2, 4))
    for P, Q, rank, itemsize, adapter_itemsize in sizes:
        problem = Problem(4, P, Q, rank, itemsize, max(itemsize, adapter_itemsize))
        config = default_decode(problem, device)
        assert decode_programs(config, problem, device) >= 2, (problem, config)
        steps = -(-Q // config.BLOCK_Q)
        assert 1 <= config.SPLIT <= config.SPLIT_H <= max(steps, 1), (problem, config)
        assert min(config.BLOCK_P, config.BLOCK_Q, config.BLOCK_R) >= 16


def test_decoding_fills_a_gpu_and_waits_for_no_second_wave():
    config = default_decode(Problem(1, 4096, 4096, 16, 2, 2), HOPPER)
    assert config == DecodeConfig(64, 128, 16, SPLIT=4, SPLIT_H=8, num_warps=4, num_stages=4)
    assert 4096 // 64 * 4 + 8 == 2 * 132


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
def test_few_rows_take_the_least_tile_that_holds_them_and_more_take_parts_that_run_at_once(device):
    sizes = itertools.product((1, 1024, 4096, 14336), (1, 4096), (1, 64, 100), (2, 4), (False, True))
    for P, Q, rank, itemsize, exact in sizes:
        for M in (1, 16, 17, 32, 33, 64, 65, 128, 129, 300, 1024):
            problem = Problem(M, P, Q, rank, itemsize, itemsize, False, itemsize == 2 or not exact)
            config = default_decode(problem, device)
            rows = [rows for rows in (16, 32, 64) if rows >= M] or [128]
            assert rows[0] == config.ROWS, (problem, config)
            takes = takes_decode(problem, device)
            if M <= 128:
                # float32 that passes through registers leaves none for the tallest
                roomy = itemsize == 2 or (problem.tensor_cores and device.capability[0] in (9, 10))
                assert takes == (M <= 64 or roomy), (problem, config)
            if takes:
                assert fits_decode(config, problem, device)
            if takes and M > 128:
                blocks = -(-M // 128)
                parts = blocks * (-(-P // config.BLOCK_P) + -(-rank // config.BLOCK_R)) * config.SPLIT
                assert config.SPLIT > 1
                assert parts <= decode_programs(config, problem, device) * device.sms, (problem, config)


def test_no_decode_with_dropout_nor_of_many_rows():
    few = Problem(16, 64, 65536, 16, 2, 2)
    assert takes_decode(few, HOPPER)
    assert takes_decode(dataclasses.replace(few, M=MOST_ROWS), HOPPER)
    assert not takes_decode(dataclasses.replace(few, M=MOST_ROWS + 1), HOPPER)
    assert not takes_decode(dataclasses.replace(few, dropout=True), HOPPER)


@pytest.mark.parametrize(
    ("M", "P", "expected"),
    [
        (256, 4096, "parts"),
        (384, 4096, ("PRODUCE", 128, 6)),
        (768, 4096, ("PRODUCE", 256, 4)),
        (1024, 4096, ("RECOMPUTE", 256, 4)),
        (2048, 4096, ("PUBLISH", 256, 4)),
        (256, 14336, ("PRODUCE", 256, 4)),
        (512, 1024, "parts"),
    ],
)
def test_an_h100_has_a_way_to_be_busy_at_every_m(M, P, expected):
    problem = Problem(M, P, 4096, 16, 2, 2)
    if expected == "parts":
        assert takes_decode(problem, HOPPER)
        return
    assert not takes_decode(problem, HOPPER)
    tile = default_config(problem, HOPPER)
    assert (default_schedule(problem, tile, HOPPER).kind.name, tile.BLOCK_P, tile.num_stages) == expected


@pytest.mark.parametrize("rank", [64, 128, 1000])
def test_ranks_are_published_in_blocks_that_leave_the_whole_tile_its_registers(rank):
    tile = default_config(Problem(8192, 4096, 4096, rank, 2, 2, aligned=True), HOPPER)
    assert (tile.BLOCK_M, tile.BLOCK_P, tile.BLOCK_R) == (128, 256, 64)
