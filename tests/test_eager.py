"""Plain PyTorch as an implementation, as it computes on a CPU and, here on CPU tensors, on a GPU."""

import itertools
import random

import oracle
import pytest
import test_plans
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lora import FusedLoRALinear, backends, functional, lora_linear, plans
from fused_lora.backends import eager
from fused_lora.bench import baselines


@pytest.fixture(params=["cpu", "gpu"])
def device_kind(request, monkeypatch):
    """CPU tensors are computed as "eager" computes on a CPU, and on a GPU."""
    monkeypatch.setattr(eager, "_on_gpu", lambda tensor: request.param == "gpu")
    return request.param


@pytest.fixture
def planned(device_kind, monkeypatch):
    """Which functions of "eager" ran, call by call."""
    calls = []
    for name in ("_forward", "_input_gradient"):
        kept = getattr(eager, name)

        def counted(*args, name=name, kept=kept, **options):
            calls.append(name)
            return kept(*args, **options)

        monkeypatch.setattr(eager, name, counted)
    plans.CALLS.clear()
    yield calls
    plans.CALLS.clear()


def test_eager_plans_calls_without_dropout_by_the_functions_that_compute_a_first_call():
    assert backends.planner("eager", False) is eager
    assert backends.planner("eager", True) is None


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("lead", [(7,), (2, 5), (2, 3, 4), ()], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_first_calls_bits_are_those_of_every_later_one(device_kind, lead, bias, dtype, dropout_p):
    inputs = oracle.draw(1, 40, 24, 8, dtype=dtype, adapter_dtype=torch.float32, bias=bias).leaves()
    leaves = [t for t in (inputs.lora_A, inputs.lora_B, inputs.bias) if t is not None]
    # contiguous, and as models pass it that keep the batch second
    for x in (torch.randn(*lead, 40).to(dtype), torch.randn(*lead[::-1], 40).to(dtype).transpose(0, len(lead) - 1)):
        x = x.requires_grad_()
        plans.CALLS.clear()
        outcomes = []
        for _ in range(4):
            torch.manual_seed(0)
            y = lora_linear(x, inputs.weight, inputs.lora_A, inputs.lora_B, 1.5, inputs.bias,
                            dropout_p=dropout_p, impl="eager")  # fmt: skip
            outcomes.append([y, *torch.autograd.grad(y.square().sum(), [x, *leaves])])
        assert len(plans.CALLS) == 1
        for later in outcomes[1:]:
            for first, one in zip(outcomes[0], later, strict=True):
                assert torch.equal(first, one)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(8,), (5, 8), (0, 8), (2, 5, 8), (7, 2, 8), (2, 3, 5, 8), (1, 2, 3, 5, 8)], ids=str)
def test_a_fresh_adapter_changes_no_bit_whatever_xs_shape_and_strides(shape, bias):
    linear = torch.nn.Linear(8, 6, bias=bias).requires_grad_(False)
    layer = FusedLoRALinear.from_linear(linear, rank=2, impl="eager")
    for x in views_of_shape(shape):
        for _ in range(3):
            assert torch.equal(layer(x), linear(x))
            with torch.no_grad():
                assert torch.equal(layer(x), linear(x))
            assert torch.equal(layer(x.clone().requires_grad_()), linear(x.clone()))


def test_a_fresh_adapter_changes_no_bit_by_the_extension_above_small_m(native):
    # as many rows as no small-M kernel takes
    linear = torch.nn.Linear(64, 48).requires_grad_(False)
    layer = FusedLoRALinear.from_linear(linear, rank=2, impl="native")
    for shape in ((40, 64), (8, 5, 64), (5, 2, 4, 64)):
        for x in views_of_shape(shape):
            assert torch.equal(layer(x), linear(x))
            assert torch.equal(layer(x.clone().requires_grad_()), linear(x.clone()))


def views_of_shape(shape):
    """Tensors of this shape: contiguous, with every two dimensions swapped in memory, with gaps, repeated, flipped."""
    yield torch.randn(shape)
    for one, other in itertools.combinations(range(len(shape)), 2):
        swapped = [*shape]
        swapped[one], swapped[other] = swapped[other], swapped[one]
        yield torch.randn(swapped).transpose(one, other)
    yield torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    yield torch.randn(2 * shape[0], *shape[1:])[::2]
    yield torch.randn(1, *shape[1:]).expand(shape)
    yield torch.randn(shape[-1:]).expand(shape)


def warm(*args, **options):
    """``lora_linear`` as a call that repeats."""
    for _ in range(2):
        lora_linear(*args, **options, impl="eager")
    return lora_linear(*args, **options, impl="eager")


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 24, 20, 3), (33, 24, 20, 3), (129, 17, 40, 16)], ids=str)
def test_it_is_right(planned, shape, bias, adapter_dtype, dtype):
    inputs = oracle.draw(*shape, dtype=dtype, adapter_dtype=adapter_dtype, bias=bias)
    got = [oracle.results(inputs, lambda *args: lora_linear(*args, impl="eager")) for _ in range(3)]
    oracle.check(inputs, got[-1])
    assert planned.count("_forward") == planned.count("_input_gradient") == 3


@pytest.mark.parametrize("wanted", range(1, 32))
def test_gradients_of_any_subset(planned, wanted):
    torch.manual_seed(0)
    inputs = oracle.draw(6, 8, 5, 2, dtype=torch.float64)
    names = [name for bit, name in enumerate(("x", "weight", "lora_A", "lora_B", "bias")) if wanted >> bit & 1]
    grads = {}
    for forward in (warm, functional.reference.eager_lora_linear):
        tensors = {name: getattr(inputs, name).clone().requires_grad_(name in names) for name in
                   ("x", "weight", "lora_A", "lora_B", "bias")}  # fmt: skip
        bias = tensors.pop("bias")
        for _ in range(3):
            y = forward(*tensors.values(), 1.5, bias)
            grads[forward] = torch.autograd.grad(y, [(tensors | {"bias": bias})[name] for name in names], inputs.dy)
    for got, truth in zip(*grads.values(), strict=True):
        torch.testing.assert_close(got, truth)
    assert planned


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3), (2, 1, 3)], ids=str)
def test_any_leading_shape_and_strides(planned, lead):
    inputs = oracle.draw(1, 8, 6, 2, dtype=torch.float64)
    operands = (inputs.weight, inputs.lora_A, inputs.lora_B, 2.0, inputs.bias)
    for x in (torch.randn(*lead, 8, dtype=torch.float64), torch.randn(*lead, 16, dtype=torch.float64)[..., ::2]):
        x.requires_grad_()
        y = warm(x, *operands)
        truth = functional.reference.eager_lora_linear(x, *operands)
        torch.testing.assert_close(y, truth)
        dy = torch.randn_like(y)
        # twice: the second one goes the short way
        for _ in range(2):
            (got,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        torch.testing.assert_close(got, torch.autograd.grad(truth, x, dy)[0])
        # a result that may be changed in place, as nn.ReLU(inplace=True) does
        warm(x, *operands).relu_().sum().backward()
    assert "_forward" in planned


def test_second_derivatives(planned):
    inputs = oracle.draw(4, 5, 3, 2, dtype=torch.float64).leaves()
    operands = (inputs.x, inputs.lora_A, inputs.lora_B)

    def call(x, A, B):
        return warm(x, inputs.weight, A, B, 1.5)

    assert torch.autograd.gradcheck(call, operands)
    assert torch.autograd.gradgradcheck(call, operands)
    assert "_input_gradient" in planned


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", ""])
def test_what_is_kept(planned, frozen):
    inputs = oracle.draw(64, 32, 16, 4).leaves()
    if frozen:
        getattr(inputs, frozen).requires_grad_(False)
    operands = (inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, 1.5)
    warm(*operands)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        warm(*operands)
    given = {t.data_ptr() for t in (inputs.weight, inputs.lora_A, inputs.lora_B)}
    sizes = {(*t.shape,) for t in kept if t.data_ptr() not in given}
    assert sizes == {"lora_A": {(64, 4)}, "lora_B": {(64, 32)}, "": {(64, 4), (64, 32)}}[frozen]
    warm(*operands).sum().backward()
    assert inputs.weight.grad is None


def test_autocast_of_another_dtype_around_the_backward(planned):
    inputs = oracle.draw(6, 8, 5, 2, dtype=torch.bfloat16, adapter_dtype=torch.float32).leaves()
    operands = (inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, 1.5)
    leaves = (inputs.x, inputs.lora_A, inputs.lora_B)
    plain = [torch.autograd.grad(warm(*operands), leaves, inputs.dy) for _ in range(3)][-1]
    for dtype in (torch.float16, torch.bfloat16):
        y = warm(*operands)
        with torch.autocast("cpu", dtype=dtype):
            for _ in range(2):
                got = torch.autograd.grad(y, leaves, inputs.dy, retain_graph=True)
        for one, other in zip(got, plain, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other)


def test_batched_gradients(planned):
    inputs = oracle.draw(6, 8, 5, 2, dtype=torch.float64).leaves()
    leaves = (inputs.x, inputs.lora_A, inputs.lora_B)
    y = warm(inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, 1.5)
    for _ in range(2):
        torch.autograd.grad(y, leaves, inputs.dy, retain_graph=True)
    dys = torch.stack([inputs.dy, -2 * inputs.dy])
    got = torch.autograd.grad(y, leaves, dys, retain_graph=True, is_grads_batched=True)
    for batched, one in zip(got, torch.autograd.grad(y, leaves, inputs.dy), strict=True):
        torch.testing.assert_close(batched, torch.stack([one, -2 * one]))


@pytest.mark.parametrize("change", test_plans.CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_calls_is_seen(planned, change):
    """As ``test_plans.py`` has it."""
    rng, at = random.Random(0), test_plans.Situation()
    at.layer.impl = "eager"
    test_plans.check(at)
    for _ in range(6):
        change(rng, at)
        test_plans.check(at)
    torch.set_float32_matmul_precision("highest")


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.products, self.others = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "linear"):
            self.products += 1
        elif name not in ("t", "transpose", "detach", "view", "_unsafe_view", "expand"):
            self.others.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_it_does_no_more_than_in_place_addmm(adapter_dtype, monkeypatch):
    """Eight products where the baseline has nine, and nothing else that writes."""
    monkeypatch.setattr(eager, "_on_gpu", lambda tensor: True)
    # as while nobody watches
    monkeypatch.setattr(eager, "dispatch_modes", lambda: 0)
    monkeypatch.setattr(eager.environment, "onednn_is_faster", lambda: False)
    inputs = oracle.draw(6, 8, 5, 2, dtype=torch.bfloat16, adapter_dtype=adapter_dtype, bias=False)
    x, W, A, B = inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B
    plan, gradient = eager.plan(x, W.t(), A.t(), B.t(), None, None, 0.0, False), eager._input_gradient
    adapters = eager.adapter_grad_plan(x, None, None, None, None, 0.0, adapter_dtype, adapter_dtype)
    with Counting() as ours:
        _, h = plan(x, W, A, B, None, 1.5, None)
        _, g = gradient(inputs.dy, W, B, A, None, 1.5, None)
        adapters(x, g, inputs.dy, h, 1.5, None)
    W, A, B = (torch.nn.Parameter(t, requires_grad=t is not W) for t in (W, A, B))
    weights = baselines.Weights(W, None, A, B, 1.5)
    leaf = x.clone().requires_grad_()
    with Counting() as baseline:
        baselines.AddmmLoRA(weights)(leaf).backward(inputs.dy)
    assert (ours.products, baseline.products) == (8, 9)
    assert ours.others.count("_to_copy") <= baseline.others.count("_to_copy") + 2
    assert {name for name in ours.others if not name.startswith(("new_empty", "empty"))} <= {"_to_copy"}
