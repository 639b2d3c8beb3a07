"""Repeated calls on a CPU: whatever changed since the last one, a call gives what it would give were it the first."""

import contextlib
import itertools
import random
import re

import pytest
import torch
from test_validation import BAD_CALLS, operands
from torch import nn
from torch.nn.utils import parametrize

from fused_lora import FusedLoRALinear, lora_linear, plans, reference

pytestmark = pytest.mark.usefixtures("cpu_impl")
# square, so that a transposed view of the weight has its shape
WIDTH, RANK = 16, 4
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@contextlib.contextmanager
def as_the_first_call():
    """Inside nothing is known of calls before."""
    known, plans.CALLS = plans.CALLS, plans.Cache(4096)
    try:
        yield
    finally:
        plans.CALLS = known


@pytest.fixture
def found(monkeypatch):
    """Whether a plan was found, call by call."""
    answers, find = [], plans.find

    def recording(*args):
        plan = find(*args)
        answers.append(plan is not None)
        return plan

    monkeypatch.setattr(plans, "find", recording)
    return answers


@pytest.fixture(autouse=True)
def _precision_restored():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def outcome(call, leaves):
    """What it returns, and the gradients of the leaves that want one; or how it fails."""
    torch.manual_seed(3)
    try:
        y = call()
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        grads = torch.autograd.grad(y, wanted, torch.ones_like(y), allow_unused=True) if y.requires_grad else ()
    except Exception as error:
        return type(error), str(error)
    return [y.detach(), *grads]


def assert_the_same(got, expected):
    assert type(got) is type(expected), (got, expected)
    if isinstance(got, tuple):
        assert got == expected
        return
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
            assert one.is_meta or torch.equal(one, other)


# ---------------------------------------------------------------- changes between calls


class Situation:
    """A layer, its input, and what is set around its calls."""

    def __init__(self):
        self.layer = FusedLoRALinear(WIDTH, WIDTH, rank=RANK, dropout=0.25).eval()
        self.x = torch.randn(5, WIDTH)
        self.autocast, self.mode = None, contextlib.nullcontext
        self.put("lora_B", torch.randn(WIDTH, RANK))

    @property
    def dtype(self):
        return self.layer.weight.dtype

    def tensors(self):
        return self.x, self.layer.weight, self.layer.lora_A, self.layer.lora_B, self.layer.bias

    def put(self, name, values):
        """Other values, sizes or strides in the same Parameter."""
        getattr(self.layer, name).data = values.to(self.layer.weight.device)

    def randn(self, *sizes):
        return torch.randn(*sizes, device=self.layer.weight.device).to(self.dtype)

    def call(self):
        around = contextlib.nullcontext()
        if self.autocast is not None:
            around = torch.autocast("cpu", dtype=self.autocast)
        with self.mode(), around:
            return self.layer(self.x)

    def truth(self):
        """y of fresh tensors in plain PyTorch; None where it is not to be had so."""
        x, weight, A, B, bias = (tensor.detach().resolve_neg() for tensor in self.tensors())
        if x.is_meta or self.layer.training or type(x) is not torch.Tensor:
            return None
        dtype = weight.dtype if self.autocast is None or weight.dtype == torch.float64 else self.autocast
        x, weight, A, B, bias = (tensor.to(dtype).contiguous().clone() for tensor in (x, weight, A, B, bias))
        return reference.eager_lora_linear(x, weight, A, B, self.layer.scale, bias)


class Subclass(torch.Tensor):
    pass


def another_weight(rng, at):
    at.layer.weight = nn.Parameter(at.randn(WIDTH, WIDTH), requires_grad=False)


def transposed_weight(rng, at):
    at.layer.weight.data = at.layer.weight.data.t()


def weight_with_gaps(rng, at):
    at.put("weight", at.randn(WIDTH, 2 * WIDTH)[:, ::2])


def another_width(rng, at):
    width = rng.choice((WIDTH, 24))
    for name, sizes in (("weight", (width, WIDTH)), ("lora_B", (width, RANK)), ("bias", (width,))):
        at.put(name, at.randn(*sizes))


def a_weight_that_does_not_fit(rng, at):
    at.put("weight", at.randn(WIDTH + 1, WIDTH))


def another_dtype(rng, at):
    at.layer.to(rng.choice([*TOLERANCE]))
    at.x = at.randn(5, WIDTH)


def another_dtype_of_x(rng, at):
    at.x = at.x.detach().to(rng.choice([*TOLERANCE]))


def another_dtype_of_adapters(rng, at):
    dtype = rng.choice((at.dtype, torch.float32))
    for name in ("lora_A", "lora_B"):
        at.put(name, getattr(at.layer, name).data.to(dtype))


def another_rank(rng, at):
    rank = rng.choice((1, RANK, 7))
    at.put("lora_A", at.randn(rank, WIDTH))
    at.put("lora_B", at.randn(at.layer.weight.shape[0], rank))


def strides_of_adapters(rng, at):
    name = rng.choice(("lora_A", "lora_B"))
    at.put(name, getattr(at.layer, name).data.t().contiguous().t())


def another_x(rng, at):
    lead = rng.choice(((0,), (1,), (5,), (17,), (2, 3), ()))
    at.x = at.randn(*lead, WIDTH)


def x_with_gaps(rng, at):
    at.x = rng.choice((at.randn(5, 2 * WIDTH)[:, ::2], at.randn(WIDTH).expand(5, WIDTH), at.randn(WIDTH, 5).t()))


def x_between_addresses(rng, at):
    at.x = at.randn(5 * WIDTH + 1)[1:].view(5, WIDTH)


def x_resized_in_place(rng, at):
    at.x = at.x.detach().clone()
    outcome(at.call, ())
    at.x.resize_(rng.choice((3, 6)), WIDTH).fill_(0.5)


def x_of_another_kind(rng, at):
    x = at.randn(5, WIDTH)
    with torch.inference_mode():
        inference = at.randn(5, WIDTH)
    at.x = rng.choice((torch._neg_view(x), x.as_subclass(Subclass), nn.Parameter(x), inference))


def x_that_does_not_fit(rng, at):
    at.x = at.randn(5, WIDTH + 1)


def wanted_gradients(rng, at):
    name = rng.choice(("x", "weight", "lora_A", "lora_B", "bias"))
    tensor = at.x if name == "x" else getattr(at.layer, name)
    if tensor.is_leaf and not tensor.is_inference():
        tensor.requires_grad_(not tensor.requires_grad)


def to_meta(rng, at):
    at.layer.to("meta")
    at.x = at.x.detach().to("meta")


def x_to_meta(rng, at):
    at.x = at.x.detach().to("meta")


def precision(rng, at):
    torch.set_float32_matmul_precision(rng.choice(("highest", "high")))


def autocast(rng, at):
    at.autocast = rng.choice((None, torch.bfloat16, torch.float16))


def one_autocast_after_the_other(rng, at):
    at.layer.to(torch.bfloat16)
    at.x = at.randn(5, WIDTH)
    for at.autocast in (torch.bfloat16, torch.float16, torch.bfloat16):
        check(at)


def grad_mode(rng, at):
    at.mode = rng.choice((contextlib.nullcontext, torch.no_grad, torch.inference_mode))


def training(rng, at):
    at.layer.train(not at.layer.training)


def another_scale(rng, at):
    at.layer.adapters["default"].alpha = rng.uniform(-3.0, 3.0)


def parametrized(rng, at):
    class Doubled(nn.Module):
        def forward(self, tensor):
            return 2 * tensor

    for module, name in ((at.layer, "weight"), (at.layer, "bias"), (at.layer.adapters["default"], "lora_A")):
        if rng.random() < 0.5:
            with as_the_first_call():
                parametrize.register_parametrization(module, name, Doubled())
                expected = outcome(at.call, ())
            assert_the_same(outcome(at.call, ()), expected)
            parametrize.remove_parametrizations(module, name)


CHANGES = [
    another_weight, transposed_weight, weight_with_gaps, another_width, another_dtype, another_dtype_of_adapters,
    another_rank, strides_of_adapters, another_x, x_with_gaps, x_between_addresses, x_resized_in_place,
    x_of_another_kind, wanted_gradients, precision, autocast, one_autocast_after_the_other, grad_mode, training,
    another_scale, parametrized,
    # after these nothing comes but an error, or shapes
    a_weight_that_does_not_fit, another_dtype_of_x, x_that_does_not_fit, to_meta, x_to_meta,
]  # fmt: skip


def check(at):
    """Warm calls as the first one, and that as plain PyTorch."""
    with as_the_first_call():
        expected = outcome(at.call, at.tensors())
    # the first of these may find a plan of long ago
    for _ in range(3):
        assert_the_same(outcome(at.call, at.tensors()), expected)
    truth = None if isinstance(expected, tuple) else at.truth()
    if truth is not None:
        tolerance = TOLERANCE[truth.dtype] if torch.get_float32_matmul_precision() == "highest" else 0.1
        torch.testing.assert_close(expected[0], truth, rtol=tolerance, atol=tolerance)
    return expected


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_calls_is_seen(change):
    rng, at = random.Random(0), Situation()
    check(at)
    for _ in range(10):
        change(rng, at)
        check(at)


@pytest.mark.parametrize("seed", range(4))
def test_any_change_between_calls_is_seen(seed, found):
    rng, every = random.Random(seed), []
    for _ in range(20):
        at = Situation()
        every.append(check(at))
        for _ in range(8):
            rng.choice(CHANGES)(rng, at)
            every.append(check(at))
    # what is under test took place: most calls were known, and most were right
    assert sum(found) > len(found) / 4
    assert sum(isinstance(one, list) for one in every) > len(every) / 2


# ---------------------------------------------------------------- bad input


def failure(call):
    with pytest.raises(Exception) as caught:  # noqa: PT011 # whichever it is, it must be the same
        call()
    return type(caught.value), str(caught.value)


# of kinds that no key of a plan may choke on
ODD_CALLS = [
    {"x": None},
    {"weight": None},
    {"lora_A": object()},
    {"dropout_p": [0.5]},
    {"dropout_p": float("nan")},
    {"scale": 10**400},
    {"scale": torch.ones(())},
    {"impl": ["eager"]},
    {"impl": None},
    {"training": torch.ones(2), "dropout_p": 0.5},
]
EVERY = [*(changes for changes, _, _ in BAD_CALLS), *ODD_CALLS]


@pytest.mark.parametrize("changes", EVERY, ids=lambda changes: re.sub(" at 0x.*?>", ">", str(changes))[:60])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_a_known_call_with_something_wrong_fails_as_an_unknown_one(changes, bias, found):
    good = operands(bias=torch.randn(5) if bias else None)
    y = lora_linear(**good)
    assert torch.equal(lora_linear(**good), y)
    assert found == [False, True]
    # what is called while a plan is known, and while none is
    warm = failure(lambda: lora_linear(**good | changes))
    with as_the_first_call():
        cold = failure(lambda: lora_linear(**good | changes))
    assert warm == cold
    # and the known call is known still
    assert torch.equal(lora_linear(**good), y)
    assert found[-1]


def test_of_several_wrong_things_a_known_call_names_the_same_one():
    good = operands(bias=torch.randn(5))
    lora_linear(**good)
    for one, other in itertools.permutations(EVERY, 2):
        wrong = good | one | other
        warm = failure(lambda wrong=wrong: lora_linear(**wrong))
        with as_the_first_call():
            assert failure(lambda wrong=wrong: lora_linear(**wrong)) == warm


def test_a_number_that_is_no_float_is_checked_every_time(found):
    good = operands(scale=2)
    for _ in range(3):
        lora_linear(**good)
    assert not any(found)


# ---------------------------------------------------------------- how much is kept


def test_plans_are_few_however_calls_vary(monkeypatch):
    monkeypatch.setattr(plans, "CALLS", plans.Cache(8))
    for rows in range(1, 40):
        for wanted in (False, True):
            lora_linear(**operands(x=torch.randn(rows, 6, requires_grad=wanted)))
    assert len(plans.CALLS) == 8
    assert all(len(alike) == 2 for alike in plans.CALLS._entries.values())


def test_calls_that_differ_in_strides_alone_share_so_many_plans(monkeypatch):
    monkeypatch.setattr(plans, "CALLS", plans.Cache(8))
    for gap in range(6, 100):
        lora_linear(**operands(x=torch.randn(4, gap)[:, :6]))
    ((alike,),) = [plans.CALLS._entries.values()]
    assert len(alike) == plans._MOST_ALIKE
