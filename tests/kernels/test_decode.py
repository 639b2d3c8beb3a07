"""Decode: its own kernel, through the same contract, and the counters by which its programs meet."""

import dataclasses

import oracle
import pytest
import torch

from fused_lora import lora_linear
from fused_lora.backends import eager as eager_backend
from fused_lora.backends.triton import launch, workspace
from fused_lora.backends.triton.configs import DecodeConfig

SHAPES = [  # M, K, N, R
    (1, 123, 123, 1),
    (3, 123, 64, 16),
    (3, 64, 123, 100),
    (16, 123, 123, 16),
    (16, 200, 64, 100),
    (64, 40, 70, 3),
]


def triton(*args, **options):
    return lora_linear(*args, impl="triton", **options)


def operands(inputs):
    return inputs.x, inputs.weight.t(), inputs.lora_A.t(), inputs.lora_B.t(), inputs.bias, inputs.scale


def gradient_operands(inputs):
    return inputs.dy, inputs.weight, inputs.lora_B, inputs.lora_A, None, inputs.scale


NO_DROPOUT = (None, 0.0, False)


def names(launches):
    return [made.kernel.fn.__name__ for made in launches]


@pytest.fixture(autouse=True)
def all_counters_are_zero_afterwards():
    yield
    assert all(counters.count_nonzero() == 0 for counters in workspace._counters.values())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_every_gradient_are_within_the_budget(shape, bias, dtype, device, launches):
    oracle.check_shape(triton, *shape, dtype=dtype, bias=bias, device=device, kernel=True)
    assert set(names(launches)) == {"_decode_kernel", "_adapter_grad_kernel"}


@pytest.mark.parametrize("base", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 123, 64, 3), (16, 64, 123, 20)], ids=str)
def test_float32_adapters_over_a_16_bit_weight_are_rounded_inside_and_get_float32_gradients(shape, base, device):
    inputs = oracle.draw(*shape, dtype=base, adapter_dtype=torch.float32, device=device)
    got = oracle.results(inputs, triton)
    assert got["dA"].dtype == got["dB"].dtype == torch.float32
    assert got["dx"].dtype == got["y"].dtype == base
    oracle.check(inputs.to(base), got, kernel=True)


@pytest.mark.parametrize("split", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("rank", [1, 16, 100])
def test_any_number_of_parts_and_any_tile_compute_the_same(split, rank, device):
    # of rank 1, four draws: 64 values of the low-rank product for the rest to hang on
    draws = [oracle.draw(16, 123, 70, rank, device=device) for _ in range(4 if rank == 1 else 1)]
    for split_h, block_p, block_q, block_r in ((1, 16, 16, 16), (split, 64, 32, 64), (6 - split, 32, 16, 16)):
        config = DecodeConfig(block_p, block_q, block_r, split, split_h, 4, 1)
        for choose in (operands, gradient_operands):
            got = [launch.lora_matmul(*choose(one), *NO_DROPOUT, config=config) for one in draws]
            with oracle.in_one_chain():
                low = [eager_backend.lora_matmul(*choose(one), *NO_DROPOUT) for one in draws]
            truth = [eager_backend.lora_matmul(*choose(one.to(torch.float64)), *NO_DROPOUT) for one in draws]
            for i, name in enumerate(("out", "h")):
                oracle.within(name, *(torch.stack([one[i] for one in each]) for each in (got, low, truth)))


# rows, and those of a tile: as many, some too many, several tiles with a full last one and with one of a single row
BLOCKS = [(17, 32), (31, 32), (32, 32), (33, 64), (64, 64), (65, 128), (100, 128), (128, 128), (129, 128), (300, 128),
          (300, 64), (48, 16)]  # fmt: skip


@pytest.mark.parametrize("adapters", [None, torch.float32], ids=["", "float32 adapters"])
@pytest.mark.parametrize(("rows", "block"), BLOCKS, ids=str)
def test_any_rows_in_any_blocks_of_rows_compute_the_same(rows, block, adapters, device):
    inputs = oracle.draw(rows, 70, 90, 19, dtype=torch.float16, adapter_dtype=adapters, device=device)
    low, exact = inputs.to(torch.float16), inputs.to(torch.float64)
    # of Q one part, which has no slot, or three
    for choose, parts in ((operands, 3), (operands, 1), (gradient_operands, 2)):
        config = DecodeConfig(64, 16, 16, parts, 2, 4, 1, block)
        got = launch.lora_matmul(*choose(inputs), *NO_DROPOUT, config=config)
        eager = eager_backend.lora_matmul(*choose(low), *NO_DROPOUT)
        truth = eager_backend.lora_matmul(*choose(exact), *NO_DROPOUT)
        for name, *values in zip(("out", "h"), got, eager, truth, strict=True):
            oracle.within(name, *values)


def test_same_bits_whatever_was_computed_between(dtype, device):
    few, repeats = ((7, 130, 90, 20), 3) if device == "cpu" else ((7, 4096, 4096, 20), 300)
    inputs = oracle.draw(*few, dtype=dtype, device=device)
    other = oracle.draw(3, 40, 300, 40, dtype=dtype, device=device)
    first = launch.lora_matmul(*operands(inputs), *NO_DROPOUT)
    between = launch.lora_matmul(*gradient_operands(other), *NO_DROPOUT)
    for _ in range(repeats):
        for got, expected in zip(launch.lora_matmul(*operands(inputs), *NO_DROPOUT), first, strict=True):
            assert torch.equal(got, expected)
        for got, expected in zip(launch.lora_matmul(*gradient_operands(other), *NO_DROPOUT), between, strict=True):
            assert torch.equal(got, expected)


def test_no_bit_depends_on_how_many_tokens_come_along(dtype, device):
    inputs = oracle.draw(16, 70, 50, 5, dtype=dtype, device=device)
    out, h = launch.lora_matmul(*operands(inputs), *NO_DROPOUT)
    for tokens in (1, 2, 9):
        some = dataclasses.replace(inputs, x=inputs.x[:tokens])
        got = launch.lora_matmul(*operands(some), *NO_DROPOUT)
        assert torch.equal(got[0], out[:tokens])
        assert torch.equal(got[1], h[:tokens])


def strided_views(x):
    """The same values behind other strides."""
    wide = torch.full((x.shape[0], 2 * x.shape[1]), float("nan"), dtype=x.dtype, device=x.device)
    wide[:, ::2] = x
    padded = torch.full((2 * x.shape[0], x.shape[1] + 5), float("nan"), dtype=x.dtype, device=x.device)
    padded[::2, 3:-2] = x
    return {"every second column": wide[:, ::2], "rows apart": padded[::2, 3:-2], "transposed": x.t().contiguous().t()}


@pytest.mark.parametrize("layout", ["every second column", "rows apart", "transposed"])
def test_any_strides_are_within_the_budget(layout, dtype, device):
    inputs = oracle.draw(11, 50, 35, 5, dtype=dtype, device=device)
    with oracle.in_one_chain():
        low = eager_backend.lora_matmul(*operands(inputs), *NO_DROPOUT)
    truth = eager_backend.lora_matmul(*operands(inputs.to(torch.float64)), *NO_DROPOUT)
    for name in ("x", "weight", "lora_A", "lora_B"):
        setattr(inputs, name, strided_views(getattr(inputs, name))[layout])
    for name, *values in zip(("out", "h"), launch.lora_matmul(*operands(inputs), *NO_DROPOUT), low, truth, strict=True):
        oracle.within(name, *values)


def test_leading_dimensions_are_kept(device):
    inputs = oracle.draw(6, 33, 20, 3, device=device)
    flat = triton(inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, 2.0)
    deep = triton(inputs.x.view(2, 1, 3, 33), inputs.weight, inputs.lora_A, inputs.lora_B, 2.0)
    assert deep.shape == (2, 1, 3, 20)
    assert torch.equal(deep.view(6, 20), flat)


def test_a_step_of_small_m_is_one_launch_forward_and_two_backward(device, launches):
    inputs = oracle.draw(3, 40, 30, 4, device=device)
    leaves = inputs.leaves()
    y = triton(leaves.x, leaves.weight, leaves.lora_A, leaves.lora_B, 1.0)
    assert names(launches) == ["_decode_kernel"]
    y.backward(inputs.dy)
    assert names(launches[1:]) == ["_decode_kernel", "_adapter_grad_kernel"]


@pytest.mark.parametrize(("tokens", "dropout_p", "decodes"), [(128, 0.0, True), (129, 0.0, False), (3, 0.5, False)])
def test_only_few_rows_without_dropout_take_this_kernel(tokens, dropout_p, decodes, device, launches):
    inputs = oracle.draw(tokens, 40, 30, 4, dtype=torch.float16, device=device)
    triton(inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, 1.0, dropout_p=dropout_p)
    assert names(launches) == ["_decode_kernel" if decodes else "_lora_matmul_kernel"]


def test_without_counters_the_ordinary_kernel_computes(monkeypatch, device, launches):
    monkeypatch.setattr(launch, "counters", lambda *args: None)
    inputs = oracle.draw(3, 123, 64, 16, device=device)
    got = launch.lora_matmul(*operands(inputs), *NO_DROPOUT)
    assert names(launches) == ["_lora_matmul_kernel"]
    with oracle.in_one_chain():
        low = eager_backend.lora_matmul(*operands(inputs), *NO_DROPOUT)
    truth = eager_backend.lora_matmul(*operands(inputs.to(torch.float64)), *NO_DROPOUT)
    for name, *values in zip(("out", "h"), got, low, truth, strict=True):
        oracle.within(name, *values)
