"""A layer on a GPU as users run it: CUDA graphs of forward and backward, inductor, autocast with gradient scaling.

Those that take ``Stage`` walk through the interpreter where there is no GPU; see ``test_device.py``.
"""

import copy
import gc

import oracle
import pytest
import torch
from test_device import DEVICE, ON_GPU, Stage
from torch import nn

from fused_lora import FusedLoRALinear, lora_linear
from fused_lora.backends.triton import launch, workspace

needs_gpu = pytest.mark.skipif(not ON_GPU, reason="CUDA graphs and inductor's Triton need a GPU")
SMALL, LARGE = (4, 5000) if ON_GPU else (2, 20)
K, N = (256, 384) if ON_GPU else (16, 32)
ROUNDS = 200 if ON_GPU else 1


def layer(dtype=torch.bfloat16, dropout=0.0, sizes=(K, N)):
    torch.manual_seed(1)
    made = FusedLoRALinear(*sizes, rank=8, dropout=dropout, impl="triton", device=DEVICE, dtype=dtype)
    nn.init.normal_(made.lora_B, std=0.1)
    return made


def net():
    """Of the fused kernels and one exact operation."""
    return nn.Sequential(layer(), nn.ReLU(), layer(sizes=(N, K)))


def draw_x(tokens):
    return torch.randn(tokens, K, dtype=torch.bfloat16, device=DEVICE)


def step(module, x, made):
    """y, dx, dA, dB."""
    leaf = x.detach().clone().requires_grad_()
    y = module(leaf)
    y.square().sum().backward()
    grads = [leaf.grad, made.lora_A.grad.clone(), made.lora_B.grad.clone()]
    made.zero_grad(set_to_none=True)
    return [y.detach().clone(), *grads]


@needs_gpu
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


@needs_gpu
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


@needs_gpu
def test_inductor_compiles_a_step_without_recompiling():
    torch._dynamo.reset()
    function = torch.compile(lora_linear, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens, scale in ((33, 1.5), (300, 0.3)):
            inputs = oracle.draw(tokens, 256, 384, 8, dtype=torch.bfloat16, scale=scale, device="cuda")
            oracle.check(inputs, oracle.results(inputs, function, impl="triton"))


@needs_gpu
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


@needs_gpu
@pytest.mark.parametrize("tokens", [4, 300])
def test_graphed_callables_draw_a_mask_for_each_replay_and_use_it_in_both_directions(tokens):
    made = FusedLoRALinear(64, 64, rank=64, bias=False, dropout=0.5, impl="triton", device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        # y = D(x)
        made.weight.zero_()
        made.lora_A.copy_(torch.eye(64))
        made.lora_B.copy_(torch.eye(64))
    x = torch.ones(tokens, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(made, (x.detach().clone().requires_grad_(),))
    masks = []
    for _ in range(3):
        y = graphed(x)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert torch.equal(y == 0, dx == 0)
        masks.append(y == 0)
    assert 0.3 < masks[0].double().mean().item() < 0.7
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


@needs_gpu
def test_reduce_overhead_trains_a_model_with_the_bits_of_an_eager_one():
    torch._dynamo.reset()
    plain = net()
    made = copy.deepcopy(plain)
    compiled = torch.compile(made, mode="reduce-overhead", fullgraph=True)
    for tokens in (SMALL, LARGE, SMALL):
        # a warm-up, a capture, replays
        for _ in range(5):
            x = draw_x(tokens)
            torch.compiler.cudagraph_mark_step_begin()
            trained(compiled, [*made.parameters()], x)
            trained(plain, [*plain.parameters()], x)
            for got, expected in zip(made.parameters(), plain.parameters(), strict=True):
                assert torch.equal(got, expected)


def trained(module, parameters, x):
    """The gradients of a step, which changes the adapters in place."""
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    grads = torch.autograd.grad(module(x).float().square().mean(), wanted)
    with torch.no_grad():
        for parameter, grad in zip(wanted, grads, strict=True):
            parameter.add_(grad, alpha=-0.1)
    return [*grads]


def warmed_up(work, stream):
    with Stage.on(stream):
        for _ in range(3):
            work()
    Stage.synchronize()


@pytest.mark.parametrize("elsewhere", [False, True], ids=["on the stream of the warm-up", "on a new stream"])
@pytest.mark.parametrize("tokens", [SMALL, LARGE])
def test_a_whole_training_step_is_captured(tokens, elsewhere):
    plain = net()
    made, x, stream = copy.deepcopy(plain), draw_x(tokens), Stage.stream()

    def step():
        return trained(made, [*made.parameters()], x)

    warmed_up(step, stream)
    _, replay = Stage.capture(step, Stage.stream() if elsewhere else stream)
    made.load_state_dict(plain.state_dict())
    for _ in range(3 if ON_GPU else 1):
        x.copy_(draw_x(tokens))
        Stage.synchronize()
        replay()
        Stage.synchronize()
        trained(plain, [*plain.parameters()], x)
        for got, expected in zip(made.parameters(), plain.parameters(), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("tokens", [SMALL, LARGE])
def test_a_graph_is_replayed_on_one_stream_beside_calls_on_another(tokens):
    made, x, streams = layer(), draw_x(tokens), [Stage.stream() for _ in range(3)]

    def forward():
        with torch.no_grad():
            return [made(x)]

    for stream in streams:
        warmed_up(forward, stream)
    results, replay = Stage.capture(forward, streams[0])
    expected = forward()[0].clone()
    Stage.synchronize()
    wrong = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in streams]
    for _ in range(ROUNDS):
        with Stage.on(streams[1]):
            replay()
            wrong[1] += (results[0] != expected).sum()
        with Stage.on(streams[2]):
            wrong[2] += (forward()[0] != expected).sum()
    Stage.synchronize()
    assert [count.item() for count in wrong] == [0, 0, 0]


def test_a_graph_outlives_plans_and_what_its_stream_has_outgrown():
    made, x, stream = layer(), draw_x(SMALL), Stage.stream()

    def forward(rows):
        with torch.no_grad():
            return [made(rows)]

    warmed_up(lambda: forward(x), stream)
    results, replay = Stage.capture(lambda: forward(x), stream)
    with Stage.on(stream):
        for tokens in (LARGE, 2 * LARGE):
            forward(draw_x(tokens))
        workspace.counters(x.device, 2 * workspace.LEAST)
    launch.forget_plans()
    gc.collect()
    Stage.synchronize()
    for _ in range(3):
        x.copy_(draw_x(SMALL))
        Stage.synchronize()
        replay()
        Stage.synchronize()
        assert torch.equal(results[0], forward(x)[0])


@pytest.mark.parametrize("work", ["forward", "step"])
def test_what_a_stream_lacks_when_it_captures_is_the_graphs_own(work):
    plain = layer()
    x, stream = draw_x(LARGE).requires_grad_(), Stage.stream()

    def results(rows):
        y = plain(rows)
        return [y.detach()] if work == "forward" else [*torch.autograd.grad(y, (rows, plain.lora_A), y)]

    # compiled on this stream; on the other one only what is small has been
    results(x)
    warmed_up(lambda: results(draw_x(SMALL).requires_grad_()), stream)
    got, replay = Stage.capture(lambda: results(x), stream)
    for _ in range(3 if ON_GPU else 1):
        x.data.copy_(draw_x(LARGE))
        Stage.synchronize()
        replay()
        Stage.synchronize()
        for one, other in zip(got, results(x), strict=True):
            assert torch.equal(one, other)
