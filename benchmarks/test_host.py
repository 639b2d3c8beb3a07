"""What a launch costs its host in Python: the call made ready, and its arguments bound as Triton's launcher binds them.

No GPU is needed, and none is used. What the driver adds, the encoding of two descriptors included, is not in it.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature

from fused_lora.backends import environment
from fused_lora.backends.triton import launch
from fused_lora.backends.triton.configs import Form, Schedule, TileConfig

pytestmark = pytest.mark.skipif(environment.interpreting(), reason="the interpreter has a launcher of its own")
TILE = TileConfig(128, 256, 64, 16, 8, 8, 3)


@pytest.mark.benchmark(group="host", max_time=0.5, warmup=True)
@pytest.mark.parametrize("loads", ["pointers", "descriptors"])
def test_a_forward_of_8192_tokens_is_made_ready(loads, benchmark):
    M, K, N, R = 8192, 4096, 4096, 16
    x, weight, A, B, out, h = (
        torch.empty(shape, dtype=torch.bfloat16) for shape in ((M, K), (N, K), (R, K), (N, R), (M, N), (M, R))
    )
    sync = torch.zeros(100, dtype=torch.int32)
    schedule = Schedule(Form.PUBLISH, descriptors=loads == "descriptors")
    assert launch.aligned(x, weight.t())
    kernel = launch._lora_matmul_kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, CUDABackend(GPUTarget("cuda", 90, 32)))

    def prepare():
        operands = x, weight.t(), A.t(), B.t(), None, 1.5, None, 0.0, False, out, h
        call = launch.lora_matmul_call(*operands, TILE, schedule, sync)
        return bind(*call.args, **call.flags, **launch._as_dict(call.config))

    benchmark(prepare)
