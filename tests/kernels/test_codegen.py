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
# of a multiprocessor, in KB, from the CUDA programming guide's table of compute capabilities
SHARED_MEMORY = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}


def _compile(script, *arguments):
    """What a script printed as JSON, run without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


COMPILE = """
import dataclasses, json, sys, torch
from fused_lora.kernels import codegen, configs, launch

arch, rank = int(sys.argv[1]), int(sys.argv[2])
M, K, N = 8192, 4096, 4096
torch.set_float32_matmul_precision(sys.argv[4])
dtype, adapter_dtype = (getattr(torch, name) for name in sys.argv[3].split("+"))

def meta(*shape, dtype=dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")

def problem(P, Q, dropout):
    exact = dtype == torch.float32 and sys.argv[4] == "highest"
    return configs.Problem(M, P, Q, rank, dtype.itemsize, adapter_dtype.itemsize, dropout, not exact)

x, dy, weight, h = meta(M, K), meta(M, N), meta(N, K), meta(M, rank)
A, B = meta(rank, K, dtype=adapter_dtype), meta(N, rank, dtype=adapter_dtype)
found = {}
for dropout in (False, True):
    drop = (1.5, meta(1, dtype=torch.int64) if dropout else None, 0.1)
    name = " with dropout" if dropout else ""
    calls = {
        "forward": launch.lora_matmul_call(
            x, weight.t(), A.t(), B.t(), meta(N), *drop, False, meta(M, N), h,
            configs.default_config(problem(N, K, dropout), codegen.DEVICES[arch])),
        "input gradient": launch.lora_matmul_call(
            dy, weight, B, A, None, *drop, True, meta(M, K), h,
            configs.default_config(problem(K, N, dropout), codegen.DEVICES[arch])),
        "adapter gradients": launch.adapter_grad_call(
            x, h, dy, h, *drop, A, B, configs.default_reduction(rank, dtype.itemsize, codegen.DEVICES[arch])),
    }
    for work, call in calls.items():
        found[work + name] = dataclasses.asdict(codegen.compile_call(call, arch))
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("arch", "rank", "dtypes", "precision"),
    [
        (90, 16, "bfloat16+bfloat16", "highest"),
        (90, 128, "float16+float32", "highest"),
        (80, 64, "bfloat16+float32", "highest"),
        (89, 16, "float16+float16", "highest"),
        (100, 16, "bfloat16+bfloat16", "highest"),
        (120, 16, "bfloat16+bfloat16", "highest"),
        (90, 16, "float32+float32", "highest"),
        (80, 16, "float32+float32", "high"),
    ],
)
def test_shipped_tiles_compile_without_spills_or_warnings_to_the_right_instruction(arch, rank, dtypes, precision):
    found = _compile(COMPILE, arch, rank, dtypes, precision)
    assert len(found) == 6
    exact = dtypes.startswith("float32") and precision == "highest"
    for work, resources in found.items():
        assert resources["spill_bytes"] == 0, (work, resources)
        assert resources["warnings"] == [], (work, resources)
        if not exact:
            assert MATRIX_INSTRUCTION[arch] in resources["matrix_instructions"], (work, resources)


DECODE = """
import dataclasses, json, sys, torch
from fused_lora.kernels import codegen, configs, launch

arch, rank, M, K, N = int(sys.argv[1]), int(sys.argv[2]), 4, 4096, 11008
torch.set_float32_matmul_precision(sys.argv[4])
dtype, adapter_dtype = (getattr(torch, name) for name in sys.argv[3].split("+"))

def meta(*shape, dtype=dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")

def config(P, Q):
    exact = dtype == torch.float32 and sys.argv[4] == "highest"
    problem = configs.Problem(M, P, Q, rank, dtype.itemsize, adapter_dtype.itemsize, False, not exact)
    return configs.default_decode(problem, codegen.DEVICES[arch])

x, dy, weight, h = meta(M, K), meta(M, N), meta(N, K), meta(M, rank)
A, B = meta(rank, K, dtype=adapter_dtype), meta(N, rank, dtype=adapter_dtype)
counters = meta(1000, dtype=torch.int32)
calls = {
    "forward": launch.decode_call(
        x, weight.t(), A.t(), B.t(), meta(N), 1.5, meta(M, N), h, counters, config(N, K)),
    "input gradient": launch.decode_call(
        dy, weight, B, A, None, 1.5, meta(M, K), h, counters, config(K, N)),
}
print(json.dumps({work: dataclasses.asdict(codegen.compile_call(call, arch)) for work, call in calls.items()}))
"""


@pytest.mark.parametrize(
    ("arch", "rank", "dtypes", "precision"),
    [
        (80, 16, "bfloat16+bfloat16", "highest"),
        (80, 100, "float32+float32", "highest"),
        (86, 64, "float16+float16", "highest"),
        (89, 128, "bfloat16+float32", "highest"),
        (90, 16, "bfloat16+bfloat16", "highest"),
        (90, 128, "float16+float32", "highest"),
        (90, 100, "float32+float32", "highest"),
        (90, 16, "float32+float32", "high"),
        (100, 16, "bfloat16+bfloat16", "highest"),
        (120, 64, "bfloat16+bfloat16", "highest"),
    ],
)
def test_decoding_compiles_without_spills_or_warnings_and_programs_share_a_multiprocessor(
    arch, rank, dtypes, precision
):
    found = _compile(DECODE, arch, rank, dtypes, precision)
    assert set(found) == {"forward", "input gradient"}
    for work, resources in found.items():
        assert resources["spill_bytes"] == 0, (work, resources)
        assert resources["warnings"] == [], (work, resources)
        # two of its programs, and 1 KB that the system takes for each, from a multiprocessor's memory and registers
        assert 2 * (resources["shared_bytes"] + 1024) <= SHARED_MEMORY[arch] * 1024, (work, resources)
        assert 2 * 128 * resources["registers"] <= 2**16
        if not (dtypes.startswith("float32") and precision == "highest"):
            assert MATRIX_INSTRUCTION[arch] in resources["matrix_instructions"], (work, resources)
