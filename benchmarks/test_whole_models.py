"""A training step of whole models: ours, PEFT's, PEFT's fused, eager, fine-tuned in full, and frozen."""

from __future__ import annotations

import pytest
import torch

from fused_lora.bench.nets import NETS
from tools.models import MODEL, NAMES


@pytest.mark.benchmark(max_time=0.5)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", NETS["cuda" if torch.cuda.is_available() else "cpu"], ids=lambda spec: spec.name)
def test_training_step_of_a_model(compete, name, spec):
    compete(name, MODEL, spec, spec.dtype)
