"""Compile a launch for a GPU that is not here, and read what the assembler made of it.

Works on any machine with Triton, whose wheel brings ptxas, but not while Triton interprets.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import Device
from .launch import Call

# shared memory that one program may use, from the CUDA programming guide's table of compute capabilities;
# multiprocessors of the A100, RTX 3090 Ti, L40S, H100, B200 and RTX PRO 6000
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

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Resources:
    """Of one program: registers per thread, bytes spilled, bytes of shared memory.

    warnings: ptxas's, by code.  matrix_instructions: PTX's names.  loops: machine instructions in each innermost loop
    that has matrix instructions, fewest first; matrix_counts: how many of each are those; loop_waits: how many of the
    first one's wait for memory or for them.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    warnings: tuple[str, ...]
    matrix_instructions: tuple[str, ...]
    loops: tuple[int, ...]
    matrix_counts: tuple[int, ...]
    loop_waits: int


def compile_call(call: Call, arch: int) -> Resources:
    """Compile ``call`` as Triton would on a GPU of compute capability arch (90 for sm_90).

    Tensors may be on the meta device; their pointers count as aligned to 16 bytes, as PyTorch's allocations are.
    """
    names = call.kernel.arg_names
    constants: dict[str, Any] = dict(call.flags)
    for name, value in dataclasses.asdict(call.config).items():
        if name in names:
            constants[name] = value
    fixed = {call.kernel.params[i].name for i in range(len(names)) if call.kernel.params[i].do_not_specialize}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, (name, value) in enumerate(zip(names, call.args, strict=False)):
        if value is None or (isinstance(value, int) and value == 1 and name not in fixed):
            constants[name] = value
            continue
        signature[name] = _type(value)
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and name not in fixed):
            attributes[(index,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(call.kernel, signature, constants, attributes)
    options = {"num_warps": call.config.num_warps, "num_stages": call.config.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return _read(compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata.shared)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@functools.lru_cache(maxsize=256)
def _read(ptx: str, cubin: bytes, shared: int) -> Resources:
    target = re.search(r"\.target sm_(\w+)", ptx)
    assert target is not None
    tool = _TOOLS / ("ptxas-blackwell" if int(re.sub(r"\D", "", target[1])) >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [str(tool), "-v", f"--gpu-name=sm_{target[1]}", str(file), "-o", str(file.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ptxas failed: {done.stderr.strip()}")
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)]
    registers = re.search(r"Used (\d+) registers", done.stderr)
    assert registers is not None
    loops = sorted(_matrix_loops(cubin), key=len)
    waits = sum(bool(re.search(r"DEPBAR|SYNCS", instruction)) for instruction in loops[0]) if loops else 0
    return Resources(
        registers=int(registers[1]),
        spill_bytes=sum(spills),
        shared_bytes=shared,
        warnings=tuple(sorted(set(re.findall(r"\((C\d+)\)", done.stderr)))),
        matrix_instructions=tuple(sorted(set(re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b", ptx)))),
        loops=tuple(len(loop) for loop in loops),
        matrix_counts=tuple(sum(bool(_MATRIX.search(text)) for text in loop) for loop in loops),
        loop_waits=waits,
    )


_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
_MATRIX = re.compile(r"\b([HQI]GMMA|HMMA|UTC\w*MMA)\b")


def _matrix_loops(cubin: bytes) -> list[list[str]]:
    """The bodies of the innermost loops with matrix instructions: from a backward branch's target to the branch."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(_TOOLS / "cuobjdump"), "-sass", file.name], capture_output=True, text=True, check=True
        )
    instructions = [(int(address, 16), text) for address, text in _INSTRUCTION.findall(done.stdout)]
    place = {address: index for index, (address, _) in enumerate(instructions)}
    loops = []
    for index, (address, text) in enumerate(instructions):
        branch = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)\b", text)
        if branch is not None and int(branch[1], 16) < address and int(branch[1], 16) in place:
            loops.append((place[int(branch[1], 16)], index))
    found = []
    for first, last in loops:
        inner = any(first <= head and tail <= last and (head, tail) != (first, last) for head, tail in loops)
        body = [text for _, text in instructions[first : last + 1]]
        if not inner and any(_MATRIX.search(text) for text in body):
            found.append(body)
    return found
