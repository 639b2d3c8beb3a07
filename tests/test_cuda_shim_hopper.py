"""The shim of Hopper, checked: each primitive by its definition in the PTX ISA, and kernels that are broken."""

import ctypes
import shutil
from ctypes import POINTER, byref, c_char_p, c_int32, c_int64, c_uint64, c_void_p
from itertools import product

import pytest
import torch
from cuda_shim.hopper import INCLUDES
from cuda_shim.host import SHIM, compile

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here")
SEEDS = range(1, 9)
HANGS, BROKEN = 1, 3


class TileMap(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p), ("inner", c_int64), ("outer", c_int64), ("row_bytes", c_int64),
        ("box_inner", c_int32), ("box_outer", c_int32), ("swizzle_bytes", c_int32),
    )  # fmt: skip


@pytest.fixture(scope="session")
def checks(tmp_path_factory):
    path = tmp_path_factory.mktemp("shim") / "checks_hopper.so"
    compile(SHIM / "checks_hopper.cpp", path, *INCLUDES, "-fPIC", "-shared")
    library = ctypes.CDLL(str(path))
    library.map_why_not.restype = library.why_broken.restype = c_char_p
    library.run.argtypes = (
        c_char_p, POINTER(TileMap), POINTER(TileMap), c_void_p, c_void_p, c_int32, c_int32, c_int32, c_uint64,
    )  # fmt: skip
    return library


def tile_map(matrix, box_inner, box_outer, swizzle=128):
    rows, columns = matrix.shape
    return TileMap(matrix.data_ptr(), columns, rows, matrix.stride(0) * 2, box_inner, box_outer, swizzle)


def run(checks, name, first=None, second=None, given=None, out=None, flag=0, at=(0, 0), seed=1):
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in (given, out))
    maps = (byref(tile or TileMap()) for tile in (first, second))
    return checks.run(name.encode(), *maps, *pointers, flag, *at, seed)


def numbered(rows, columns):
    """Every element another number, in bits."""
    return torch.arange(1, rows * columns + 1).to(torch.int16).view(rows, columns)


def as_it_lies(box, swizzle):
    """CUDA Driver API and PTX ISA, swizzling modes: bits 4 to 6 of an address are xored with those from bit 7 on."""
    flat = box.contiguous().flatten().view(-1, 8)
    chunk = torch.arange(len(flat))
    lies = torch.empty_like(flat)
    lies[chunk ^ ((chunk >> 3) & (swizzle // 16 - 1))] = flat
    return lies.flatten()


def box_of(matrix, inner, outer, columns, rows):
    """What is beyond the edge is zero."""
    padded = torch.nn.functional.pad(matrix, 4 * (256,))
    return padded[outer + 256 :][:rows, inner + 256 :][:, :columns]


PLACES = [(0, 0), (24, 5), (72, 30), (-8, -3), (3, 2), (200, 0)]


@pytest.mark.parametrize("swizzle", [32, 64, 128])
@pytest.mark.parametrize("multicast", [False, True], ids=["", "multicast"])
def test_a_box_lies_in_shared_memory_as_documented(checks, swizzle, multicast):
    columns, rows = swizzle // 2, 40
    storage = numbered(37, 104)
    matrix = storage[:, :100]
    for seed, (inner, outer) in enumerate(PLACES):
        out = torch.zeros(2, rows * columns, dtype=torch.int16)
        tile = tile_map(matrix, columns, rows, swizzle)
        assert run(checks, "load", tile, out=out, flag=int(multicast), at=(inner, outer), seed=seed) == 0
        expected = as_it_lies(box_of(matrix, inner, outer, columns, rows), swizzle)
        assert torch.equal(out, expected.expand(2, -1)), (inner, outer)


@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_a_box_is_stored_within_the_matrix_alone(checks, swizzle):
    columns, rows = swizzle // 2, 40
    for seed, (inner, outer) in enumerate(PLACES):
        matrix = torch.full((37, 104), -1, dtype=torch.int16)
        box = numbered(rows, columns)
        tile = tile_map(matrix[:, :100], columns, rows, swizzle)
        assert run(checks, "store", tile, given=as_it_lies(box, swizzle), at=(inner, outer), seed=seed) == 0
        expected = torch.full((37 + 512, 104 + 512), -1, dtype=torch.int16)
        expected[outer + 256 :, inner + 256 :][:rows, :columns] = box
        expected = expected[256:-256, 256:-256]
        expected[:, 100:] = -1
        assert torch.equal(matrix, expected), (inner, outer)


def test_maps_are_refused_as_the_kernel_expects(checks):
    """Two statements of the documented limits, the extension's and the shim's."""
    data = torch.zeros(64).data_ptr()
    sizes = (-1, 0, 1, 8, 64, 2**32, 2**32 + 1)
    answers = set()
    for start, inner, outer, row_bytes, box, swizzle in product(
        (0, data, data + 8), sizes, sizes, (0, 8, 16, 120, 128, 2**33 + 16, 2**40 - 16, 2**40),
        ((64, 64), (0, 1), (8, 256), (8, 257), (12, 8), (16, 1), (32, 2), (128, 1)), (0, 16, 32, 64, 128),
    ):  # fmt: skip
        tile = TileMap(start, inner, outer, row_bytes, *box, swizzle)
        made = bool(checks.map_is_made(byref(tile)))
        assert made == (checks.map_why_not(byref(tile)) is None), (start, inner, outer, row_bytes, box, swizzle)
        answers.add(made)
    assert answers == {True, False}


def fragments(columns):
    """PTX ISA, wgmma.m64nNk16: row and column of what (thread, index) holds of the sums."""
    thread, index = torch.meshgrid(torch.arange(128), torch.arange(columns // 2), indexing="ij")
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (index // 2 % 2)
    return row, 8 * (index // 4) + thread % 4 * 2 + index % 2


def a_in_registers(a):
    """PTX ISA, fragments of a: thread's (4 steps of k, 128 threads, 8 elements)."""
    thread, index = torch.meshgrid(torch.arange(128), torch.arange(8), indexing="ij")
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (index // 2 % 2)
    column = thread % 4 * 2 + index % 2 + 8 * (index // 4)
    return torch.stack([a[row, 16 * step + column] for step in range(4)])


def multiply(checks, name, flag=0, seed=1):
    """A product of whole numbers, exact in every type and order: what the kernel makes of it, and what it is."""
    columns, element, *transposed = name.split()
    columns, dtype = int(columns), getattr(torch, element)
    a, b = torch.randint(-9, 10, (64, 64)).to(dtype), torch.randint(-9, 10, (64, columns)).to(dtype)
    stored_a = a.t().contiguous() if "a" in transposed else a
    # a second tile for whoever overwrites the first
    stored_a = torch.cat([stored_a, 100 + stored_a], 1)
    if "b" in transposed:
        stored_b, width = b, min(columns, 64)
        second = tile_map(stored_b, width, 64, 2 * width)
    else:
        stored_b = b.t().contiguous()
        second = tile_map(stored_b, 64, columns)
    out = torch.full((128, columns // 2), torch.nan)
    registers = a_in_registers(a).contiguous()
    outcome = run(checks, name, tile_map(stored_a, 64, 64), second, registers, out, flag, seed=seed)
    expected = a.float() @ b.float()
    return outcome, out, expected[fragments(columns)]


PRODUCTS = [
    "16 bfloat16", "16 bfloat16 b", "32 float16 b", "64 float16 a", "128 bfloat16 a b", "256 bfloat16", "256 float16 b",
]  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_wgmma_multiplies_tiles_that_the_tma_laid_out(checks, name):
    for flag, seed in ((0, 0), (0, 1), (1, 2), (7, 3)):
        if flag == 1 and " a" in name:
            continue
        outcome, out, expected = multiply(checks, name, flag, seed)
        assert outcome == 0, checks.why_broken()
        before = torch.arange(out.shape[1]).float() if flag == 7 else 0
        assert torch.equal(out, expected + before), (flag, seed)


@pytest.mark.parametrize(
    ("flag", "why"),
    [(2, "without wgmma_fence"), (3, None), (4, None), (5, HANGS), (6, "before its wgmmas")],
    ids=["no fence", "not awaited", "tiles overwritten", "half of the threads", "not committed"],
)
def test_a_broken_use_of_wgmma_is_seen(checks, flag, why):
    outcomes = [multiply(checks, "64 float16 a", flag, seed) for seed in SEEDS]
    if why is None:
        assert all(outcome == 0 for outcome, _, _ in outcomes), checks.why_broken()
        assert not all(torch.equal(out, expected) for _, out, expected in outcomes)
    elif why == HANGS:
        assert all(outcome == HANGS for outcome, _, _ in outcomes)
    else:
        assert all(outcome == BROKEN for outcome, _, _ in outcomes)
        assert why in checks.why_broken().decode()


def test_store_matrices_is_the_inverse_of_load_matrices(checks):
    matrices = numbered(32, 8).view(4, 8, 8)
    given = matrices.view(4, 32, 2).transpose(0, 1).contiguous()
    expected = torch.cat([torch.cat([matrices[0], matrices[1]], 1), torch.cat([matrices[2], matrices[3]], 1)])
    for flag in (0, 1, 2):
        out = torch.zeros(16, 16, dtype=torch.int16)
        assert run(checks, "matrices", tile_map(out, 16, 16, 32), given=given, flag=flag) == 0
        # without a fence the TMA sees nothing of them, without a barrier what its own thread has stored
        assert torch.equal(out, expected) if flag == 0 else (out == -1).sum() >= 31 * 8


def loads(checks, flag):
    matrix = numbered(40, 64)
    for seed in SEEDS:
        out = torch.zeros(2, 40 * 64, dtype=torch.int16)
        outcome = run(checks, "load", tile_map(matrix, 64, 40), out=out, flag=flag, seed=seed)
        yield outcome, torch.equal(out, as_it_lies(matrix, 128).expand(2, -1))


def test_a_broken_load_is_seen(checks):
    assert all(outcome == (0, True) for outcome in loads(checks, 5))
    assert not all(right for _, right in loads(checks, 2))
    assert all(outcome in (HANGS, BROKEN) for outcome, _ in loads(checks, 3))
    assert all(outcome == BROKEN for outcome, _ in loads(checks, 4))
    assert "one place" in checks.why_broken().decode()


def test_a_broken_store_is_seen(checks):
    given, right = as_it_lies(numbered(40, 64), 128), []
    for seed in SEEDS:
        out = torch.zeros(40, 64, dtype=torch.int16)
        assert run(checks, "store", tile_map(out, 64, 40), given=given, flag=1, seed=seed) == 0
        right.append(torch.equal(out, numbered(40, 64)))
    assert not all(right)
    outcomes = [run(checks, "store", tile_map(out, 64, 40), given=given, flag=2, seed=seed) for seed in SEEDS]
    assert BROKEN in outcomes


TOLD_BADLY = {1: None, 2: None, 3: "nobody made", 4: "more arrivals", 5: "overwritten"}


@pytest.mark.parametrize("flag", [0, *TOLD_BADLY])
def test_what_another_block_is_told_comes_by_release_and_acquire(checks, flag):
    told = torch.zeros(1, dtype=torch.int32)
    outcomes = [run(checks, "tell", out=told, flag=flag, seed=seed) for seed in SEEDS]
    if flag == 0 or TOLD_BADLY[flag] is None:
        assert outcomes == [0] * len(SEEDS), checks.why_broken()
        assert (told.item() == 42) == (flag == 0)
    else:
        assert set(outcomes) == {BROKEN}
        assert TOLD_BADLY[flag] in checks.why_broken().decode()


def test_registers_move_between_warpgroups_if_there_are_enough(checks):
    assert [run(checks, "registers", flag=flag) for flag in range(3)] == [0, HANGS, HANGS]


@pytest.mark.parametrize("flag", range(8))
def test_the_tma_of_another_block_sees_what_was_published_as_it_must_be(checks, flag):
    """flag 0 is right; each other leaves one thing out."""
    expected = (torch.arange(64 * 32) % 1000).to(torch.int16).repeat_interleave(2)
    right = []
    for seed in SEEDS:
        data, counter = torch.zeros(64, 64, dtype=torch.int16), torch.zeros(1, dtype=torch.int32)
        out = torch.zeros(64 * 64, dtype=torch.int16)
        assert run(checks, "publish", tile_map(data, 64, 64), given=counter, out=out, flag=flag, seed=seed) == 0
        right.append(torch.equal(out, as_it_lies(expected.view(64, 64), 128)))
    assert all(right) if flag == 0 else not any(right), right
