"""Compile a launch for a GPU that is not here, and read what the assembler made of it.

Works on any machine with Triton, whose wheel brings ptxas, but not while Triton interprets.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import subprocess
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from ..backends.triton.configs import Device
from ..backends.triton.straight import Launch
from . import sass

# shared memory that one program may use, from the CUDA programming guide's table of compute capabilities;
# SMs of the A100, RTX 3090 Ti, L40S, H100, B200 and RTX PRO 6000
DEVICES = {
    80: Device((8, 0), 163 * 1024, 108),
    86: Device((8, 6), 99 * 1024, 84),
    89: Device((8, 9), 99 * 1024, 142),
    90: Device((9, 0), 227 * 1024, 132),
    100: Device((10, 0), 227 * 1024, 148),
    120: Device((12, 0), 99 * 1024, 188),
}

MATRIX_INSTRUCTION = {
    80: "mma.sync",
    86: "mma.sync",
    89: "mma.sync",
    90: "wgmma.mma_async",
    100: "tcgen05.mma",
    120: "mma.sync",
}

_TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32",
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """Of one program: registers per thread, bytes spilled, bytes of shared memory.

    assembler: ptxas's version.  warnings: its, by code.  matrix_instructions: PTX's names.  loops: machine instructions
    in each innermost loop that has matrix instructions, fewest first, without that over ranks at a tile's end;
    matrix_counts, conversions: how many of each are those, or turn float32 into 16 bits; loop_waits: how many of the
    first one's wait for memory or for them.
    miscompiled: what ``sass.py`` finds wrong.  length: machine instructions in all.  global_accesses: the names of
    those that load from memory or store to it.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    assembler: str
    warnings: tuple[str, ...]
    matrix_instructions: tuple[str, ...]
    loops: tuple[int, ...]
    matrix_counts: tuple[int, ...]
    conversions: tuple[int, ...]
    loop_waits: int
    miscompiled: tuple[str, ...]
    length: int = 0
    global_accesses: tuple[str, ...] = ()


def compile_launch(launch: Launch, arch: int) -> Resources:
    """Compile ``launch`` as Triton would on a GPU of compute capability arch (90 for sm_90).

    Tensors may be on the meta device; their pointers count as aligned to 16 bytes, as PyTorch's allocations are.
    """
    names = launch.kernel.arg_names
    constants: dict[str, Any] = {"V": launch.variant}
    fixed = {launch.kernel.params[i].name for i in range(len(names)) if launch.kernel.params[i].do_not_specialize}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, (name, value) in enumerate(zip(names, launch.args, strict=False)):
        if value is None or (isinstance(value, int) and value == 1 and name not in fixed):
            constants[name] = value
            continue
        signature[name] = _type(value)
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and name not in fixed):
            attributes[(index,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(launch.kernel, signature, constants, attributes)
    key = source.hash(), arch, launch.num_warps, launch.num_stages
    if key not in _known:
        _known[key] = _read(*_compile(source, *key[1:]))
    return _known[key]


# the bare GEMM of a tile is asked for at every rank
_known: dict[tuple[str, int, int, int], Resources] = {}


@functools.cache
def assembler(arch: int) -> str:
    """The version of the ptxas that Triton takes for a GPU of compute capability arch."""
    done = subprocess.run([get_ptxas(arch).path, "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"V(\d+\.\d+\.\d+)", done.stdout)
    return "unknown" if found is None else found[1]


def _compile(source: ASTSource, arch: int, num_warps: int, num_stages: int) -> tuple[Any, str]:
    """The compiled kernel, and what ptxas said of it."""
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        # without the cache: of a cached kernel ptxas says nothing
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        options = {"num_warps": num_warps, "num_stages": num_stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return compiled, log.getvalue()


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _read(compiled: Any, log: str) -> Resources:
    registers = re.search(r"Used (\d+) registers", log)
    if registers is None:
        raise RuntimeError(f"ptxas must say how many registers are used, got: {log.strip() or 'nothing'}")
    instructions = sass.disassemble(compiled.asm["cubin"])
    # the loop over ranks scales v, and no main loop multiplies single numbers
    loops = [loop for loop in sass.matrix_loops(instructions) if not any(one.name.startswith("FMUL") for one in loop)]
    loops.sort(key=len)
    matrix = re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b", compiled.asm["ptx"])
    return Resources(
        registers=int(registers[1]),
        spill_bytes=sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)),
        shared_bytes=compiled.metadata.shared,
        assembler=assembler(compiled.metadata.target.arch),
        warnings=tuple(sorted(set(re.findall(r"\((C\d+)\)", log)))),
        matrix_instructions=tuple(sorted(set(matrix))),
        loops=tuple(map(len, loops)),
        matrix_counts=tuple(sum(bool(sass.MATRIX.search(one.name)) for one in loop) for loop in loops),
        conversions=tuple(sum(one.name.startswith("F2F") for one in loop) for loop in loops),
        loop_waits=sum(bool(re.search(r"DEPBAR|SYNCS", one.name)) for one in loops[0]) if loops else 0,
        miscompiled=(*sass.unwritten_reads(instructions), *sass.early_writes(instructions)),
        length=1 + max(place for place, one in enumerate(instructions) if one.name == "EXIT"),
        global_accesses=tuple(one.name for one in instructions if re.match("(LD|ST)G", one.name)),
    )
