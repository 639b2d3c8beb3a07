"""The layer's autograd in C++: who it is for, what it keeps and computes, and that nothing goes wrong beside it."""

import itertools

import oracle
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lora import lora_linear
from fused_lora.backends import environment
from fused_lora.dropout import dropout_mask, keep_scale

pytestmark = pytest.mark.usefixtures("native")


class _Watch(TorchDispatchMode):
    """Names of the operators that a mode sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def call(leaves, **options):
    return lora_linear(leaves.x, leaves.weight, leaves.lora_A, leaves.lora_B, 1.5, leaves.bias, **options)


def test_no_python_function_stands_in_the_graph_of_a_plain_call():
    y = call(oracle.draw(5, 6, 7, 2).leaves())
    assert "LoRALinear" in y.grad_fn.name()
    assert not isinstance(y.grad_fn, torch.autograd.function.BackwardCFunction)
    with torch.no_grad():
        assert call(oracle.draw(5, 6, 7, 2).leaves()).grad_fn is None


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_mode_sees_the_operators_and_changes_no_bit(dropout_p):
    def results(watch):
        torch.manual_seed(4)
        leaves = oracle.draw(20, 6, 7, 2).leaves()
        with watch:
            y = call(leaves, dropout_p=dropout_p)
        y.sum().backward()
        return y, leaves.x.grad, leaves.lora_A.grad, leaves.lora_B.grad, leaves.bias.grad

    watch = _Watch()
    for watched, plain in zip(results(watch), results(torch.enable_grad()), strict=True):
        assert torch.equal(watched, plain)
    assert "fused_lora.lora_matmul.default" in watch.seen


def test_a_backward_that_a_mode_watches_is_made_of_operators_that_it_knows():
    inputs = oracle.draw(20, 6, 7, 2)
    leaves, others = inputs.leaves(), inputs.leaves()
    y = call(leaves)
    with _Watch() as watch:
        y.backward(inputs.dy)
    assert "aten.mm.default" in watch.seen
    assert not [name for name in watch.seen if "fused_lora" in name]
    call(others).backward(inputs.dy)
    for name in ("x", "lora_A", "lora_B", "bias"):
        torch.testing.assert_close(getattr(leaves, name).grad, getattr(others, name).grad)


def test_only_the_gradients_that_are_asked_for_are_computed():
    inputs = oracle.draw(64, 48, 40, 2).leaves()
    names = ("x", "lora_A", "lora_B", "bias")
    whole = torch.autograd.grad(call(inputs), [getattr(inputs, name) for name in names], inputs.dy)
    for wanted in (c for n in range(1, 5) for c in itertools.combinations(range(4), n)):
        y = call(inputs)
        with torch.profiler.profile() as profile:
            got = torch.autograd.grad(y, [getattr(inputs, names[i]) for i in wanted], inputs.dy)
        for i, one in zip(wanted, got, strict=True):
            torch.testing.assert_close(one, whole[i])
        ran = {event.name for event in profile.events()}
        assert ("fused_lora_native::lora_matmul" in ran) == (0 in wanted)
        assert ("fused_lora_native::adapter_grad" in ran) == bool({1, 2} & set(wanted))
        assert ("aten::sum" in ran) == (3 in wanted)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_the_size_of_input_or_output_is_allocated_but_the_results(dtype, dropout_p):
    M, C = 8192, 512
    leaves = oracle.draw(M, C, C, 4, dtype=dtype).leaves()
    leaves.bias.requires_grad_(False)
    with torch.profiler.profile(profile_memory=True) as profile:
        y = call(leaves, dropout_p=dropout_p)
        dx, _, _ = torch.autograd.grad(y, (leaves.x, leaves.lora_A, leaves.lora_B), leaves.dy)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert y.nbytes + dx.nbytes <= allocated < y.nbytes + dx.nbytes + leaves.x.nbytes / 4


def test_a_small_layer_costs_its_products_and_results_and_nothing_else():
    """Beside plain PyTorch's own products: what a library takes for itself depends on the processor."""
    leaves = oracle.draw(32, 64, 48, 4).leaves()
    leaves.bias.requires_grad_(False)
    x, W, A, B, bias, dy = (
        t.detach() for t in (leaves.x, leaves.weight, leaves.lora_A, leaves.lora_B, leaves.bias, leaves.dy)
    )
    W_t, A_t, B_t, dy_t = W.t(), A.t(), B.t(), dy.t()
    h, g_t = x @ A_t, (dy @ B).t()

    def done_by(work):
        work()
        with torch.profiler.profile(profile_memory=True) as profile:
            results = work()
        events = profile.profiler.kineto_results.events()
        names = {event.name() for event in events}
        return names, sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events), results

    def forward():
        with torch.no_grad():
            return call(leaves)

    def step():
        return torch.autograd.grad(call(leaves), (leaves.x, leaves.lora_A, leaves.lora_B), leaves.dy)

    def products_forward():
        return torch.addmm(bias, x, W_t).addmm_(torch.mm(x, A_t), B_t)

    def products():
        g = torch.mm(dy, B)
        faster = environment.onednn_is_faster()
        dx = torch.ops.mkldnn._linear_pointwise(dy, W.t(), None, "none", [], "") if faster else torch.mm(dy, W)
        dx.addmm_(g, A)
        return products_forward(), dx, torch.mm(g_t, x), torch.mm(dy_t, h)

    for work, plain in ((forward, products_forward), (step, products)):
        names, allocations, _ = done_by(work)
        plain_names, most, _ = done_by(plain)
        assert allocations <= most
        extra = {"aten::t", "aten::view", "aten::reshape", "aten::to", "aten::clone", "aten::mul_"}
        assert not (names - plain_names) & extra


def test_second_derivatives_through_a_backward_that_dropped_rounded_values():
    """Dropout, float32 adapters over bfloat16 and create_graph together: each dtype comes out as it went in."""
    leaves = oracle.draw(20, 12, 7, 2, dtype=torch.bfloat16, adapter_dtype=torch.float32).leaves()
    (dx,) = torch.autograd.grad(call(leaves, dropout_p=0.5), leaves.x, leaves.dy, create_graph=True)
    dA, dB = torch.autograd.grad(dx.float().square().sum(), (leaves.lora_A, leaves.lora_B))
    assert (dA.dtype, dB.dtype) == (torch.float32, torch.float32)
    assert dA.isfinite().all()
    assert dA.abs().max() > 0


def test_backward_twice_says_how_and_keeping_the_graph_allows_it():
    leaves = oracle.draw(5, 6, 7, 2).leaves()
    y = call(leaves)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


def test_dropout_masks_are_those_of_the_reference():
    seed = torch.tensor([-7_000_000_000_000_000_001])
    for rows, cols, p in ((37, 41, 0.3), (0, 5, 0.5), (3, 1, 0.0)):
        mask = torch.ops.fused_lora_native.dropout_mask(seed, rows, cols, p, torch.float64)
        assert torch.equal(mask, dropout_mask(seed, rows, cols, p).double() * keep_scale(p))


def test_a_compiled_layer_takes_the_fused_operators_without_a_graph_break():
    inputs = oracle.draw(20, 6, 7, 2)
    leaves, others = inputs.leaves(), inputs.leaves()
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    compiled(leaves).backward(inputs.dy)
    call(others).backward(inputs.dy)
    for name in ("x", "lora_A", "lora_B", "bias"):
        torch.testing.assert_close(getattr(leaves, name).grad, getattr(others, name).grad)
