"""The CUDA kernels of the extension: the oracle, the tails, and any order of blocks.

On the GPU where the extension is built for one, else on the host, by the shim in cuda_shim/.
"""

import shutil
from dataclasses import replace

import pytest
import torch
from cuda_shim.host import BFLOAT16, EXACT, SHIM, Kernels, Turns, compile
from hypothesis import given, settings
from hypothesis import strategies as st
from native_operators import OnDevice, check, draw_matmul, dtype_of, enough, kernel_arithmetic

from fused_lora.backends import eager as eager_backend
from fused_lora.dropout import dropout_mask

SEED = torch.tensor([-7_000_000_000_000_000_001])
ARITHMETICS = ("bfloat16", "float16", "float32", "tf32")
# small M, several tiles of rows; ranks with a tail, of several tiles
SHAPES = ((1, 16), (5, 100), (16, 3), (17, 1), (129, 64))
by_arithmetic = pytest.mark.parametrize("arithmetic", ARITHMETICS)
by_direction = pytest.mark.parametrize("backward", [False, True], ids=["forward", "input gradient"])
by_dropout = pytest.mark.parametrize("dropout", [None, "input", "output"])


@pytest.fixture(scope="session")
def on_host(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not here")
    library = tmp_path_factory.mktemp("cuda") / "kernels.so"
    compile(SHIM / "library.cpp", library, "-fPIC", "-shared")
    return Kernels(library)


@pytest.fixture(scope="session")
def kernels(request):
    return OnDevice() if OnDevice.serves() else request.getfixturevalue("on_host")


@by_arithmetic
@by_direction
@by_dropout
@pytest.mark.parametrize(("K", "N"), [(123, 77), (72, 136)], ids=["odd", "in vectors"])
def test_matmul_is_as_exact_as_plain_pytorch(kernels, arithmetic, backward, dropout, K, N):
    rest = (1.5, SEED if dropout else None, 0.3 if dropout else 0.0, dropout == "output")
    for M, R in SHAPES:
        draws = [draw_matmul(arithmetic, M, K, N, R, backward) for _ in range(enough(M * R, M * min(K, N)))]
        check(kernels, "lora_matmul", arithmetic, draws, max(K, N) + R, *rest)


@by_arithmetic
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize(("K", "N"), [(123, 77), (72, 136)], ids=["odd", "in vectors"])
def test_adapter_gradients_are_as_exact_as_plain_pytorch(kernels, arithmetic, dropout, K, N):
    dtype = dtype_of(arithmetic)
    for M, R in SHAPES:
        draws = [
            tuple(torch.randn(M, columns).to(dtype) for columns in (K, R, N, R)) for _ in range(enough(R * min(K, N)))
        ]
        rest = (1.5, SEED if dropout else None, 0.3 if dropout else 0.0, torch.float32, dtype)
        check(kernels, "adapter_grad", arithmetic, draws, M, *rest)


@pytest.mark.parametrize("wanted", ["dA", "dB"])
def test_only_the_gradient_asked_for_is_computed(kernels, wanted):
    pair, absent = (torch.randn(40, 70), torch.randn(40, 3)), (None, None)
    tensors = (*pair, *absent) if wanted == "dA" else (*absent, *pair)
    got = kernels.adapter_grad(*tensors, 1.5, SEED, 0.3, torch.float32, torch.float32)
    expected = eager_backend.adapter_grad(*tensors, 1.5, SEED, 0.3, torch.float32, torch.float32)
    for one, other in zip(got, expected, strict=True):
        assert (one is None and other is None) or torch.allclose(one, other, atol=1e-5)


VIEWS = {
    "every other column": lambda: torch.randn(3, 10, 246)[..., ::2],
    "slice": lambda: torch.randn(3, 10, 200)[..., 7:130],
    "permuted": lambda: torch.randn(123, 30).t(),
    "expanded": lambda: torch.randn(123).expand(8, 123),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@by_arithmetic
def test_any_strides(kernels, view, arithmetic):
    dtype = dtype_of(arithmetic)
    x = view()
    # converted in its storage, so that the strides stay what they are
    stored = x.as_strided((x.untyped_storage().nbytes() // 4,), (1,), 0).to(dtype)
    x = stored.as_strided(x.shape, x.stride(), x.storage_offset())
    # w along neither dimension, u along the other than v
    w, u, v = torch.randn(246, 100).to(dtype)[::2, ::2], torch.randn(123, 20), torch.randn(50, 20).t()
    check(kernels, "lora_matmul", arithmetic, [(x, w, u, v, None)], 143, 1.5, None, 0.0, False)
    M = x.numel() // 123
    g = torch.randn(2, M).to(dtype).t()
    check(kernels, "adapter_grad", arithmetic, [(x, g, x, g)], M, 1.5, None, 0.0, torch.float32, torch.float32)


@by_arithmetic
def test_empty_sizes(kernels, arithmetic):
    dtype = dtype_of(arithmetic)
    for M, Q in ((0, 5), (3, 0)):
        tensors = (torch.randn(M, Q).to(dtype), torch.randn(Q, 9).to(dtype), torch.randn(Q, 2), torch.randn(2, 9))
        got = kernels.lora_matmul(*tensors, torch.ones(9, dtype=dtype), 1.5, None, 0.0, False)
        assert torch.equal(got[0], torch.ones(M, 9, dtype=dtype))
        assert torch.equal(got[1], torch.zeros(M, 2, dtype=dtype))
    nothing = torch.randn(0, 9).to(dtype), torch.randn(0, 2).to(dtype)
    dA, dB = kernels.adapter_grad(*nothing, *nothing, 1.5, None, 0.0, dtype, dtype)
    assert not dA.any()
    assert not dB.any()


@pytest.mark.parametrize("seed", [0, -1, 2**32 + 5, -(2**63)])
def test_dropout_bits_are_those_of_the_reference(kernels, seed):
    seed = torch.tensor([seed])
    for rows, cols, p in ((150, 33, 0.3), (20, 203, 1e-7), (33, 30, 0.999)):
        keep = dropout_mask(seed, rows, cols, p)
        ones = torch.ones(rows, cols)
        out, _ = kernels.lora_matmul(ones[:, :1], 0 * ones[:1], ones[:1, :1], ones[:1], None, 1.0, seed, p, True)
        assert torch.equal(out != 0, keep)
        eye = torch.eye(cols)
        _, h = kernels.lora_matmul(ones, eye, eye, eye, None, 1.0, seed, p, False)
        assert torch.equal(h != 0, keep)
        dA, _ = kernels.adapter_grad(ones, torch.eye(rows), None, None, 1.0, seed, p, torch.float32, torch.float32)
        assert torch.equal(dA != 0, keep)


# every block alone, in order; many at once, in any order; the first to start, which publish, hardly ever having a turn
ORDERS = [Turns(0, 1), Turns(0, 9), Turns(1, 9), Turns(2, 5)]
ORDERS += [Turns(seed, 9, delayed) for seed, delayed in ((3, 1), (4, 2), (5, 4))]


@pytest.mark.parametrize(("arithmetic", "sms"), [*((arithmetic, 24) for arithmetic in ARITHMETICS), ("bfloat16", 1)])
def test_any_order_of_blocks_gives_the_same_bits(kernels, arithmetic, sms):
    dtype = dtype_of(arithmetic)
    told = kernel_arithmetic(arithmetic)
    tokens = (3, 140)
    calls = [("lora_matmul", (*draw_matmul(arithmetic, M, 300, 150, 70, False), 1.5, SEED, 0.3, False)) for M in tokens]
    wide_and_low = tuple(torch.randn(300, columns).to(dtype) for columns in (150, 5, 99, 5))
    calls.append(("adapter_grad", (*wide_and_low, 1.5, SEED, 0.3, dtype, dtype)))
    for operator, arguments in calls:
        bits = None
        for turns in ORDERS:
            turns = replace(turns, sms=sms)
            got = getattr(kernels, operator)(*arguments, turns=turns, arithmetic=told)
            assert not any(result.isnan().any() for result in got)
            bits = bits or got
            assert all(torch.equal(one, other) for one, other in zip(bits, got, strict=True)), turns


@pytest.mark.parametrize("arithmetic", [BFLOAT16, EXACT])
def test_contractions_are_cut_into_parts_where_tiles_are_few(on_host, arithmetic):
    """What the test above relies on to have split sums, in both operators and both tiles."""
    small, large, gradients = (
        on_host.plan(function, arithmetic, *sizes, Turns(sms=24))
        for function, sizes in (
            ("plan_matmul", (3, 150, 300, 70)), ("plan_matmul", (140, 150, 300, 70)), ("plan_grad", (300, 150, 99, 5)),
        )
    )  # fmt: skip
    assert (small.small_m, large.small_m) == (1, 0)
    assert min(small.split, large.split, gradients.split) > 1
    assert on_host.plan("plan_matmul", arithmetic, 140, 150, 300, 70, Turns(sms=1)).split == 1


@pytest.mark.parametrize(("K", "N"), [(4096, 4096), (4096, 1024), (1024, 1024), (4096, 14336)])
def test_all_blocks_of_adapter_gradients_run_at_once(on_host, K, N):
    """Three of them fit an SM of any GPU. Four were planned once: one in four waited for the others."""
    plan = on_host.plan("plan_grad", BFLOAT16, 8192, K, N, 16, Turns(sms=132))
    assert 2 * 132 < plan.split * (K + N) // 64 <= 3 * 132


sizes = st.integers(1, 150)


@settings(max_examples=60, deadline=None)
@given(
    M=st.integers(0, 150), K=sizes, N=sizes, R=st.integers(1, 80), bias=st.booleans(),
    arithmetic=st.sampled_from(ARITHMETICS), backward=st.booleans(), dropout=st.sampled_from([None, "input", "output"]),
    sms=st.integers(1, 40), resident=st.integers(1, 12), delayed=st.integers(0, 4), seed=st.integers(0, 99),
)  # fmt: skip
def test_whatever_the_sizes(kernels, M, K, N, R, bias, arithmetic, backward, dropout, sms, resident, delayed, seed):
    torch.manual_seed(seed)
    turns = Turns(seed, resident, delayed, sms)
    rest = (1.5, SEED if dropout else None, 0.3 if dropout else 0.0, dropout == "output")
    draws = [
        draw_matmul(arithmetic, M, K, N, R, backward, bias)
        for _ in range(enough(M * R or 64, M * N or 64, M * K or 64))
    ]
    check(kernels, "lora_matmul", arithmetic, draws, max(K, N) + R, *rest, turns=turns)
