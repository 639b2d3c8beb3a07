"""The kernels on a GPU where there is one, else in the interpreter. Needs torch, Triton and pytest alone."""

import os

import pytest
import torch

from fused_lora.backends.triton import straight

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


@pytest.fixture(scope="session")
def device():
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture
def launches(monkeypatch):
    """Every launch that is made: its ``Launch`` where it goes through the JIT, its ``Kept`` where it does not."""
    made = []
    for cls, name in ((straight.Launch, "through_jit"), (straight.Kept, "launch")):
        real = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda self, *args, real=real: made.append(self) or real(self, *args))
    return made
