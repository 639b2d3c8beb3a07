"""``lora_linear`` on the CPU's eager path: values, gradients, what is kept."""

import itertools

import oracle
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_lora import backends, functional, lora_linear, reference
from fused_lora.backends import environment
from fused_lora.dropout import dropout_mask

pytestmark = pytest.mark.usefixtures("cpu_impl")

SHAPES = [(0, 32, 16, 4), (1, 123, 123, 1), (17, 123, 64, 3), (129, 64, 123, 64), (5, 1, 1, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_every_gradient_are_within_the_budget(shape, bias, dtype):
    oracle.check_shape(lora_linear, *shape, dtype=dtype, bias=bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_dropout_uses_one_mask_in_forward_and_in_every_gradient(dropout_p, dtype):
    inputs = oracle.draw(300, 1001, 20, 3, dtype=dtype)  # more than one block of rows, and an odd one
    torch.manual_seed(5)
    mask = dropout_mask(torch.randint(torch.iinfo(torch.int64).max, (1,)), 300, 1001, dropout_p)
    torch.manual_seed(5)
    oracle.check(inputs, oracle.results(inputs, lora_linear, dropout_p=dropout_p), mask, dropout_p)


def test_dropout_has_the_rate_and_scaling_of_nn_dropout_and_does_nothing_in_evaluation():
    x, eye = torch.ones(1000, 512), torch.eye(512)
    zero = torch.zeros(512, 512)
    for p in (0.1, 0.5, 0.9):
        dropped = lora_linear(x, zero, eye, eye, 1.0, dropout_p=p)
        kept = (dropped != 0).double().mean().item()
        deviation = (p * (1 - p) / dropped.numel()) ** 0.5
        assert abs(kept - (1 - p)) < 5 * deviation
        torch.testing.assert_close(dropped.max(), torch.tensor(1 / (1 - p)), rtol=2e-4, atol=0)
        rows = (dropped != 0).double().mean(1)
        assert rows.std().item() == pytest.approx((p * (1 - p) / 512) ** 0.5, rel=0.15)
        assert torch.equal(lora_linear(x, zero, eye, eye, 1.0, dropout_p=p, training=False), x)


def test_dropout_masks_of_two_seeds_and_of_neighbours_are_independent():
    masks = [dropout_mask(torch.tensor([s]), 512, 512, 0.5).double() * 2 - 1 for s in (0, 1, 2**32, 2**33 + 1)]
    shifted = [masks[0].roll(1, 0), masks[0].roll(1, 1), masks[0].roll(2, 1)]
    for one, other in [*itertools.combinations(masks, 2), *((masks[0], s) for s in shifted)]:
        assert abs((one * other).mean().item()) < 5 / 512


def test_manual_seed_repeats_dropout_and_a_second_call_draws_anew():
    inputs = oracle.draw(20, 30, 10, 3)
    args = (inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, 1.0)
    torch.manual_seed(1)
    first, second = lora_linear(*args, dropout_p=0.5), lora_linear(*args, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(lora_linear(*args, dropout_p=0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("wanted", [w for n in range(6) for w in itertools.combinations(range(5), n)], ids=str)
def test_every_subset_of_wanted_gradients_gets_exactly_those(wanted, impl):
    inputs = oracle.draw(7, 20, 12, 3)
    tensors = [inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, inputs.bias]
    ours, theirs = ([t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)] for _ in range(2))

    def call(function, leaves, **options):
        x, weight, A, B, bias = leaves
        return function(x, weight, A, B, 1.5, bias, **options)

    y, expected = call(lora_linear, ours, impl=impl), call(reference.eager_lora_linear, theirs)
    torch.testing.assert_close(y, expected)
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.backward(inputs.dy)
        expected.backward(inputs.dy)
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert (one.grad is not None) == (i in wanted)
        if i in wanted:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


class _Shapes(TorchDispatchMode):
    """Shapes of all tensors that any operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {
            (func.overloadpacket.__name__, tuple(t.shape)) for t in tree_leaves(out) if isinstance(t, torch.Tensor)
        }
        return out


def test_gradient_of_the_frozen_weight_is_never_formed():
    M, K, N, R = 11, 23, 31, 5
    leaves = oracle.draw(M, K, N, R).leaves()
    with _Shapes() as ours:
        lora_linear(
            leaves.x, leaves.weight, leaves.lora_A, leaves.lora_B, 1.0, leaves.bias, impl="eager"
        ).sum().backward()
    with _Shapes() as whole:
        weight = leaves.weight + leaves.lora_B @ leaves.lora_A
        torch.nn.functional.linear(leaves.x.detach(), weight).sum().backward()
    made = {shape for name, shape in ours.seen if name not in ("t", "view", "detach", "_unsafe_view")}
    assert (N, K) not in made
    assert (K, N) not in made
    assert (N, K) in {shape for _, shape in whole.seen}  # the watch sees it where it is


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [("x A B", {"x", "h"}), ("A B", {"x", "h"}), ("x B", {"h"}), ("A", {"x"}), ("x", set())],
)
def test_only_what_the_wanted_gradients_need_is_kept(wanted, kept):
    M, K, N, R = 11, 23, 31, 5
    inputs = oracle.draw(M, K, N, R)
    x, A, B = inputs.x, inputs.lora_A, inputs.lora_B
    for name, tensor in (("x", x), ("A", A), ("B", B)):
        tensor.requires_grad_(name in wanted.split())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        lora_linear(x, inputs.weight, A, B, 1.0, inputs.bias)
    parameters = [(N, K), (R, K), (N, R)]
    for shape in parameters:
        saved.remove(shape)
    assert sorted(saved) == sorted({"x": (M, K), "h": (M, R)}[name] for name in kept)


@pytest.mark.parametrize("layout", ["transposed", "every second", "expanded", "3-D permuted"])
def test_any_strides(layout):
    inputs = oracle.draw(24, 20, 12, 3)
    x = {
        "transposed": inputs.x.t().contiguous().t(),
        "every second": inputs.x.repeat_interleave(2, 1)[:, ::2],
        "expanded": inputs.x[:1].expand(24, 20),
        "3-D permuted": inputs.x.view(4, 6, 20).transpose(0, 1),
    }[layout]
    args = (inputs.weight, inputs.lora_A, inputs.lora_B, 2.0, inputs.bias)
    y = lora_linear(x, *args)
    assert y.shape == (*x.shape[:-1], 12)
    torch.testing.assert_close(y, lora_linear(x.contiguous(), *args))


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((13, 0), True)])
def test_an_old_gpu_runs_eagerly_and_says_why_and_a_future_one_runs_triton(capability, runs, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(environment, "TRITON_INSTALLED", True)
    monkeypatch.setattr(environment, "_capability", lambda index: capability)
    gpu = torch.device("cuda", 0)
    assert backends.choose("auto", gpu, torch.float16) == ("triton" if runs else "eager")
    if runs:
        assert backends.choose("triton", gpu, torch.float16) == "triton"
    else:
        with pytest.raises(
            RuntimeError, match=r"compute capability \(7, 5\); the Triton kernels need \(8, 0\) or later"
        ):
            backends.choose("triton", gpu, torch.float16)


def test_explicit_triton_on_cpu_tensors_raises_unless_interpreting(monkeypatch):
    inputs = oracle.draw(2, 4, 3, 1)
    args = (inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, 1.0)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run here: Triton needs a CUDA device"):
        lora_linear(*args, impl="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    lora_linear(*args, impl="triton")


def test_explicit_triton_with_float64_raises():
    inputs = oracle.draw(2, 4, 3, 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"not torch\.float64"):
        lora_linear(inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, 1.0, impl="triton")


@pytest.mark.parametrize("scales", [(2.0, 2.0, 2.0), (0.5, -3.0, 0.0), (0.0, 0.0, 0.0)])
def test_several_adapters_are_one_of_all_their_ranks(scales):
    x = torch.randn(7, 12, dtype=torch.float64)
    weight = torch.randn(9, 12, dtype=torch.float64)
    adapters = [
        (torch.randn(rank, 12, dtype=torch.float64, requires_grad=True),
         torch.randn(9, rank, dtype=torch.float64, requires_grad=True), scale)
        for rank, scale in zip((1, 4, 3), scales, strict=True)
    ]  # fmt: skip
    parameters = [tensor for A, B, _ in adapters for tensor in (A, B)]
    truth = x @ (weight + sum(scale * B @ A for A, B, scale in adapters)).t()
    A, B, scale = functional.concatenate_adapters(adapters)
    assert A.shape == (8, 12)
    y = lora_linear(x, weight, A, B, scale)
    torch.testing.assert_close(y, truth)
    wanted = torch.autograd.grad(truth.square().sum(), parameters)
    for ours, theirs in zip(torch.autograd.grad(y.square().sum(), parameters), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
