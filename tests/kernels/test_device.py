"""What only a GPU can show: races between programs, streams, CUDA graphs.

Without one the same tests walk through the interpreter, with one repetition instead of a thousand, so that the first
minute on a GPU meets no slip of the pen: ``Stage`` holds all that is CUDA's own.
"""

import contextlib
import functools

import oracle
import pytest
import torch

from fused_lora import lora_linear
from fused_lora.backends import native
from fused_lora.backends.triton import launch
from fused_lora.backends.triton.configs import Schedule, ScheduleConfig, TileConfig
from fused_lora.backends.triton.kernels import lora_matmul

ON_GPU = torch.cuda.is_available()
# of the kernels: the rule's choice, then each way to share h, in the rule's tile
PRODUCE = ScheduleConfig(Schedule.PRODUCE, 4 if ON_GPU else 2)
SCHEDULES = [None, ScheduleConfig(Schedule.PUBLISH), PRODUCE, ScheduleConfig(Schedule.RECOMPUTE)]
# tokens that take the decode kernel, it too in taller tiles and in parts of several, and publishers
TOKENS = [4, 100, 300, 5000] if ON_GPU else [4, 40]
K, N, R = (1024, 1536, 16) if ON_GPU else (64, 64, 16)
LAUNCHES, STEPS, ROUNDS = (1000, 200, 200) if ON_GPU else (1, 1, 1)
DEVICE = "cuda" if ON_GPU else "cpu"
# of a whole step; the compiled extension's kernels are alike, and meet the same streams and graphs
IMPLS = ["triton"]
if native.why_not(torch.device(DEVICE), torch.bfloat16) is None:
    IMPLS.append("native")
by_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: "rule" if s is None else s.kind.name)
by_tokens = pytest.mark.parametrize("tokens", TOKENS)


class Stage:
    """Streams and graphs on a GPU; in the interpreter, everything at once and in its order."""

    @staticmethod
    def synchronize():
        if ON_GPU:
            torch.cuda.synchronize()

    @staticmethod
    def stream():
        return torch.cuda.Stream() if ON_GPU else None

    @staticmethod
    def on(stream):
        return torch.cuda.stream(stream) if ON_GPU else contextlib.nullcontext()

    @staticmethod
    def capture(call, stream):
        """What ``call`` returns, and a function that makes it anew in the same tensors."""
        if not ON_GPU:
            results = call()
            return results, lambda: [old.copy_(new) for old, new in zip(results, call(), strict=True)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = call()
        return results, graph.replay


def draw(tokens):
    """With the low-rank products that the adapter gradients read, which are not under test here."""
    inputs = oracle.draw(tokens, K, N, R, dtype=torch.bfloat16, device=DEVICE)
    inputs.g, inputs.h = inputs.dy @ inputs.lora_B, inputs.x @ inputs.lora_A.t()
    return inputs


def forward(inputs, schedule=None, dropout=False):
    """out and h of one launch."""
    operands = (inputs.x, inputs.weight.t(), inputs.lora_A.t(), inputs.lora_B.t(), inputs.bias, inputs.scale)
    seed = torch.tensor([7], device=DEVICE) if dropout else None
    return launch.lora_matmul(*operands, seed, 0.3 if dropout else 0.0, False, schedule=schedule)


def input_gradient(inputs, schedule=None):
    operands = (inputs.dy, inputs.weight, inputs.lora_B, inputs.lora_A, None, inputs.scale)
    return launch.lora_matmul(*operands, None, 0.0, True, schedule=schedule)


def adapter_gradients(inputs, parts=None):
    wide_and_low = inputs.x, inputs.g, inputs.dy, inputs.h
    dtypes = inputs.lora_A.dtype, inputs.lora_B.dtype
    return launch.adapter_grad(*wide_and_low, inputs.scale, None, 0.0, *dtypes, parts=parts)


def step(inputs, impl="triton"):
    """y, dx, dA, dB, dbias."""
    return list(oracle.results(inputs, lora_linear, impl=impl).values())


def assert_same_bits(call, times):
    first = [result.clone() for result in call()]
    assert not any(result.isnan().any() for result in first)
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(times):
        # on the device, so that launches follow each other closely
        wrong += sum((one != two).sum() for one, two in zip(first, call(), strict=True))
    assert wrong.item() == 0


@by_schedule
@by_tokens
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
def test_a_thousand_forwards_give_the_same_bits(tokens, schedule, dropout):
    inputs = draw(tokens)
    assert_same_bits(lambda: forward(inputs, schedule, dropout), LAUNCHES)


@by_schedule
@by_tokens
def test_a_thousand_input_gradients_give_the_same_bits(tokens, schedule):
    inputs = draw(tokens)
    assert_same_bits(lambda: input_gradient(inputs, schedule), LAUNCHES)


@pytest.mark.parametrize("parts", [None, 7])
@by_tokens
def test_a_thousand_adapter_gradients_give_the_same_bits(tokens, parts):
    inputs = draw(tokens)
    assert_same_bits(lambda: adapter_gradients(inputs, parts), LAUNCHES)


@pytest.mark.parametrize("impl", IMPLS, indirect=True)
@by_tokens
def test_hundreds_of_steps_give_the_same_bits(tokens, impl):
    inputs = draw(tokens)
    assert_same_bits(lambda: step(inputs, impl), STEPS)


@by_schedule
def test_more_tiles_than_run_at_once_hand_over_in_a_small_tile(schedule):
    """Tiles of 16 x 16: thousands of programs, of which most wait."""
    inputs = draw(TOKENS[-1])
    tile = TileConfig(16, 16, 32, 16, 8, 4, 2)
    operands = (inputs.x, inputs.weight.t(), inputs.lora_A.t(), inputs.lora_B.t(), inputs.bias, inputs.scale)
    args = (*operands, None, 0.0, False)
    assert_same_bits(lambda: launch.lora_matmul(*args, config=tile, schedule=schedule), 20 if ON_GPU else 1)


# by name: the implementation that it takes, and what is called
CALLS = {
    "forward": ("triton", forward),
    "PUBLISH": ("triton", lambda inputs: forward(inputs, ScheduleConfig(Schedule.PUBLISH))),
    "PRODUCE": ("triton", lambda inputs: forward(inputs, PRODUCE)),
    "adapter gradients": ("triton", lambda inputs: adapter_gradients(inputs, 4)),
    **{f"{impl} step": (impl, functools.partial(step, impl=impl)) for impl in IMPLS},
}
by_call = pytest.mark.parametrize(("impl", "call"), CALLS.values(), ids=CALLS.keys(), indirect=["impl"])


@by_call
@pytest.mark.parametrize("tokens", [(TOKENS[0], TOKENS[1]), (TOKENS[1], TOKENS[-1])], ids=str)
def test_two_streams_at_once_do_not_meet_in_the_counters(impl, call, tokens):
    streams = [Stage.stream(), Stage.stream()]
    inputs = [draw(count) for count in tokens]
    expected = [[result.clone() for result in call(one)] for one in inputs]
    wrong = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in streams]
    Stage.synchronize()
    for _ in range(ROUNDS):
        for index, stream in enumerate(streams):
            with Stage.on(stream):
                got = call(inputs[index])
                wrong[index] += sum((one != two).sum() for one, two in zip(got, expected[index], strict=True))
    Stage.synchronize()
    assert [count.item() for count in wrong] == [0, 0]


@pytest.fixture
def limit_blocks():
    """How many blocks the extension's launches have at most, until the test ends."""
    limit = torch.ops.fused_lora_native.limit_blocks
    yield limit
    limit(2**31 - 2)


@pytest.mark.skipif("native" not in IMPLS or not ON_GPU, reason="the extension is not built for a GPU that is here")
@pytest.mark.parametrize("rank", [16, 136])
@pytest.mark.parametrize("tokens", [300, 5000])
def test_any_number_of_blocks_beside_other_work_gives_the_same_bits(limit_blocks, tokens, rank):
    inputs = oracle.draw(tokens, K, N, rank, dtype=torch.bfloat16, device=DEVICE)
    expected = [result.clone() for result in step(inputs, "native")]
    streams, other = [Stage.stream(), Stage.stream()], torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)
    wrong = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in streams]
    draws = torch.Generator().manual_seed(rank + tokens)
    Stage.synchronize()
    for turn in range(250):
        limit_blocks((2, 6, 64, 132)[torch.randint(4, (), generator=draws)])
        with Stage.on(streams[turn % 2]):
            got = step(inputs, "native")
            wrong[turn % 2] += sum((one != two).sum() for one, two in zip(got, expected, strict=True))
        if turn % 3 == 0:
            other @ other
    Stage.synchronize()
    assert [count.item() for count in wrong] == [0, 0]


@by_call
@by_tokens
@pytest.mark.parametrize("warm", [True, False] if ON_GPU else [True], ids=lambda warm: "warmed up" if warm else "cold")
def test_a_captured_graph_replays_with_changed_inputs(tokens, impl, call, warm):
    inputs, stream = draw(tokens), Stage.stream()
    # compiled before the capture
    call(inputs)
    if warm:
        with Stage.on(stream):
            call(inputs)
    Stage.synchronize()
    results, replay = Stage.capture(lambda: call(inputs), stream)
    for _ in range(3 if ON_GPU else 1):
        for name in ("x", "dy", "lora_A", "lora_B"):
            operand = getattr(inputs, name)
            operand.copy_(torch.randn_like(operand) * operand.std())
        replay()
        Stage.synchronize()
        for got, expected in zip(results, call(inputs), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter compiles nothing")
def test_scale_and_tokens_recompile_nothing():
    inputs = draw(600)
    kernel = lora_matmul._lora_matmul_kernel
    forward(inputs, ScheduleConfig(Schedule.PUBLISH))
    compiled = len(kernel.device_caches[torch.cuda.current_device()][0])
    for scale, tokens in ((0.3, 600), (2.0, 599), (1.0, 512), (1.5, 601)):
        inputs = draw(tokens)
        inputs.scale = scale
        forward(inputs, ScheduleConfig(Schedule.PUBLISH))
    assert len(kernel.device_caches[torch.cuda.current_device()][0]) == compiled
