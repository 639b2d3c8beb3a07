"""torch.autocast's dtype rules, adapters of float32 over a base of 16 bits, and gradient scaling."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_lora import apply_lora, lora_linear, lora_parameters

pytestmark = pytest.mark.usefixtures("cpu_impl")


def test_autocast_computes_in_its_dtype_and_gradients_keep_their_parameters():
    leaves = oracle.draw(9, 33, 20, 4).leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(leaves.x, leaves.weight, leaves.lora_A, leaves.lora_B, 1.5, leaves.bias)
        assert y.dtype == torch.bfloat16
        assert torch.nn.functional.linear(leaves.x, leaves.weight).dtype == y.dtype
        y.float().sin().sum().backward()  # inside, as users do by mistake
    grads = [leaves.x.grad, leaves.lora_A.grad, leaves.lora_B.grad, leaves.bias.grad]
    assert {g.dtype for g in grads} == {torch.float32}
    low = [t.detach().bfloat16().requires_grad_() for t in (leaves.x, leaves.lora_A, leaves.lora_B, leaves.bias)]
    lora_linear(low[0], leaves.weight.bfloat16(), low[1], low[2], 1.5, low[3]).float().sin().sum().backward()
    for got, expected in zip(grads, low, strict=True):
        torch.testing.assert_close(got, expected.grad.float(), rtol=0, atol=0)


def test_backward_under_another_autocast_stays_in_the_forwards_dtype():
    leaves, again = oracle.draw(9, 33, 20, 4).leaves(), oracle.draw(9, 33, 20, 4).leaves()
    again = leaves.leaves()
    for inputs, mixed in ((leaves, True), (again, False)):
        y = lora_linear(inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, 1.5)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            y.sum().backward()
    assert torch.equal(leaves.x.grad, again.x.grad)
    assert torch.equal(leaves.lora_A.grad, again.lora_A.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_result_has_the_dtype_of_nn_linears_or_both_refuse(weight_dtype, x_dtype, dtype):
    i = oracle.draw(4, 6, 5, 2)
    x, weight, bias = i.x.to(x_dtype), i.weight.to(weight_dtype), i.bias.to(weight_dtype)
    with torch.autocast("cpu", dtype=dtype):
        try:
            expected = F.linear(x, weight, bias).dtype
        except RuntimeError:
            expected = None
        if expected is None:
            with pytest.raises(TypeError, match="must have weight's dtype"):
                lora_linear(x, weight, i.lora_A, i.lora_B, 1.0, bias)
        else:
            adapters = (i.lora_A, i.lora_B) if expected != torch.float64 else (i.lora_A.double(), i.lora_B.double())
            assert lora_linear(x, weight, *adapters, 1.0, bias).dtype == expected
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_may_be_switched_off_within():
    i = oracle.draw(4, 6, 5, 2)
    args = (i.x, i.weight, i.lora_A, i.lora_B, 1.0, i.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert torch.equal(lora_linear(*args), lora_linear(*args))
        assert lora_linear(*args).dtype == torch.float32


def adapted(dtype):
    torch.manual_seed(3)
    model = apply_lora(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype), rank=2)
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_scaling_of_float32_adapters_over_a_16_bit_base(dtype):
    model, plain = adapted(dtype), adapted(dtype)
    parameters = lora_parameters(model)
    assert {p.dtype for p in parameters} == {torch.float32}
    x, target = torch.randn(8, 12).to(dtype), torch.randn(8, 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scaler.scale(F.mse_loss(model(x).float(), target)).backward()
    assert {p.grad.dtype for p in parameters} == {torch.float32}
    scaler.unscale_(optimizer)
    F.mse_loss(plain(x).float(), target).backward()
    for ours, theirs in zip(parameters, lora_parameters(plain), strict=True):
        # a power of two scales without rounding, away from where numbers lose bits
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2e-2, atol=1e-3)
    before = [p.detach().clone() for p in parameters]
    scaler.step(optimizer)
    scaler.update()
    assert not any(torch.equal(one, two) for one, two in zip(before, parameters, strict=True))


def test_gradient_scaling_skips_a_step_that_overflowed():
    model = adapted(torch.float16)
    parameters = lora_parameters(model)
    before = [p.detach().clone() for p in parameters]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scaler.scale(model(torch.randn(8, 12).half()).float().square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**23
    assert all(torch.equal(one, two) for one, two in zip(before, parameters, strict=True))
