"""A compiled step calls the same kernels as an eager one; on a GPU, in a CUDA graph that torch.compile captures."""

from collections import defaultdict

import oracle
import pytest
import torch

from fused_lora import lora_linear
from fused_lora.backends.triton import workspace


@pytest.mark.parametrize("tokens", [3, 300])
def test_a_step_with_reduce_overhead_gives_the_bits_of_an_eager_one(tokens, device, monkeypatch):
    # no counters yet: they are first asked for in the warm-up, whose memory pool must not own them
    monkeypatch.setattr(workspace, "_counters", {})
    monkeypatch.setattr(workspace, "_spares", defaultdict(list))
    torch._dynamo.reset()
    compiled = torch.compile(lora_linear, fullgraph=True, mode="reduce-overhead")
    # on a GPU the choice is compiled too
    impl = "triton" if device == "cpu" else "auto"
    # a warm-up, a capture, replays
    for _ in range(4):
        # without a bias, whose gradient is the compiler's to sum
        inputs = oracle.draw(tokens, 64, 96, 4, dtype=torch.float16, bias=False, device=device)
        torch.compiler.cudagraph_mark_step_begin()
        # the next replay writes where this one did
        got = {name: value.clone() for name, value in oracle.results(inputs, compiled, impl=impl).items()}
        expected = oracle.results(inputs, lora_linear, impl="triton")
        assert got.keys() == expected.keys()
        for name in expected:
            assert torch.equal(got[name], expected[name]), name
