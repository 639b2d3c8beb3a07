"""The one kernel, forward and input gradient, through its operator's contract."""

import oracle
import pytest
import torch

from fused_lora import lora_linear, reference
from fused_lora.backends import eager as eager_backend
from fused_lora.backends.triton import choice, launch
from fused_lora.backends.triton.configs import TileConfig
from fused_lora.dropout import dropout_mask

RULE = choice.rule


@pytest.fixture(autouse=True)
def no_decode(monkeypatch):
    """These sizes take this kernel, few rows as they are."""
    monkeypatch.setattr(choice, "rule", choice.tiled_rule)
    launch.forget_plans()
    yield
    launch.forget_plans()


SHAPES = [  # M, K, N, R
    (0, 32, 32, 4),
    (1, 123, 123, 1),
    (17, 123, 64, 3),
    (129, 64, 123, 4),
    (64, 64, 96, 16),
    (33, 130, 70, 64),
    (40, 96, 41, 100),
    (5, 1, 1, 1),
]


def triton(*args, **options):
    return lora_linear(*args, impl="triton", **options)


def operands(inputs):
    return inputs.x, inputs.weight.t(), inputs.lora_A.t(), inputs.lora_B.t(), inputs.bias, inputs.scale


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_every_gradient_are_within_the_budget(shape, dtype, device):
    oracle.check_shape(triton, *shape, dtype=dtype, bias=shape[0] % 2 == 1, device=device, kernel=True)


@pytest.mark.parametrize("base", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(17, 123, 64, 3), (33, 64, 70, 20)], ids=str)
def test_float32_adapters_over_a_16_bit_weight_are_rounded_inside_and_get_float32_gradients(shape, base, device):
    inputs = oracle.draw(*shape, dtype=base, adapter_dtype=torch.float32, device=device)
    got = oracle.results(inputs, triton)
    assert got["dA"].dtype == got["dB"].dtype == torch.float32
    assert got["dx"].dtype == got["y"].dtype == base
    rounded = inputs.to(base)
    oracle.check(rounded, got, kernel=True)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
@pytest.mark.parametrize("shape", [(1, 123, 64, 3), (37, 65, 33, 20)], ids=str)
def test_dropout_is_the_reference_mask_in_forward_and_in_every_gradient(shape, dropout_p, dtype, device):
    inputs = oracle.draw(*shape, dtype=dtype, device=device)
    torch.manual_seed(7)
    seed = torch.randint(torch.iinfo(torch.int64).max, (1,), device=device)
    mask = dropout_mask(seed, shape[0], shape[1], dropout_p)
    torch.manual_seed(7)
    got = oracle.results(inputs, triton, dropout_p=dropout_p)
    oracle.check(inputs, got, mask, dropout_p, kernel=True)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**40 + 12345, 2**63 - 1])
@pytest.mark.parametrize("cols", [1, 31, 64])
def test_mask_bits_equal_the_reference_for_any_seed(seed, cols, device):
    rows, p = 70, 0.3
    seed = torch.tensor([seed], device=device)
    # x of ones through A = identity shows the mask itself
    x, eye = torch.ones(rows, cols, device=device), torch.eye(cols, device=device)
    zero = torch.zeros(cols, 8, device=device)
    _, h = launch.lora_matmul(x, zero, eye, zero.t().contiguous().t()[:, :8], None, 1.0, seed, p, False)
    assert torch.equal(h != 0, dropout_mask(seed, rows, cols, p))


def strided_views(x):
    """The same values behind other strides."""
    wide = torch.full((x.shape[0], 2 * x.shape[1]), float("nan"), dtype=x.dtype, device=x.device)
    wide[:, ::2] = x
    padded = torch.full((2 * x.shape[0], x.shape[1] + 5), float("nan"), dtype=x.dtype, device=x.device)
    padded[::2, 3:-2] = x
    return {"every second column": wide[:, ::2], "rows apart": padded[::2, 3:-2], "transposed": x.t().contiguous().t()}


@pytest.mark.parametrize("layout", ["every second column", "rows apart", "transposed"])
def test_any_strides_of_x_weight_and_adapters_are_within_the_budget(layout, dtype, device):
    inputs = oracle.draw(33, 50, 35, 5, dtype=dtype, device=device)
    with oracle.in_one_chain():
        eager = eager_backend.lora_matmul(*operands(inputs), None, 0.0, False)
    exact = eager_backend.lora_matmul(*operands(inputs.to(torch.float64)), None, 0.0, False)
    for name in ("x", "weight", "lora_A", "lora_B"):
        setattr(inputs, name, strided_views(getattr(inputs, name))[layout])
    got = launch.lora_matmul(*operands(inputs), None, 0.0, False)
    for name, *values in zip(("out", "h"), got, eager, exact, strict=True):
        oracle.within(name, *values)


def test_expanded_x_and_gradient(device):
    inputs = oracle.draw(33, 50, 35, 5, device=device)
    inputs.x, inputs.dy = inputs.x[:1].expand(33, 50), inputs.dy[:1, :1].expand(33, 35)
    x = inputs.x.detach().requires_grad_()
    A, B = inputs.lora_A.requires_grad_(), inputs.lora_B.requires_grad_()
    y = triton(x, inputs.weight, A, B, inputs.scale, inputs.bias)
    grads = torch.autograd.grad(y, (x, A, B), inputs.dy)
    exact = oracle.results(inputs.to(torch.float64), reference.eager_lora_linear)
    with oracle.in_one_chain():
        low = oracle.results(inputs, reference.eager_lora_linear)
    for name, value in zip(("y", "dx", "dA", "dB"), (y, *grads), strict=True):
        oracle.within(name, value, low[name], exact[name])


def test_leading_dimensions_are_kept(device):
    inputs = oracle.draw(24, 33, 20, 3, device=device)
    flat = triton(inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, 2.0)
    deep = triton(inputs.x.view(2, 3, 4, 33), inputs.weight, inputs.lora_A, inputs.lora_B, 2.0)
    assert deep.shape == (2, 3, 4, 20)
    assert torch.equal(deep.view(24, 20), flat)


def test_a_vector_is_one_row_of_another_kernel_and_within_the_budget(device):
    inputs = oracle.draw(24, 33, 20, 3, device=device)
    weights = (inputs.weight, inputs.lora_A, inputs.lora_B)
    rows = torch.stack([triton(x, *weights, 2.0) for x in inputs.x])
    with oracle.in_one_chain():
        eager = reference.eager_lora_linear(inputs.x, *weights, 2.0)
    exact = reference.eager_lora_linear(inputs.x.double(), *(weight.double() for weight in weights), 2.0)
    oracle.within("y", rows, eager, exact)


CONFIGS = [
    TileConfig(16, 16, 16, 16, 1, 4, 1),
    TileConfig(64, 32, 16, 32, 3, 4, 2),
    TileConfig(32, 64, 64, 64, 8, 4, 2),
    TileConfig(128, 128, 32, 128, 8, 8, 2),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.BLOCK_M}x{c.BLOCK_P}x{c.BLOCK_Q} R{c.BLOCK_R}")
@pytest.mark.parametrize("rank", [1, 16, 33])
def test_every_tile_shape_computes_the_same(config, rank, device):
    inputs = oracle.draw(70, 90, 75, rank, device=device)
    for on_output in (False, True):
        seed = torch.tensor([3], device=device)
        got = launch.lora_matmul(*operands(inputs), seed, 0.25, on_output, config=config)
        with oracle.in_one_chain():
            expected = eager_backend.lora_matmul(*operands(inputs), seed, 0.25, on_output)
        exact = eager_backend.lora_matmul(*operands(inputs.to(torch.float64)), seed, 0.25, on_output)
        for name, *values in zip(("out", "h"), got, expected, exact, strict=True):
            oracle.within(name, *values)


@pytest.mark.parametrize("decodes", [True, False], ids=["decode", "tiles"])
def test_float32_obeys_the_matmul_precision_that_is_set(launches, device, decodes, monkeypatch):
    before = torch.get_float32_matmul_precision()
    inputs = oracle.draw(3, 40, 30, 4, device=device)
    if decodes:
        monkeypatch.setattr(choice, "rule", RULE)
    try:
        for setting, precision in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            launch.forget_plans()
            leaves = inputs.leaves()
            triton(leaves.x, leaves.weight, leaves.lora_A, leaves.lora_B, 1.0).backward(inputs.dy)
            assert [made.variant.PRECISION for made in launches] == [precision] * 3
            launches.clear()
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_step_is_three_launches(launches, device):
    inputs = oracle.draw(20, 40, 30, 4, device=device)
    leaves = inputs.leaves()
    for _ in range(3):
        y = triton(leaves.x, leaves.weight, leaves.lora_A, leaves.lora_B, 1.0)
        assert len(launches) == 1
        y.backward(inputs.dy)
        assert len(launches) == 3
        launches.clear()
