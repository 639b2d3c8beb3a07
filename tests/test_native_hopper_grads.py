"""The adapter gradients on Hopper: on the host by the shim in cuda_shim/, and what nvcc makes of them."""

import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from cuda_shim import hopper_grads
from cuda_shim.hopper import BrokenLaunchError
from cuda_shim.host import CSRC, DEFAULT, SHIM, Gradients, Turns
from hypothesis import given, settings
from hypothesis import strategies as st
from native_operators import OnDevice, check, dtype_of, enough

from fused_lora.codegen import sass
from fused_lora.dropout import dropout_mask

SEED = torch.tensor([-7_000_000_000_000_000_001])
# each tile of ranks: full, and with a tail
RANKS = (8, 16, 24, 32, 40, 64, 72, 128, 136, 256)
ARITHMETICS = ("bfloat16", "float16")
by_arithmetic = pytest.mark.parametrize("arithmetic", ARITHMETICS)
by_dropout = pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here")
NVCC = shutil.which("nvcc")


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not here")
    return hopper_grads.build(tmp_path_factory.mktemp("hopper_grads"))


@pytest.fixture(scope="session")
def operators(request):
    """On a Hopper GPU its own, else the host's."""
    return OnDevice() if OnDevice.serves(hopper=True) else request.getfixturevalue("kernels")


def within_nan(rows, columns, dtype):
    """A matrix in the midst of a larger one of NaN, with rows of whole 16 bytes."""
    larger = torch.full((rows + 2, columns + 24), float("nan"), dtype=dtype)
    matrix = larger[1:-1, 8:-16]
    matrix.copy_(torch.randn(rows, columns))
    return matrix


def draw(M, K, N, R, arithmetic):
    return tuple(within_nan(M, columns, dtype_of(arithmetic)) for columns in (K, R, N, R))


def check_draw(kernels, sizes, arithmetic, *rest, turns=DEFAULT):
    """Of one draw, or where there are few values of as many as pool them."""
    M, K, N, R = sizes
    draws = [draw(M, K, N, R, arithmetic) for _ in range(enough(R * min(K, N)))]
    check(kernels, "adapter_grad", arithmetic, draws, M, *rest, turns=turns)


def dropped(dropout):
    return (1.5, SEED if dropout else None, 0.3 if dropout else 0.0)


@by_arithmetic
@by_dropout
@pytest.mark.parametrize("R", RANKS)
def test_as_exact_as_plain_pytorch(operators, arithmetic, dropout, R):
    dtype = dtype_of(arithmetic)
    # sums that are rounded once more, and such as are not
    for M, dtypes in ((1, (torch.float32, dtype)), (333, (dtype, torch.float32))):
        check_draw(operators, (M, 200, 136, R), arithmetic, *dropped(dropout), *dtypes, turns=Turns(2, 5))


@pytest.mark.parametrize("M", [1, 63, 64, 65, 127, 129, 700, 1217])
@pytest.mark.parametrize("sms", [1, 40])
def test_any_number_of_tokens(kernels, M, sms):
    turns = Turns(3, 9, sms=sms)
    check_draw(
        kernels, (M, 128, 264, 16), "bfloat16", *dropped(True), torch.float32, torch.bfloat16, turns=turns
    )  # fmt: skip


@pytest.mark.parametrize("wanted", ["dA", "dB"])
def test_only_the_gradient_asked_for_is_computed(kernels, wanted):
    pair, absent = draw(200, 72, 72, 16, "float16")[:2], (None, None)
    tensors = (*pair, *absent) if wanted == "dA" else (*absent, *pair)
    rest = (*dropped(True), torch.float32, torch.float32)
    check(kernels, "adapter_grad", "float16", [tensors], 200, *rest, turns=Turns(1, 4, sms=24))


@pytest.mark.parametrize("seed", [0, -1, 2**32 + 5, -(2**63)])
def test_dropout_bits_are_those_of_the_reference(kernels, seed):
    seed = torch.tensor([seed])
    for rows, columns, p in ((152, 40, 0.3), (24, 200, 1e-7), (40, 136, 0.999)):
        ones, eye = torch.ones(rows, columns).half(), torch.eye(rows).half()
        dA, _ = kernels.adapter_grad(ones, eye, None, None, 1.0, seed, p, torch.float32, torch.float32)
        assert torch.equal(dA != 0, dropout_mask(seed, rows, columns, p))


# every block alone, in order; many at once, in any order; the first to start hardly ever having a turn
ORDERS = [Turns(0, 1), Turns(0, 9), Turns(1, 9), Turns(2, 5)]
ORDERS += [Turns(seed, 9, delayed) for seed, delayed in ((3, 1), (4, 2), (5, 4))]


def prove(kernels, R=16):
    """The same bits in any order of blocks, of sums cut into parts; the right ones, of more steps than stages."""
    given = (*draw(1000, 136, 72, R, "bfloat16"), *dropped(True), torch.float32, torch.float32)
    assert kernels.plan(Gradients(*given), Turns(sms=24)).split > 2
    bits = None
    for turns in ORDERS:
        got = kernels.adapter_grad(*given, turns=replace(turns, sms=24))
        bits = bits or got
        assert all(torch.equal(one, other) for one, other in zip(bits, got, strict=True)), turns
    for seed in range(4):
        turns = Turns(seed, 4, sms=1)
        check_draw(kernels, (1700, 72, 72, R), "bfloat16", *dropped(True), torch.float32, torch.float32, turns=turns)


@pytest.mark.parametrize("R", [16, 64, 256])
def test_any_order_of_blocks_gives_the_same_bits(kernels, R):
    prove(kernels, R)


sizes = st.integers(1, 40).map(lambda eights: 8 * eights)


@settings(max_examples=40, deadline=None)
@given(
    M=st.integers(1, 900), K=sizes, N=sizes, R=st.integers(1, 32).map(lambda eights: 8 * eights),
    arithmetic=st.sampled_from(ARITHMETICS), out=st.sampled_from([torch.float32, None]), dropout=st.booleans(),
    sms=st.integers(1, 40), resident=st.integers(1, 9), delayed=st.integers(0, 4), seed=st.integers(0, 99),
)  # fmt: skip
def test_whatever_the_sizes(kernels, M, K, N, R, arithmetic, out, dropout, sms, resident, delayed, seed):
    torch.manual_seed(seed)
    out = out or dtype_of(arithmetic)
    turns = Turns(seed, resident, delayed, sms)
    check_draw(kernels, (M, K, N, R), arithmetic, *dropped(dropout), out, out, turns=turns)


def test_what_it_cannot_serve_has_a_reason(kernels):
    def why(x, g, dtype=torch.bfloat16):
        given = (x.to(dtype) if x.dtype == torch.float32 else x, g)
        return kernels.why_not(*given, None, None, 1.0, None, 0.0, torch.float32, torch.float32)

    x, g = torch.randn(64, 72).bfloat16(), torch.randn(64, 16).bfloat16()
    assert why(x, g) is None
    alone = "Hopper's kernel multiplies bfloat16 and float16 alone"
    assert why(torch.randn(64, 72), torch.randn(64, 16), torch.float32) == alone
    multiples = "in_features, out_features and the rank must be multiples of 8"
    assert why(x, torch.randn(64, 12).bfloat16()) == multiples
    assert why(x, torch.randn(64, 264).bfloat16()) == "the rank must be 8 to 256"
    assert why(x[:0], g[:0]) == "there must be a token"
    assert why(x.t().contiguous().t(), g) == "rows of operands must be contiguous"
    assert why(x[:, :70], g) == multiples
    assert why(torch.randn(64, 80).bfloat16()[:, 1:73], g) == "a matrix must begin at a multiple of 16 bytes"
    assert why(torch.randn(64, 74).bfloat16()[:, :72], g) == "the stride between rows must be a multiple of 16 bytes"
    assert why(x[:1].expand(64, 72), g) == "rows must lie apart, and less than 2^40 bytes"


@pytest.mark.parametrize(
    ("M", "K", "N", "R", "p", "parts"),
    [
        (8192, 4096, 4096, 16, 0.0, 2), (8192, 4096, 4096, 16, 0.3, 4), (8192, 4096, 14336, 16, 0.0, 1),
        (8192, 1024, 1024, 64, 0.0, 8), (512, 1024, 1024, 64, 0.0, 2), (8192, 4096, 4096, 256, 0.3, 2),
    ],
)  # fmt: skip
def test_parts_are_few_and_all_blocks_run_at_once(kernels, M, K, N, R, p, parts):
    x, g, dy, h = (torch.empty(1, columns).bfloat16().expand(M, columns) for columns in (K, R, N, R))
    asked = Gradients(x, g, dy, h, 1.0, SEED if p else None, p, torch.float32, torch.float32)
    split = kernels.plan(asked, Turns(sms=132)).split
    assert split == parts
    assert split * (K + N) // 128 <= 132 * (2 if R <= 128 else 1)


# --------------------------------------------------------------------------------------------------
# What each step is for: without it, or with it done wrongly, something above fails
# --------------------------------------------------------------------------------------------------

WRONG = {
    "tail dropped": ("hopper/adapter_grad.cuh", "ceil_div(gradients.M, Tile::TOKENS)", "gradients.M / Tile::TOKENS"),
    "parts in the order of arrival": (
        "kernels/parts.cuh",
        "other < parts; ++other) {",
        "other < parts; ++other) {\n"
        "    theirs = slots + (part + other) % parts * SLOT<typename Product::Shape> + thread_index();",
    ),
    "counter left": ("kernels/handover.cuh", "if (last) *arrivals = 0;", ""),
    "stage released before it is read": (
        "hopper/adapter_grad.cuh",
        "      wgmma_wait<0>();\n      if (first_of_warp) arrive(empty + step % Tile::STAGES);",
        "      if (first_of_warp) arrive(empty + step % Tile::STAGES);\n      wgmma_wait<0>();",
    ),
    "stage filled while it is read": (
        "hopper/adapter_grad.cuh", "await_phase(empty + refilled % Tile::STAGES, refilled / Tile::STAGES % 2);", "",
    ),
    "stage read before it is filled": (
        "hopper/adapter_grad.cuh", "await_phase(full + step % Tile::STAGES, step / Tile::STAGES % 2);", "",
    ),
    "more bytes announced than come": (
        "hopper/adapter_grad.cuh", "(barrier, Tile::STAGE_BYTES)", "(barrier, Tile::STAGE_BYTES + 16)",
    ),
    "mask not fenced": ("hopper/adapter_grad.cuh", "fence_shared_for_tma();", ""),
    "registers not ordered": ("hopper/adapter_grad.cuh", "wgmma_fence();", ""),
    "sums not awaited": ("hopper/adapter_grad.cuh", "wgmma_wait<0>();", ""),
    "barriers not published": ("hopper/adapter_grad.cuh", "publish_barriers();", ""),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_kernel_fails(tmp_path, wrong):
    file, right, instead = wrong
    for folder in ("kernels", "hopper"):
        shutil.copytree(CSRC / folder, tmp_path / "csrc" / "cuda" / folder)

    def rewrite(name, change):
        path = tmp_path / "csrc" / "cuda" / name
        path.write_text(change(path.read_text()))

    assert (CSRC / file).read_text().count(right) == 1
    rewrite(file, lambda text: text.replace(right, instead))
    # one instance, not optimised, compiles in a tenth of the time
    rewrite("hopper/adapter_grad.cu", lambda text: re.sub(r"Tile<Element, \d+>", "Tile<Element, 16>", text))
    rewrite("hopper/adapter_grad.cu", lambda text: text.replace("<Half>", "<BFloat16>"))
    source = tmp_path / "tests" / "cuda_shim" / "hopper_grads.cpp"
    source.parent.mkdir(parents=True)
    shutil.copy(SHIM / source.name, source)
    with pytest.raises((AssertionError, BrokenLaunchError)):
        prove(hopper_grads.build(tmp_path, source, "-O0"))


# --------------------------------------------------------------------------------------------------
# nvcc
# --------------------------------------------------------------------------------------------------

RESOURCES = re.compile(
    r"Function properties for \w*?Tile\w*?ELi(?P<ranks>\d+)\w*\n\s+(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n.*Used (?P<registers>\d+) registers"
)


@pytest.mark.skipif(NVCC is None, reason="nvcc is not here")
def test_its_machine_code(tmp_path):
    """No spills, room for as many blocks as planned, and a main loop of TMA and wgmma alone."""
    cubin = tmp_path / "kernel.cubin"
    command = [NVCC, "-cubin", "-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", f"-I{CSRC / 'device'}"]
    command += ["-Xptxas=-v,-warn-spills", "-Werror=all-warnings", "-o", cubin, CSRC / "hopper" / "adapter_grad.cu"]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    # what ptxas says of wgmmas that it makes wait for each other
    assert "C75" not in made.stderr
    found = [match.groupdict() for match in RESOURCES.finditer(made.stderr)]
    assert sorted(int(one["ranks"]) for one in found) == sorted(2 * [16, 32, 64, 128, 256])
    for one in found:
        assert one["stack"] == one["stores"] == one["loads"] == "0", one
        blocks = 1 if one["ranks"] == "256" else 2
        assert -(-int(one["registers"]) // 8) * 8 * 256 * blocks <= 65536, one

    functions = sass.disassemble_each(cubin.read_bytes())
    assert len(functions) == 10
    for name, instructions in functions.items():
        ranks = int(re.search(r"ELi(\d+)", name)[1])
        loop = main_loop(instructions)
        names = [one.name for one in loop]
        products = [name for name in names if name.startswith("HGMMA")]
        assert products == [name for name in products if name.startswith(f"HGMMA.64x{min(ranks, 128)}x16.F32")]
        assert len(products) == (8 if ranks == 256 else 4)
        # two panels of columns and, of 64, those of ranks
        assert names.count("UTMALDG.2D") == 2 + max(ranks // 64, 1)
        # the mask's fence is of the block
        assert {name for name in names if "MEMBAR" in name} <= {"MEMBAR.ALL.CTA"}
        assert sass.unwritten_reads(instructions) == []


def main_loop(instructions):
    """The shortest loop with all of the wgmmas."""
    products = [one.address for one in instructions if one.name.startswith("HGMMA")]
    around = [
        (one.address - one.target, one.target, one.address) for one in instructions
        if one.target is not None and one.target <= products[0] and one.address >= products[-1]
    ]  # fmt: skip
    _, first, last = min(around)
    return [one for one in instructions if first <= one.address <= last]
