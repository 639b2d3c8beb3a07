"""A layer's forward, backward, both, decoding, and memory, against the baselines."""

from __future__ import annotations

import pytest
import torch

from fused_lora.bench.baselines import CANDIDATES
from fused_lora.bench.shapes import BACKWARD, DECODE, FORWARD, STEP, select

ON_GPU = torch.cuda.is_available()
SHAPES = select("gpu" if ON_GPU else "cpu", quick=ON_GPU)
# the last: float32 adapters over a 16-bit base, PEFT's default
DTYPES = [*(["bfloat16", "float16"] if ON_GPU else ["float32", "bfloat16"]), "bfloat16+float32"]

pytestmark = [
    pytest.mark.benchmark(max_time=0.2),
    pytest.mark.parametrize("dtype", DTYPES),
    pytest.mark.parametrize("name", CANDIDATES),
]


def _shapes_of(pass_):
    shapes = [shape for shape in SHAPES if pass_ in shape.passes]
    return pytest.mark.parametrize("shape", shapes, ids=lambda shape: shape.name)


@_shapes_of(FORWARD)
def test_forward(compete, name, shape, dtype):
    compete(name, FORWARD, shape, dtype)


@_shapes_of(BACKWARD)
def test_backward(compete, name, shape, dtype):
    compete(name, BACKWARD, shape, dtype)


@_shapes_of(STEP)
def test_step(compete, name, shape, dtype):
    compete(name, STEP, shape, dtype)


@_shapes_of(DECODE)
def test_decode(compete, name, shape, dtype):
    compete(name, DECODE, shape, dtype)


@_shapes_of(STEP)
def test_memory(weigh, name, shape, dtype):
    weigh(name, STEP, shape, dtype)
