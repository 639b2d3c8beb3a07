"""Code quality without a GPU: shipped configurations compiled for the GPUs they are for, and what the assembler says.

Compiling needs Triton as it is without TRITON_INTERPRET, so the compiling runs in a process of its own.
"""

import json
import os
import subprocess
import sys

import pytest

MATRIX_INSTRUCTION = {
    80: "mma.sync",
    86: "mma.sync",
    89: "mma.sync",
    90: "wgmma.mma_async",
    100: "tcgen05.mma",
    120: "mma.sync",
}

COMPILE = """
import dataclasses, json, sys, torch
from fused_lora.kernels import codegen, configs, launch

arch, rank = int(sys.argv[1]), int(sys.argv[2])
M, K, N = int(sys.argv[5]), 4096, 4096
torch.set_float32_matmul_precision(sys.argv[4])
dtype, adapter_dtype = (getattr(torch, name) for name in sys.argv[3].split("+"))

def meta(*shape, dtype=dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")

def plan(P, Q, dropout):
    # the tile, the schedule and the counters that a launch would have
    exact = dtype == torch.float32 and sys.argv[4] == "highest"
    problem = configs.Problem(M, P, Q, rank, dtype.itemsize, adapter_dtype.itemsize, dropout, not exact)
    config = configs.default_config(problem, codegen.DEVICES[arch])
    schedule = configs.default_schedule(problem, config, codegen.DEVICES[arch])
    recomputes = schedule.form == configs.Form.RECOMPUTE
    return config, schedule, None if recomputes else meta(1 << 14, dtype=torch.int32)

x, dy, weight, h = meta(M, K), meta(M, N), meta(N, K), meta(M, rank)
A, B = meta(rank, K, dtype=adapter_dtype), meta(N, rank, dtype=adapter_dtype)
reduction = configs.default_reduction(rank, dtype.itemsize, codegen.DEVICES[arch])
found = {}
for dropout in (False, True):
    drop = (1.5, meta(1, dtype=torch.int64) if dropout else None, 0.1)
    name = " with dropout" if dropout else ""
    calls = {
        "forward": launch.lora_matmul_call(
            x, weight.t(), A.t(), B.t(), meta(N), *drop, False, meta(M, N), h, *plan(N, K, dropout)),
        "input gradient": launch.lora_matmul_call(
            dy, weight, B, A, None, *drop, True, meta(M, K), h, *plan(K, N, dropout)),
        "adapter gradients": launch.adapter_grad_call(x, h, dy, h, *drop, A, B, reduction),
        "adapter gradients in parts": launch.adapter_grad_call(
            x, h, dy, h, *drop, A, B, reduction,
            meta(4, 128, 64, reduction.BLOCK_R, dtype=torch.float32), meta(128, dtype=torch.int32)),
    }
    for work, call in calls.items():
        found[work + name] = dataclasses.asdict(codegen.compile_call(call, arch))
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("arch", "rank", "dtypes", "precision", "tokens"),
    [
        (90, 16, "bfloat16+bfloat16", "highest", 8192),
        (90, 128, "float16+float32", "highest", 8192),
        (80, 64, "bfloat16+float32", "highest", 8192),
        (89, 16, "float16+float16", "highest", 8192),
        (100, 16, "bfloat16+bfloat16", "highest", 8192),
        (120, 16, "bfloat16+bfloat16", "highest", 8192),
        (90, 16, "float32+float32", "highest", 8192),
        (80, 16, "float32+float32", "high", 8192),
        (90, 64, "bfloat16+bfloat16", "highest", 512),
        (86, 128, "bfloat16+bfloat16", "highest", 512),
    ],
)
def test_shipped_tiles_compile_without_spills_or_warnings_to_the_instruction(arch, rank, dtypes, precision, tokens):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(arch), str(rank), dtypes, precision, str(tokens)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 8
    exact = dtypes.startswith("float32") and precision == "highest"
    for work, resources in found.items():
        assert resources["spill_bytes"] == 0, (work, resources)
        assert resources["warnings"] == [], (work, resources)
        if not exact:
            assert MATRIX_INSTRUCTION[arch] in resources["matrix_instructions"], (work, resources)
