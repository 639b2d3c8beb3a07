"""A layer's forward, its forward and backward, and decoding, against the frozen linear and the peers."""

from __future__ import annotations

import pytest
import torch

from fused_lora.bench.peers import PEERS
from fused_lora.bench.shapes import FORWARD, STEP, select

ON_GPU = torch.cuda.is_available()
SHAPES = select("gpu" if ON_GPU else "cpu", quick=ON_GPU)
LAYERS = [shape for shape in SHAPES if STEP in shape.works]
DECODE = [shape for shape in SHAPES if STEP not in shape.works]
# the last: float32 adapters over a 16-bit base, PEFT's default
DTYPES = [*(["bfloat16", "float16"] if ON_GPU else ["float32", "bfloat16"]), "bfloat16+float32"]

pytestmark = [pytest.mark.benchmark(max_time=0.2), pytest.mark.parametrize("name", PEERS)]


def _by_name(shapes):
    return pytest.mark.parametrize("shape", shapes, ids=lambda shape: shape.name)


@_by_name(LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(compete, name, shape, dtype):
    compete(name, FORWARD, shape, dtype)


@_by_name(LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward(compete, name, shape, dtype):
    compete(name, STEP, shape, dtype)


@_by_name(DECODE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode(compete, name, shape, dtype):
    compete(name, FORWARD, shape, dtype)
