"""RichBoyNet's training step, Adam on A and B included."""

from __future__ import annotations

import pytest

from fused_lora.bench.baselines import CANDIDATES
from fused_lora.bench.shapes import TRAIN


@pytest.mark.benchmark(max_time=0.2)
@pytest.mark.parametrize("name", CANDIDATES)
def test_training_step(compete, name):
    compete(name, TRAIN, None, "float32")
