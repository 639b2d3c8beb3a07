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
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(arch), str(rank), str(tokens), dtypes, precision]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 6
    exact = dtypes.startswith("float32") and precision == "highest"
    for work, resources in found.items():
        assert resources["spill_bytes"] == 0, (work, resources)
        assert resources["warnings"] == [], (work, resources)
        if not exact:
            assert MATRIX_INSTRUCTION[arch] in resources["matrix_instructions"], (work, resources)
        if resources["form"] == "PUBLISH" and "dropout" not in work and arch >= 90 and "+float32" not in dtypes:
            # those who wait for h run the bare GEMM's loop
            assert resources["loop"] <= 1.05 * resources["plain"], (work, resources)
