"""Derivatives of any order and mode, torch.func; hooks, views and in-place work on inputs and outputs."""

import oracle
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from fused_lora import FusedLoRALinear, lora_linear, reference
from fused_lora.dropout import dropout_mask

pytestmark = pytest.mark.usefixtures("cpu_impl")


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(4, 5), (2, 2, 5)], ids=str)
@pytest.mark.parametrize("frozen", [None, "lora_A", "lora_B", "x"])
def test_first_and_second_derivatives_by_finite_differences(frozen, dropout_p, shape):
    leaves = oracle.draw(4, 5, 3, 2, dtype=torch.float64).leaves()
    leaves.x = leaves.x.detach().view(shape).requires_grad_()
    if frozen is not None:
        getattr(leaves, frozen).requires_grad_(False)

    def function(x, A, B, bias):
        torch.manual_seed(3)
        return lora_linear(x, leaves.weight, A, B, 0.7, bias, dropout_p=dropout_p)

    args = (leaves.x, leaves.lora_A, leaves.lora_B, leaves.bias)
    assert gradcheck(function, args, check_forward_ad=True)
    assert gradgradcheck(function, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_second_derivatives_are_within_the_budget_in_every_dtype(dtype, dropout_p):
    inputs = oracle.draw(64, 24, 16, 4, dtype=dtype)
    torch.manual_seed(3)
    mask = dropout_mask(torch.randint(torch.iinfo(torch.int64).max, (1,)), 64, 24, dropout_p)

    def second(of, forward, **options):
        leaves = of.leaves()
        wanted = (leaves.x, leaves.lora_A, leaves.lora_B)
        torch.manual_seed(3)
        y = forward(leaves.x, leaves.weight, leaves.lora_A, leaves.lora_B, leaves.scale, leaves.bias, **options)
        grads = torch.autograd.grad(y, wanted, of.dy, create_graph=True)
        return torch.autograd.grad(grads, wanted, [grad.detach() for grad in grads])

    dropped = {"dropout_p": dropout_p}
    got = second(inputs, lora_linear, **dropped)
    low = second(inputs, reference.eager_lora_linear, mask=mask, **dropped)
    exact = second(inputs.to(torch.float64), reference.eager_lora_linear, mask=mask, **dropped)
    for name, *values in zip(("x", "A", "B"), got, low, exact, strict=True):
        oracle.within(name, *values)


def operands(dtype=torch.float32):
    i = oracle.draw(6, 10, 8, 3, dtype=dtype)
    return i, (i.x, i.weight, i.lora_A, i.lora_B, 1.5, i.bias)


def test_vmap_over_inputs_and_over_adapters():
    i, args = operands()
    torch.testing.assert_close(vmap(lambda x: lora_linear(x, *args[1:]))(i.x), lora_linear(*args))
    As, Bs = torch.randn(4, 3, 10), torch.randn(4, 8, 3)
    together = vmap(lambda A, B: lora_linear(i.x, i.weight, A, B, 1.5, i.bias))(As, Bs)
    alone = torch.stack([lora_linear(i.x, i.weight, A, B, 1.5, i.bias) for A, B in zip(As, Bs, strict=True)])
    torch.testing.assert_close(together, alone)


def test_gradients_of_each_sample_are_those_of_the_samples_alone():
    i, _ = operands()

    def loss(A, x):
        return lora_linear(x, i.weight, A, i.lora_B, 1.5, i.bias).sin().sum()

    grads = vmap(grad(loss), (None, 0))(i.lora_A, i.x)
    A = i.lora_A.clone().requires_grad_()
    for x, got in zip(i.x, grads, strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(loss(A, x), A)[0])


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_draws_one_mask_or_many_as_it_is_told(randomness):
    eye, zero, x = torch.eye(64), torch.zeros(64, 64), torch.ones(2, 10, 64)
    first, second = vmap(lambda x: lora_linear(x, zero, eye, eye, 1.0, dropout_p=0.5), randomness=randomness)(x) > 0
    assert torch.equal(first, second) == (randomness == "same")
    assert abs(second.double().mean().item() - 0.5) < 5 * 0.5 / 640**0.5
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: lora_linear(x, zero, eye, eye, 1.0, dropout_p=0.5))(x)


def test_jacobians_hessians_and_directional_derivatives_agree_with_the_reference():
    i, _ = operands(torch.float64)

    def ours(A):
        return lora_linear(i.x, i.weight, A, i.lora_B, 1.5, i.bias).sin().sum(0)

    def theirs(A):
        return reference.eager_lora_linear(i.x, i.weight, A, i.lora_B, 1.5, i.bias).sin().sum(0)

    for transform in (jacrev, jacfwd, hessian):
        torch.testing.assert_close(transform(ours)(i.lora_A), transform(theirs)(i.lora_A))
    direction = (torch.randn_like(i.lora_A),)
    torch.testing.assert_close(jvp(ours, (i.lora_A,), direction), jvp(theirs, (i.lora_A,), direction))


def test_forward_mode_goes_through_a_layer_in_training():
    layer = FusedLoRALinear(5, 3, rank=2)
    nn.init.normal_(layer.lora_B)
    x, direction = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, direction))).tangent
    torch.testing.assert_close(tangent, layer(direction) - layer.bias)


def test_functional_call_takes_other_adapters():
    layer = FusedLoRALinear(5, 3, rank=2)
    others = {
        f"adapters.default.{name}": torch.randn_like(p) for name, p in layer.adapters["default"].named_parameters()
    }
    x = torch.randn(4, 5)
    A, B = others["adapters.default.lora_A"], others["adapters.default.lora_B"]
    expected = lora_linear(x, layer.weight, A, B, layer.scale, layer.bias)
    torch.testing.assert_close(functional_call(layer, others, (x,)), expected)
    grads = grad(lambda named: functional_call(layer, named, (x,)).sin().sum())(others)
    A, B = A.requires_grad_(), B.requires_grad_()
    wanted = torch.autograd.grad(lora_linear(x, layer.weight, A, B, layer.scale, layer.bias).sin().sum(), (A, B))
    torch.testing.assert_close(tuple(grads.values()), wanted)


# ---------------------------------------------------------------- hooks, views, in-place work


def test_output_may_be_changed_in_place():
    leaves = oracle.draw(4, 5, 3, 2).leaves()
    for x in (leaves.x, leaves.x.view(2, 2, 5), leaves.x[0]):
        y = lora_linear(x, leaves.weight, leaves.lora_A, leaves.lora_B, 1.0)
        y += 1
        y.mul_(2)
        (grad,) = torch.autograd.grad(y.sum(), leaves.lora_B)
        plain = lora_linear(x, leaves.weight, leaves.lora_A, leaves.lora_B, 1.0)
        torch.testing.assert_close(grad, 2 * torch.autograd.grad(plain.sum(), leaves.lora_B)[0])


@pytest.mark.parametrize(
    "view", [lambda y: y[:, 1:], lambda y: y.t(), lambda y: y.view(-1)], ids=["slice", "t", "flat"]
)
def test_a_view_of_the_output_may_be_changed_in_place(view):
    leaves = oracle.draw(4, 5, 3, 2).leaves()
    args = (leaves.x, leaves.weight, leaves.lora_A, leaves.lora_B, 1.0, leaves.bias)

    def gradients(forward):
        y = forward(*args)
        view(y).mul_(3)
        return torch.autograd.grad(y.sin().sum(), (leaves.x, leaves.lora_A, leaves.lora_B, leaves.bias))

    torch.testing.assert_close(gradients(lora_linear), gradients(reference.eager_lora_linear))


def test_an_input_that_is_changed_before_the_backward_is_noticed():
    leaves = oracle.draw(4, 5, 3, 2).leaves()
    x = leaves.x * 1
    y = lora_linear(x, leaves.weight, leaves.lora_A, leaves.lora_B, 1.0)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_hooks_on_the_layer_its_parameters_and_its_output_see_what_they_should():
    layer = FusedLoRALinear(5, 3, rank=2)
    nn.init.normal_(layer.lora_B)
    seen = {}
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    layer.register_forward_hook(lambda module, args, y: y + 1)
    layer.register_full_backward_hook(lambda module, dx, dy: seen.update(dx=dx[0], dy=dy[0]))
    layer.lora_A.register_hook(lambda dA: dA * 10)
    layer.lora_B.register_post_accumulate_grad_hook(lambda p: seen.update(dB=p.grad.clone()))
    x = torch.randn(4, 5, requires_grad=True)
    y = layer(x)
    y.register_hook(lambda dy: dy * 2)
    y.sum().backward()
    A, B = layer.lora_A.detach().clone().requires_grad_(), layer.lora_B.detach().clone().requires_grad_()
    x2 = (x.detach() * 2).requires_grad_()
    expected = lora_linear(x2, layer.weight, A, B, layer.scale, layer.bias) + 1
    torch.testing.assert_close(y, expected)
    (expected * 2).sum().backward()
    assert torch.equal(seen["dy"], torch.full((4, 3), 2.0))
    torch.testing.assert_close(seen["dx"], x2.grad)
    torch.testing.assert_close(x.grad, x2.grad * 2)
    torch.testing.assert_close(layer.lora_A.grad, A.grad * 10)
    torch.testing.assert_close(seen["dB"], B.grad)
