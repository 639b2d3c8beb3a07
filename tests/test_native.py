"""The optional compiled extension: without it, its build, and that it computes what the reference does."""

import importlib.metadata
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from native_build import ROOT, setup_py

import fused_lora
from fused_lora import lora_linear
from fused_lora.backends import eager as eager_backend
from fused_lora.backends import environment, native
from fused_lora.dropout import dropout_mask

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# the last has more rows than a block of dropout
SHAPES = [*itertools.product((0, 1, 17, 129), (1, 3, 16, 64)), (1100, 3)]
# the largest M that takes the product for small M
SMALL_M = {torch.float32: 16, torch.bfloat16: 4}
SEED = torch.tensor([-7_000_000_000_000_000_001])


@pytest.fixture
def absent(monkeypatch):
    """The extension is not here, whether it is or not."""
    monkeypatch.setitem(sys.modules, "fused_lora._C", None)
    monkeypatch.delattr(fused_lora, "_C", raising=False)
    monkeypatch.setattr(environment, "EXTENSION_PROBLEM", environment.extension_problem())


@pytest.fixture
def torch_hidden(tmp_path):
    """Environment of a process in which torch cannot be imported."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch is hidden')")
    return {"PYTHONPATH": str(tmp_path)}


# --------------------------------------------------------------------------------------------------
# Without it
# --------------------------------------------------------------------------------------------------


def test_without_the_extension_native_raises_and_says_why(absent):
    inputs = oracle.draw(2, 3, 4, 1)
    assert not native.available()
    with pytest.raises(
        RuntimeError, match=r"impl='native' cannot run here: .*fused_lora\._C is not built.*make native"
    ):
        lora_linear(inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, 1.0, impl="native")


def test_metadata_needs_no_torch(tmp_path, torch_hidden):
    made = setup_py("--version", "egg_info", "--egg-base", tmp_path, **torch_hidden)
    assert made.returncode == 0, made.stdout
    assert importlib.metadata.version("fused_lora") in made.stdout


def test_requested_build_without_torch_names_the_remedy(torch_hidden):
    made = setup_py("--version", FUSED_LORA_BUILD_EXT="1", **torch_hidden)
    assert made.returncode != 0
    assert "torch is hidden" in made.stdout
    assert "--no-build-isolation" in made.stdout


def test_requested_build_that_fails_is_an_error_in_the_compilers_words(tmp_path):
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "broken.cpp").write_text("#error broken on purpose")
    made = setup_py("build_ext", folder=tmp_path, FUSED_LORA_BUILD_EXT="1")
    assert made.returncode != 0
    assert "#error broken on purpose" in made.stdout


# --------------------------------------------------------------------------------------------------
# With it: the operators
# --------------------------------------------------------------------------------------------------


def check(operator, tensors, terms, *rest):
    """Operator's results against the float64 truth. terms: how many numbers its longest sum may have."""
    got = getattr(native, operator)(*tensors, *rest)
    eager = getattr(eager_backend, operator)(*tensors, *rest)
    dtype = tensors[0].dtype
    if dtype == torch.float64:
        # the truth is rounded too: two orders of summation, each off by γ_n times the sum of absolute values
        magnitude = getattr(eager_backend, operator)(*(None if t is None else t.abs() for t in tensors), *rest)
        gamma = (terms + 8) * torch.finfo(dtype).eps / 2
        for one, other, limit in zip(got, eager, magnitude, strict=True):
            assert one.shape == other.shape
            assert ((one - other).abs() <= 2 * gamma * limit).all()
        return
    rest = [torch.float64 if isinstance(value, torch.dtype) else value for value in rest]
    exact = getattr(eager_backend, operator)(*(None if t is None else t.double() for t in tensors), *rest)
    for name, *values in zip(("first result", "second result"), got, eager, exact, strict=True):
        assert values[0].dtype == values[1].dtype
        oracle.within(f"{operator}, {name}, {[tuple(t.shape) for t in tensors if t is not None]}", *values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [None, "input", "output"])
def test_matmul_is_as_exact_as_the_reference(native, dropout, dtype):
    adapter_dtype = torch.float32 if dtype.itemsize < 4 else dtype
    for (M, R), bias in itertools.product(SHAPES, (True, False)):
        inputs = oracle.draw(M, 123, 123, R, dtype, adapter_dtype, bias)
        operands = (inputs.x, inputs.weight.t(), inputs.lora_A.t(), inputs.lora_B.t(), inputs.bias)
        check("lora_matmul", operands, 123 + R, 1.5, SEED if dropout else None, 0.3, dropout == "output")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M", [1, 3, 4, 10, 16])
def test_small_m_is_as_exact_as_the_reference_both_ways(native, M, dtype):
    for (K, N), R, bias in itertools.product(((1, 1), (123, 77), (300, 515)), (1, 5, 64), (True, False)):
        found = []
        # so many draws that the smallest result has 64 values to err in
        for _ in range(-(-64 // min(64, M * K, M * N, M * R))):
            i = oracle.draw(M, K, N, R, dtype, bias=bias)
            found.append([])
            for *operands, on_output in (
                (i.x, i.weight.t(), i.lora_A.t(), i.lora_B.t(), i.bias, False),
                (i.dy, i.weight, i.lora_B, i.lora_A, None, True),
            ):
                rest, exact = (-1.5, None, 0.0, on_output), [None if t is None else t.double() for t in operands]
                results = native.lora_matmul(*operands, *rest), eager_backend.lora_matmul(*operands, *rest)
                found[-1] += zip(*results, eager_backend.lora_matmul(*exact, *rest), strict=True)
        for name, draws in zip(("y", "h", "dx", "g"), zip(*found, strict=True), strict=True):
            oracle.within(f"{name} of {(M, K, N, R)}", *(torch.stack(v) for v in zip(*draws, strict=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_small_m_a_row_has_the_same_bits_in_any_company_and_on_any_threads(native, dtype):
    M = SMALL_M[dtype]
    i = oracle.draw(M, 1000, 700, 3, dtype)
    # the low-rank product is a library's, and its bits may depend on the company
    i.lora_A.zero_()
    i.lora_B.zero_()
    forward = (i.weight.t(), i.lora_A.t(), i.lora_B.t(), i.bias, 1.5, None, 0.0, False)
    backward = (i.weight, i.lora_B, i.lora_A, None, 1.5, None, 0.0, True)
    threads = torch.get_num_threads()
    for rows, rest in ((i.x, forward), (i.dy, backward)):
        together, _ = native.lora_matmul(rows, *rest)
        torch.set_num_threads(3)
        try:
            for first, last in ((0, 1), (1, 3), (M - 3, M)):
                assert torch.equal(together[first:last], native.lora_matmul(rows[first:last], *rest)[0])
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_small_m_on_older_cpus(extension_library, capability):
    """The same tests in a process where PyTorch, and so the extension, uses fewer instructions."""
    here = f"{Path(__file__)}::test_small_m_is_as_exact_as_the_reference_both_ways"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", here]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    if extension_library is not None:
        environment["FUSED_LORA_TEST_LIBRARY"] = str(extension_library)
    made = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert made.returncode == 0, made.stdout
    assert "passed" in made.stdout


def test_values_that_are_not_finite_go_where_they_should(native):
    """Padding is neither read from memory nor multiplied with what stands there."""
    for dtype, (M, K, N) in itertools.product((torch.float32, torch.bfloat16), ((3, 37, 45), (16, 7, 3))):
        weight = torch.ones(N, K, dtype=dtype)
        weight[1, 2] = float("inf")
        A, B = torch.ones(1, K, dtype=dtype), torch.ones(N, 1, dtype=dtype)
        y, _ = native.lora_matmul(torch.ones(M, K, dtype=dtype), weight.t(), A.t(), B.t(), None, 1.0, None, 0.0, False)
        assert torch.equal(y.isfinite().all(0), torch.arange(N) != 1)
        dx, _ = native.lora_matmul(torch.ones(M, N, dtype=dtype), weight, B, A, None, 1.0, None, 0.0, True)
        assert torch.equal(dx.isfinite().all(0), torch.arange(K) != 2)
        dx, _ = native.lora_matmul(
            torch.full((M, N), float("nan"), dtype=dtype), weight, B, A, None, 1.0, None, 0.0, True
        )
        assert dx.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [False, True])
def test_adapter_gradients_are_as_exact_as_the_reference(native, dropout, dtype):
    adapter_dtype = torch.float32 if dtype.itemsize < 4 else dtype
    for M, R in SHAPES:
        x, dy = torch.randn(M, 123).to(dtype), torch.randn(M, 77).to(dtype)
        g, h = torch.randn(M, R).to(dtype), torch.randn(M, R).to(dtype)
        check("adapter_grad", (x, g, dy, h), M, 1.5, SEED if dropout else None, 0.3, adapter_dtype, adapter_dtype)


def test_only_the_gradients_asked_for_are_computed(native):
    x, g = torch.randn(5, 7), torch.randn(5, 2)
    dA, dB = native.adapter_grad(x, g, None, None, 1.0, None, 0.0, torch.float32, torch.float32)
    assert dA.shape == (2, 7)
    assert dB is None
    dA, dB = native.adapter_grad(None, None, x, g, 1.0, None, 0.0, torch.float32, torch.float32)
    assert dA is None
    assert dB.shape == (7, 2)
    assert dB.is_contiguous()


VIEWS = {
    "every other column": lambda: torch.randn(3, 10, 246)[..., ::2],
    "slice": lambda: torch.randn(3, 10, 200)[..., 7:130],
    "permuted": lambda: torch.randn(123, 3, 10).permute(2, 1, 0),
    "expanded": lambda: torch.randn(123).expand(4, 2, 123),
    "vector": lambda: torch.randn(123),
    "empty": lambda: torch.randn(2, 0, 123),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("seed", [None, SEED], ids=["no dropout", "dropout"])
def test_any_leading_shape_and_strides(native, view, seed):
    x, w, u, v = view(), torch.randn(123, 50), torch.randn(123, 2), torch.randn(2, 50)
    check("lora_matmul", (x, w, u, v, None), 125, 1.5, seed, 0.5, False)
    out, _ = native.lora_matmul(x, w, u, v, None, 1.5, seed, 0.5, False)
    assert out.shape == (*x.shape[:-1], 50)
    assert not out._is_view()
    M = x.numel() // 123
    check("adapter_grad", (x, torch.randn(M, 2), x, torch.randn(M, 2)), M, 1.5, seed, 0.5, torch.float32, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [0, 1, -1, 2**32 + 5, 2**63 - 1, -(2**63)])
def test_dropout_bits_are_those_of_the_reference(native, seed, dtype):
    seed = torch.tensor([seed])
    # an odd width, so that blocks begin in the middle of a word, and more rows than a block; a row longer than a block
    for rows, cols, p in ((2500, 123, 0.3), (2, 150_001, 0.999), (3, 5, 1e-7)):
        keep = dropout_mask(seed, rows, cols, p)
        ones = torch.ones(rows, cols, dtype=dtype)
        column, zeros = ones[:, :1], torch.zeros(1, cols, dtype=dtype)
        out, _ = native.lora_matmul(column, zeros, column[:1], ones[:1], None, 1.0, seed, p, True)
        assert torch.equal(out != 0, keep)
        # each of the others by a product with the identity, of whichever side is the shorter
        if cols < rows:
            eye = torch.eye(cols, dtype=dtype)
            _, h = native.lora_matmul(ones, eye, eye, eye, None, 1.0, seed, p, False)
            assert torch.equal(h != 0, keep)
        else:
            eye = torch.eye(rows, dtype=dtype)
            dA, _ = native.adapter_grad(ones, eye, None, None, 1.0, seed, p, dtype, dtype)
            assert torch.equal(dA != 0, keep)


def test_nothing_of_the_size_of_input_or_output_is_allocated_but_the_output(native):
    M, C = 8192, 512
    x, w, g, v = torch.randn(M, C), torch.randn(C, C), torch.randn(M, 4), torch.randn(4, C)
    forward = (native.lora_matmul, x, w, v.t(), v, None, 1.0)
    for output, function, *arguments in (
        (x.nbytes, *forward, None, 0.0, False),
        (x.nbytes, *forward, SEED, 0.1, False),
        (x.nbytes, *forward, SEED, 0.1, True),
        (0, native.adapter_grad, x, g, x, g, 1.0, None, 0.0, torch.float32, torch.float32),
        (0, native.adapter_grad, x, g, x, g, 1.0, SEED, 0.1, torch.float32, torch.float32),
    ):
        with torch.profiler.profile(profile_memory=True) as profile:
            function(*arguments)
        allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
        assert output <= allocated < output + x.nbytes / 8


# --------------------------------------------------------------------------------------------------
# With it: refusals
# --------------------------------------------------------------------------------------------------

GOOD_MATMUL = {
    "a": torch.ones(2, 3, 5), "w": torch.ones(5, 7), "u": torch.ones(5, 2), "v": torch.ones(2, 7),
    "bias": torch.ones(7), "scale": 1.0, "seed": SEED, "dropout_p": 0.5, "dropout_on_output": False,
}  # fmt: skip
GOOD_GRAD = {
    "x": torch.ones(2, 3, 5), "g": torch.ones(6, 2), "dy": torch.ones(2, 3, 7), "h": torch.ones(6, 2),
    "scale": 1.0, "seed": SEED, "dropout_p": 0.5, "dtype_A": torch.float32, "dtype_B": torch.float32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"a": torch.ones(())}, ValueError, "a must have at least one dimension"),
        ({"a": torch.ones(2, 4)}, ValueError, r"w must be of shape \[4, 7\], got \[5, 7\]"),
        ({"a": torch.ones(2, 5, dtype=torch.int32)}, TypeError, "a must be float32"),
        ({"w": torch.ones(5)}, ValueError, r"w must be of shape \(Q, P\), got \[5\]"),
        ({"w": torch.ones(5, 7, dtype=torch.float64)}, TypeError, "w must be Float, got Double"),
        ({"u": torch.ones(4, 2)}, ValueError, r"u must be of shape \[5, 2\], got \[4, 2\]"),
        ({"u": torch.ones(5)}, ValueError, r"u must be of shape \(Q, R\), got \[5\]"),
        ({"v": torch.ones(3, 7)}, ValueError, r"v must be of shape \[2, 7\], got \[3, 7\]"),
        ({"v": torch.ones(2, 7, dtype=torch.bool)}, TypeError, "v must be float32"),
        ({"bias": torch.ones(1)}, ValueError, r"bias must be of shape \[7\], got \[1\]"),
        ({"bias": torch.ones(7, dtype=torch.float16)}, TypeError, "bias must be Float, got Half"),
        ({"seed": torch.tensor(1)}, ValueError, r"seed must be of shape \[1\], got \[\]"),
        ({"seed": torch.tensor([1.0])}, TypeError, "seed must be Long, got Float"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1"),
        ({"dropout_p": float("nan")}, ValueError, r"dropout_p must be in \[0, 1\), got nan"),
        ({"a": torch.ones(2, 5, device="meta")}, NotImplementedError, "fused_lora_native::lora_matmul"),
        ({"g": torch.ones(5, 2)}, ValueError, r"g must be of shape \[6, 2\], got \[5, 2\]"),
        ({"g": torch.ones(6)}, ValueError, r"g must be of shape \(M, R\), got \[6\]"),
        ({"h": torch.ones(6, 2, dtype=torch.float16)}, TypeError, "h must be Float, got Half"),
        ({"x": torch.ones(())}, ValueError, "x must have at least one dimension"),
        ({"dy": torch.ones(4, 7)}, ValueError, r"h must be of shape \[4, 2\], got \[6, 2\]"),
        ({"dtype_A": torch.int64}, TypeError, "dtype_A must be float32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_operands_that_do_not_fit_are_refused(native, bad, error, message):
    for operator, good in ((native.lora_matmul, GOOD_MATMUL), (native.adapter_grad, GOOD_GRAD)):
        operator(**good)
        if bad.keys() <= good.keys():
            with pytest.raises(error, match=message):
                operator(**{**good, **bad})


# --------------------------------------------------------------------------------------------------
# With it: the layer's function
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_and_every_gradient_are_within_the_budget(native, dtype, dropout_p):
    inputs = oracle.draw(300, 1001, 20, 3, dtype=dtype, adapter_dtype=torch.float32)
    torch.manual_seed(5)
    got = oracle.results(inputs, lora_linear, dropout_p=dropout_p, impl="native")
    torch.manual_seed(5)
    seed = torch.randint(torch.iinfo(torch.int64).max, (1,))
    mask = dropout_mask(seed, 300, 1001, dropout_p) if dropout_p else None
    oracle.check(inputs, got, mask, dropout_p)
