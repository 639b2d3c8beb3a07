"""In-place addmm, which "eager" is on a GPU: here on a CPU, in the plans that a GPU would keep."""

import random

import oracle
import pytest
import test_plans
import torch
from simulated_gpu import GPU
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lora import backends, functional, lora_linear, plans
from fused_lora.backends import in_place
from fused_lora.bench import baselines


@pytest.fixture
def planned(monkeypatch):
    """CPU tensors are computed as "eager" computes on a GPU; how often it was."""
    calls = []
    monkeypatch.setattr(
        backends, "planner", lambda impl, device, drops: in_place if impl == "eager" and not drops else None
    )
    for name in ("_forward", "_input_gradient"):
        kept = getattr(in_place, name)

        def counted(*args, name=name, kept=kept):
            calls.append(name)
            return kept(*args)

        monkeypatch.setattr(in_place, name, counted)
    plans.CALLS.clear()
    yield calls
    plans.CALLS.clear()


def test_eager_is_in_place_addmm_on_a_gpu_alone_and_without_dropout():
    assert backends.planner("eager", GPU, False) is in_place
    assert backends.planner("eager", GPU, True) is backends.planner("eager", torch.device("cpu"), False) is None


def warm(*args, **options):
    """``lora_linear`` as a call that repeats."""
    for _ in range(2):
        lora_linear(*args, **options, impl="eager")
    return lora_linear(*args, **options, impl="eager")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 24, 20, 3), (33, 24, 20, 3), (129, 17, 40, 16)], ids=str)
def test_it_is_right(planned, shape, bias, adapter_dtype, dtype):
    if adapter_dtype is not None and dtype != torch.bfloat16:
        pytest.skip("adapters are of the base's dtype, or wider")
    inputs = oracle.draw(*shape, dtype=dtype, adapter_dtype=adapter_dtype, bias=bias)
    # with a bias that is trained the long way's operations serve, but the products are the plan's
    got = [oracle.results(inputs, lambda *args: lora_linear(*args, impl="eager")) for _ in range(3)]
    oracle.check(inputs, got[-1])
    assert planned.count("_forward") == planned.count("_input_gradient") == 2


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
    """As ``test_plans.py`` has it, but to within rounding: the first call takes ``eager.py``'s products."""
    rng, at = random.Random(0), test_plans.Situation()
    at.layer.impl = "eager"
    for step in range(6):
        if step:
            change(rng, at)
        with test_plans.as_the_first_call():
            expected = test_plans.outcome(at.call, at.tensors())
        for _ in range(3):
            got = test_plans.outcome(at.call, at.tensors())
            assert type(got) is type(expected), (got, expected)
            if isinstance(got, tuple):
                assert got == expected
                continue
            for one, other in zip(got, expected, strict=True):
                assert (one is None) == (other is None)
                if one is not None and not one.is_meta:
                    tolerance = 2 * test_plans.TOLERANCE[one.dtype]
                    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
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
def test_it_does_no_more_than_in_place_addmm(adapter_dtype):
    """Eight products where the baseline has nine, and nothing else that writes."""
    inputs = oracle.draw(6, 8, 5, 2, dtype=torch.bfloat16, adapter_dtype=adapter_dtype, bias=False)
    x, W, A, B = inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B
    plan, gradient = in_place.plan(x, W.t(), A.t(), B.t(), None, None, 0.0, False), in_place._input_gradient
    adapters = in_place.adapter_grad_plan(x, None, None, None, None, 0.0, adapter_dtype, adapter_dtype)
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
