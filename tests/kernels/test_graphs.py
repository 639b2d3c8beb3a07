"""A layer on a GPU as users run it: CUDA graphs of forward and backward, inductor, autocast with gradient scaling."""

import copy

import oracle
import pytest
import torch
from torch import nn

from fused_lora import FusedLoRALinear, lora_linear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs and inductor's Triton need a GPU")


def layer(dtype=torch.bfloat16, dropout=0.0):
    torch.manual_seed(1)
    made = FusedLoRALinear(256, 384, rank=8, dropout=dropout, impl="triton", device="cuda", dtype=dtype)
    nn.init.normal_(made.lora_B, std=0.1)
    return made


def step(module, x, made):
    """y, dx, dA, dB."""
    leaf = x.detach().clone().requires_grad_()
    y = module(leaf)
    y.square().sum().backward()
    grads = [leaf.grad, made.lora_A.grad.clone(), made.lora_B.grad.clone()]
    made.zero_grad(set_to_none=True)
    return [y.detach().clone(), *grads]


@pytest.mark.parametrize("tokens", [4, 300])
def test_graphed_forward_and_backward_take_adapters_that_are_copied_into_place(tokens):
    plain = layer()
    made = copy.deepcopy(plain)
    sample = torch.randn(tokens, 256, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(made, (sample,))
    for _ in range(3):
        x = torch.randn(tokens, 256, dtype=torch.bfloat16, device="cuda")
        with torch.no_grad():
            for name in ("lora_A", "lora_B"):
                values = torch.randn_like(getattr(plain, name)) * 0.1
                getattr(plain, name).copy_(values)
                getattr(made, name).copy_(values)
        for got, expected in zip(step(graphed, x, made), step(plain, x, plain), strict=True):
            assert torch.equal(got, expected)


def test_a_captured_inference_forward_follows_its_adapter():
    made, x = layer(), torch.randn(4, 256, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        made(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = made(x)
        for _ in range(3):
            made.lora_B.copy_(torch.randn_like(made.lora_B))
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(y, made(x))


def test_inductor_compiles_a_step_without_recompiling():
    torch._dynamo.reset()
    function = torch.compile(lora_linear, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens, scale in ((33, 1.5), (300, 0.3)):
            inputs = oracle.draw(tokens, 256, 384, 8, dtype=torch.bfloat16, scale=scale, device="cuda")
            oracle.check(inputs, oracle.results(inputs, function, impl="triton"))


def test_autocast_and_gradient_scaling():
    made = layer(torch.float32)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    optimizer = torch.optim.SGD([made.lora_A, made.lora_B], lr=0.1)
    before = made.lora_A.detach().clone()
    with torch.autocast("cuda", dtype=torch.float16):
        y = made(torch.randn(40, 256, device="cuda"))
        assert y.dtype == torch.float16
        loss = y.float().square().mean()
    scaler.scale(loss).backward()
    assert made.lora_A.grad.dtype == torch.float32
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(made.lora_A, before)
