"""The shim that runs CUDA kernels on the host, checked: each primitive by its definition, and broken kernels."""

import ctypes
import shutil
from ctypes import c_char_p, c_int32, c_int64, c_uint64, c_void_p

import pytest
import torch
from cuda_shim.host import SHIM, compile

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here")
SEEDS = range(1, 9)


@pytest.fixture(scope="session")
def checks(tmp_path_factory):
    path = tmp_path_factory.mktemp("shim") / "checks.so"
    compile(SHIM / "checks.cpp", path, "-fPIC", "-shared")
    library = ctypes.CDLL(str(path))
    library.run.argtypes = (c_char_p, *(3 * [c_void_p]), c_int32, c_int32, c_uint64, c_int32, c_int32)
    library.convert.argtypes = (c_void_p, c_int64, *(3 * [c_void_p]))
    return library


def run(checks, name, given=None, other=None, out=None, flag=0, blocks=1, seed=1, resident=4, delayed=0):
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in (given, other, out))
    return checks.run(name.encode(), *pointers, flag, blocks, seed, resident, delayed)


def test_conversions_are_pytorchs(checks):
    # every exponent and sign, with fractions on both sides of every tie
    bits = torch.arange(-(2**31), 2**31, 4099, dtype=torch.int64).to(torch.int32)
    ties = torch.tensor(
        [0x3F808000, 0x3F818000, 0x3F801000, 0x33000000, 0x477FEFFF, 0x477FF000, 0x7F7FFFFF, 0x7F800000]
    )
    values = torch.cat([bits, ties.to(torch.int32)]).view(torch.float32)
    bfloat16, half, tf32 = (torch.empty_like(values) for _ in range(3))
    checks.convert(values.data_ptr(), len(values), *(t.data_ptr() for t in (bfloat16, half, tf32)))
    assert torch.equal(bfloat16.nan_to_num(1e9), values.to(torch.bfloat16).float().nan_to_num(1e9))
    assert torch.equal(half.nan_to_num(1e9), values.half().float().nan_to_num(1e9))
    small = values.isfinite() & (values.abs() < 1e38)
    # 10 bits of fraction: the nearest multiple of a unit in the last place
    unit = 2.0 ** (values[small].abs().clamp_min(2.0**-126).double().log2().floor() - 10)
    scaled = values[small].double() / unit
    assert torch.equal(tf32[small].double(), scaled.sign() * (scaled.abs() + 0.5).floor() * unit)


def fragment_places(name):
    """PTX ISA, fragments of mma.m16n8k16 and m16n8k8: (row, column) of what (lane, index) holds of a, b and acc."""
    per_register = 1 if name == "mma_tf32" else 2
    half_k = 4 * per_register
    a, b, acc = {}, {}, {}
    for lane in range(32):
        group, in_group = lane // 4, lane % 4
        for i in range(4 * per_register):
            register = i // per_register
            column = in_group * per_register + i % per_register + (half_k if register >= 2 else 0)
            a[lane, i] = (group + (8 if register % 2 else 0), column)
        for i in range(2 * per_register):
            b[lane, i] = (in_group * per_register + i % per_register + (half_k if i >= per_register else 0), group)
        for i in range(4):
            acc[lane, i] = (group + (8 if i >= 2 else 0), in_group * 2 + i % 2)
    return a, b, acc


@pytest.mark.parametrize(
    ("name", "dtype"), [("mma_bfloat16", torch.bfloat16), ("mma_half", torch.half), ("mma_tf32", torch.float32)]
)
def test_mma_multiplies_matrices_that_lie_as_ptx_says(checks, name, dtype):
    k = 8 if dtype == torch.float32 else 16
    # whole numbers: exact in every type and any order
    a, b = torch.randint(-9, 10, (16, k)).to(dtype), torch.randint(-9, 10, (k, 8)).to(dtype)
    acc = torch.randint(-99, 100, (16, 8)).float()
    in_a, in_b, in_acc = (
        torch.stack([matrix[place] for place in places.values()])
        for matrix, places in zip((a, b, acc), fragment_places(name), strict=True)
    )
    assert run(checks, name, in_a, in_b, in_acc) == 0
    places = fragment_places(name)[2]
    expected = acc + a.float() @ b.float()
    assert torch.equal(in_acc, torch.stack([expected[place] for place in places.values()]))


@pytest.mark.parametrize("name", ["load_matrices", "load_transposed"])
def test_load_matrices_gives_what_ptx_says(checks, name):
    matrices = torch.arange(4 * 8 * 8, dtype=torch.int16).view(4, 8, 8)
    out = torch.zeros(32, 4, 2, dtype=torch.int16)
    assert run(checks, name, matrices, out=out) == 0
    # as the fragments of mma: lane 4·row + pair holds columns 2·pair and the next
    held = matrices.transpose(1, 2) if name == "load_transposed" else matrices
    assert torch.equal(out, held.reshape(4, 32, 2).transpose(0, 1))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_missing_barrier_is_seen(checks, seed):
    right, wrong = torch.zeros(64), torch.zeros(64)
    assert run(checks, "exchange", out=right, flag=1, seed=seed) == 0
    assert torch.equal(right, torch.arange(63.0, -1, -1))
    assert run(checks, "exchange", out=wrong, flag=0, seed=seed) == 0
    assert wrong.isnan().any()


def test_copies_come_when_they_are_awaited_and_no_sooner(checks):
    given = torch.arange(512, dtype=torch.int16).view(torch.uint8)[:512].clone()
    for flag, comes in ((0, False), (1, True), (2, False), (3, True)):
        storage = torch.zeros(528, dtype=torch.uint8)
        aligned = given if given.data_ptr() % 16 == 0 else storage[16 - storage.data_ptr() % 16 :][:512].copy_(given)
        out = torch.zeros(32, 16, dtype=torch.uint8)
        assert run(checks, "copies", aligned, out=out, flag=flag) == 0
        if comes:
            assert torch.equal(out[:, :10], given.view(32, 16)[:, :10])
            assert not out[:, 10:].any()
        else:
            assert (out == 255).all()


def test_a_barrier_that_not_all_come_to_is_an_error(checks):
    assert run(checks, "barrier", flag=0) == 0
    assert run(checks, "barrier", flag=1) == 1


def publish(checks, flag, **turns):
    blocks = 12
    published, out = torch.full((64,), torch.nan), torch.full((blocks, 64), torch.nan)
    counters = torch.zeros(3, dtype=torch.int32)
    failed = run(checks, "publish", published, counters, out, flag, blocks, **turns)
    return failed, torch.equal(out[1:], torch.arange(63.0, -1, -1).expand(blocks - 1, 64)) and not counters.any()


@pytest.mark.parametrize("resident", [1, 3, 12])
@pytest.mark.parametrize("delayed", [0, 2])
def test_a_hand_over_ends_well_in_any_order(checks, resident, delayed):
    for seed in SEEDS:
        assert publish(checks, 0, seed=seed, resident=resident, delayed=delayed) == (0, True)


@pytest.mark.parametrize("flag", [1, 2], ids=["flag before the barrier", "flag not awaited"])
def test_a_broken_hand_over_is_seen(checks, flag):
    outcomes = [publish(checks, flag, seed=seed, resident=4, delayed=1) for seed in SEEDS]
    assert not all(right for _, right in outcomes)


def test_waiting_for_a_block_that_has_not_started_is_seen_to_hang(checks):
    outcomes = [publish(checks, 3, seed=seed, resident=2) for seed in SEEDS]
    assert any(failed == 1 for failed, _ in outcomes)
