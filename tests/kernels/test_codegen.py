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
import json, sys, torch
from fused_lora.kernels.shipped import Case, compile_case

arch, rank, tokens = map(int, sys.argv[1:4])
dtypes = [getattr(torch, name) for name in sys.argv[4].split("+")]
torch.set_float32_matmul_precision(sys.argv[5])
found = {}
for dropout in (False, True):
    for row in compile_case(Case(arch, tokens, 4096, 4096, rank, *dtypes, dropout)):
        name = row.work + (" with dropout" if dropout else "")
        plain = row.plain.loops[0] if row.plain is not None and row.plain.loops else None
        found[name] = vars(row.resources) | {"form": row.form, "loop": row.loop, "plain": plain}
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
    found = _compile(COMPILE, arch, rank, tokens, dtypes, precision)
    assert len(found) == 6
    exact = dtypes.startswith("float32") and precision == "highest"
    for work, resources in found.items():
        assert resources["spill_bytes"] == 0, (work, resources)
        assert resources["warnings"] == [], (work, resources)
        if not exact:
            assert MATRIX_INSTRUCTION[arch] in resources["matrix_instructions"], (work, resources)
            assert resources["loops"], (work, resources)
        if resources["form"] == "PUBLISH" and "dropout" not in work and arch >= 90 and "+float32" not in dtypes:
            # those who wait for h run the bare GEMM's loop
            assert resources["loop"] <= 1.05 * resources["plain"], (work, resources)


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
