"""What only a GPU can show: races between programs, streams, CUDA graphs. The rest runs in the interpreter too."""

import oracle
import pytest
import torch

from fused_lora import lora_linear
from fused_lora.kernels import launch
from fused_lora.kernels.configs import Form, Schedule

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FORMS = [None, Schedule(Form.PUBLISH), Schedule(Form.PRODUCE, 4), Schedule(Form.RECOMPUTE)]
# tokens that take the few-token kernel, producers, and publishers
TOKENS = [4, 300, 5000]


def operands(inputs):
    return inputs.x, inputs.weight.t(), inputs.lora_A.t(), inputs.lora_B.t(), inputs.bias, inputs.scale


def step(inputs):
    """y, dx, dA, dB, dbias."""
    return list(oracle.results(inputs, lora_linear, impl="triton").values())


@pytest.mark.parametrize("schedule", FORMS, ids=lambda s: "default" if s is None else s.form.name)
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_thousand_launches_give_the_same_bits(tokens, schedule):
    inputs = oracle.draw(tokens, 1024, 1536, 16, dtype=torch.bfloat16, device="cuda")
    first = launch.lora_matmul(*operands(inputs), None, 0.0, False, schedule=schedule)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        again = launch.lora_matmul(*operands(inputs), None, 0.0, False, schedule=schedule)
        wrong += sum((one != two).sum() for one, two in zip(first, again, strict=True))
    assert wrong.item() == 0


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_hundred_steps_give_the_same_bits(tokens):
    inputs = oracle.draw(tokens, 1024, 1536, 16, dtype=torch.bfloat16, device="cuda")
    first = step(inputs)
    for _ in range(100):
        assert all(torch.equal(one, two) for one, two in zip(first, step(inputs), strict=True))


def test_two_streams_at_once_do_not_meet_in_the_counters():
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    inputs = [oracle.draw(tokens, 1024, 1536, 16, dtype=torch.bfloat16, device="cuda") for tokens in (300, 5000)]
    expected = [launch.lora_matmul(*operands(one), None, 0.0, False) for one in inputs]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(200):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[index].append(launch.lora_matmul(*operands(inputs[index]), None, 0.0, False))
    torch.cuda.synchronize()
    for index, got in enumerate(results):
        for out, thin in got:
            assert torch.equal(out, expected[index][0])
            assert torch.equal(thin, expected[index][1])


@pytest.mark.parametrize("warm", [True, False], ids=["warmed up", "cold stream"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_captured_forward_replays_with_changed_inputs(tokens, warm):
    inputs = oracle.draw(tokens, 1024, 1536, 16, dtype=torch.bfloat16, device="cuda")
    launch.lora_matmul(*operands(inputs), None, 0.0, False)  # compiled before the capture
    stream = torch.cuda.Stream()
    if warm:
        with torch.cuda.stream(stream):
            launch.lora_matmul(*operands(inputs), None, 0.0, False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out, thin = launch.lora_matmul(*operands(inputs), None, 0.0, False)
    for _ in range(3):
        inputs.x.copy_(torch.randn_like(inputs.x))
        inputs.lora_B.copy_(torch.randn_like(inputs.lora_B))
        graph.replay()
        torch.cuda.synchronize()
        for got, expected in zip((out, thin), launch.lora_matmul(*operands(inputs), None, 0.0, False), strict=True):
            assert torch.equal(got, expected)


def test_scale_and_tokens_recompile_nothing():
    inputs = oracle.draw(600, 1024, 1536, 16, dtype=torch.bfloat16, device="cuda")
    kernel = launch._lora_matmul_kernel
    launch.lora_matmul(*operands(inputs), None, 0.0, False, schedule=Schedule(Form.PUBLISH))
    compiled = len(kernel.device_caches[torch.cuda.current_device()][0])
    for scale, tokens in ((0.3, 600), (2.0, 599), (1.0, 512), (1.5, 601)):
        inputs.scale = scale
        args = operands(inputs)
        launch.lora_matmul(args[0][:tokens], *args[1:], None, 0.0, False, schedule=Schedule(Form.PUBLISH))
    assert len(kernel.device_caches[torch.cuda.current_device()][0]) == compiled
