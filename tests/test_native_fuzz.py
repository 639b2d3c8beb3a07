"""Any shapes, strides and operands for the compiled extension's operators: right, or refused. `make sanitize` too."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fused_lora.backends import eager as eager_backend
from fused_lora.backends import native

pytestmark = pytest.mark.usefixtures("native")
SEED = torch.tensor([-7_000_000_000_000_000_001])
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FUZZED = settings(
    max_examples=150, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip

sizes = st.integers(1, 70)
layouts = st.sampled_from(["rows", "columns", "every second", "end", "expanded"])


def laid_out(values, layout):
    """The same matrix with other strides; "end" stops at the last byte of its memory."""
    M, C = values.shape
    if layout == "columns":
        return values.t().contiguous().t()
    if layout == "every second":
        return values.repeat_interleave(2, 1)[:, ::2]
    if layout == "end":
        whole = torch.empty(M * C + 3, dtype=values.dtype)
        return whole[3:].view(M, C).copy_(values)
    if layout == "expanded" and M > 0:
        return values[:1].expand(M, C)
    return values


def check(got, operator, operands, *rest):
    """Within what no right computation exceeds: roundings of the sum of absolute values (Higham, §3.1)."""
    exact = getattr(eager_backend, operator)(*(t if t is None else t.double() for t in operands), *rest)
    magnitude = getattr(eager_backend, operator)(*(t if t is None else t.double().abs() for t in operands), *rest)
    dtype = next(t.dtype for t in operands if t is not None)
    terms = sum(max(t.shape) for t in operands if t is not None)
    u, u32 = torch.finfo(dtype).eps / 2, torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    for one, truth, size in zip(got, exact, magnitude, strict=True):
        assert one.shape == truth.shape
        tiny = torch.finfo(dtype).smallest_normal
        assert ((one.double() - truth).abs() <= (6 * u + 2 * terms * u32) * size + tiny).all()


@FUZZED
@given(data=st.data())
def test_products_of_any_shapes_and_strides(data):
    M, K, N, R = data.draw(st.integers(0, 20)), data.draw(sizes), data.draw(sizes), data.draw(st.integers(1, 20))
    dtype = data.draw(st.sampled_from(DTYPES))
    a, w, u, v = (
        laid_out(torch.randn(*shape, dtype=torch.float64).to(dtype), data.draw(layouts))
        for shape in ((M, K), (K, N), (K, R), (R, N))
    )
    bias = laid_out(torch.randn(1, N).to(dtype), data.draw(layouts))[0] if data.draw(st.booleans()) else None
    seed, on_output = data.draw(st.sampled_from([None, SEED])), data.draw(st.booleans())
    got = native.lora_matmul(a, w, u, v, bias, 1.5, seed, 0.3, on_output)
    check(got, "lora_matmul", (a, w, u, v, bias), 1.5, seed, 0.3, on_output)


@FUZZED
@given(data=st.data())
def test_adapter_gradients_of_any_shapes_and_strides(data):
    M, K, N, R = data.draw(st.integers(0, 40)), data.draw(sizes), data.draw(sizes), data.draw(st.integers(1, 20))
    dtype, seed = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([None, SEED]))
    x, g, dy, h = (
        laid_out(torch.randn(*shape, dtype=torch.float64).to(dtype), data.draw(layouts))
        for shape in ((M, K), (M, R), (M, N), (M, R))
    )
    got = native.adapter_grad(x, g, dy, h, 1.5, seed, 0.3, dtype, dtype)
    check(got, "adapter_grad", (x, g, dy, h), 1.5, seed, 0.3, torch.float64, torch.float64)


def good():
    """Operands of lora_linear by name: M = 3, K = 5, N = 7, R = 2."""
    return {
        "x": torch.ones(3, 5), "weight": torch.ones(7, 5), "lora_A": torch.ones(2, 5), "lora_B": torch.ones(7, 2),
        "bias": torch.ones(7), "scale": 1.0, "seed": SEED, "dropout_p": 0.5,
    }  # fmt: skip


bad_tensors = st.one_of(
    st.lists(st.integers(0, 9), max_size=4).map(torch.ones),
    st.sampled_from([torch.int32, torch.bool, torch.complex64, torch.int8]).map(lambda d: torch.ones(7, 5, dtype=d)),
    st.just(torch.ones(7, 5, device="meta")),
    st.just(torch.ones(7, 5).to_sparse()),
    st.just(None),
)


@FUZZED
@given(
    name=st.sampled_from(["x", "weight", "lora_A", "lora_B", "bias", "seed"]), tensor=bad_tensors, grad=st.booleans()
)
def test_any_operand_in_the_place_of_a_good_one_is_right_or_refused(name, tensor, grad):
    operands = good()
    fits = tensor is not None and tensor.dtype == operands[name].dtype and tensor.layout is torch.strided
    fits = fits and tensor.device.type == "cpu" and (
        tensor.shape[-1:] == (5,) if name == "x" else tensor.shape == operands[name].shape
    )  # fmt: skip
    fits = fits or (tensor is None and name in ("bias", "seed"))
    operands["lora_B"].requires_grad_(grad and name != "lora_B")
    call = torch.ops.fused_lora_native.lora_linear.default
    if fits:
        y = call(**{**operands, name: tensor})
        assert y.shape == (*(tensor if name == "x" else operands["x"]).shape[:-1], 7)
    else:
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            call(**{**operands, name: tensor})


NO_B = (None, None)


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("dropout_mask", (SEED, -1, 2, 0.5, torch.float32)),
        ("dropout_mask", (SEED, 1, 2, 1.5, torch.float32)),
        ("dropout_mask", (SEED, 1, 2, 0.5, torch.int64)),
        ("dropout_mask", (SEED[:0], 1, 2, 0.5, torch.float32)),
        ("adapter_grad", (torch.ones(3, 5), torch.ones(3), *NO_B, 1.0, None, 0.0, torch.float32, torch.float32)),
        ("adapter_grad", (torch.ones(3, 5), torch.ones(4, 2), *NO_B, 1.0, SEED, 0.5, torch.float32, torch.float32)),
    ],
)  # fmt: skip
def test_bad_numbers_are_refused(operator, arguments):
    with pytest.raises((TypeError, ValueError)):
        getattr(torch.ops.fused_lora_native, operator)(*arguments)
