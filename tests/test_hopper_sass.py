"""What nvcc makes of Hopper's kernel: registers, and the machine code of its main loops. No GPU is asked."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from fused_lora.codegen import sass

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not here")

# With h v in the main loop and apart, with dropout on the input and on the output; the first has least registers left.
SOURCES = ("forward_half", "input_grad_bfloat16")
# as in shape.cuh
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40
NAME = re.compile(
    r"lora_matmulINS1_5ShapeINS0_\d(?P<type>BFloat16|Half)ELb(?P<along>\d)ELi(?P<columns>\d+)ELi(?P<ranks>\d+)ELb(?P<drops>\d)"
)


@dataclass(frozen=True)
class Kernel:
    """An instance: its template arguments, what ptxas says of it, its machine code."""

    columns: int
    ranks: int
    drops_input: bool
    apart: bool
    usage: str
    code: list[sass.Instruction]

    @property
    def products(self) -> dict[str, tuple[int, ...]]:
        """Widths of the wgmmas between a fence and the wait after it, by what they multiply."""
        main, low = 4 * (self.columns,), 4 * (self.ranks,)
        h_v = self.ranks // 16 * ((32,) if self.apart else (self.columns,))
        together = {} if self.drops_input else {"a w and a u": main + low}
        return {"a w": main, "a u": low, "h v": h_v} | together


@pytest.fixture(scope="session", params=SOURCES)
def compiled(request, tmp_path_factory):
    cubin = tmp_path_factory.mktemp(request.param) / "kernel.cubin"
    command = [
        NVCC, "-cubin", "-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", f"-I{CUDA / 'device'}",
        "-Xptxas=-v", "-o", str(cubin), str(CUDA / "hopper" / f"lora_matmul_{request.param}.cu"),
    ]  # fmt: skip
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return made.stdout + made.stderr, sass.disassemble_each(cubin.read_bytes())


@pytest.fixture
def kernels(compiled):
    report, instructions = compiled
    found = []
    for name, code in instructions.items():
        shape = NAME.search(name)
        usage = re.search(rf"Function properties for {name}\n(.*\n.*)\n", report)
        drops, along = shape["drops"] == "1", shape["along"] == "1"
        apart = shape["type"] == "Half" or (drops and not along)
        found.append(Kernel(int(shape["columns"]), int(shape["ranks"]), drops and along, apart, usage[1], code))
    assert len(found) == 5
    return found


def test_the_compiler_warns_of_nothing_and_spills_nothing(compiled, kernels):
    report, _ = compiled
    # C7508: setmaxnreg ignored; C7510 to C7519: wgmmas wait for each other
    assert re.findall(r"\(C75\d\d\).*|.*warning.*", report) == []
    for kernel in kernels:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in kernel.usage


def test_every_warp_stays_within_the_registers_it_has(kernels):
    for kernel in kernels:
        assert most_registers(kernel.code) <= CONSUMER_REGISTERS
        (given_back,) = (one for one in kernel.code if one.name.startswith("USETMAXREG.DEALLOC"))
        assert given_back.operands == (hex(PRODUCER_REGISTERS),)
        assert most_registers(reachable(kernel.code, given_back)) <= PRODUCER_REGISTERS
        taken = [one for one in kernel.code if one.name.startswith("USETMAXREG.TRY_ALLOC")]
        assert [one.operands[-1] for one in taken] == [hex(CONSUMER_REGISTERS)]


def test_wgmmas_run_in_the_groups_that_were_written(kernels):
    for kernel in kernels:
        groups = set(wgmma_groups(kernel.code))
        assert groups == set(kernel.products.values()), kernel


def test_no_loop_of_wgmmas_has_a_fence_of_memory(kernels):
    for kernel in kernels:
        loops = sass.matrix_loops(kernel.code)
        main = [loop for loop in loops if any(f"x{kernel.columns}x" in one.name for one in loop)]
        assert main
        for loop in loops:
            assert [str(one) for one in loop if one.name.startswith(("MEMBAR", "ERRBAR", "LDL", "STL"))] == []


def test_registers_are_written_before_they_are_read_and_kept_until_wgmma_has_read_them(kernels):
    for kernel in kernels:
        assert sass.unwritten_reads(kernel.code) == []
        assert sass.early_writes(kernel.code) == []


def wgmma_groups(code):
    """Widths of the wgmmas between each WARPGROUP.ARRIVE and the next wait, in the order of addresses."""
    group = None
    for one in code:
        if one.name == "WARPGROUP.ARRIVE":
            if group:
                yield tuple(group)
            group = []
        elif one.name == "WARPGROUP.DEPBAR.LE":
            if group:
                yield tuple(group)
            group = None
        elif found := re.match(r"HGMMA\.64x(\d+)x16", one.name):
            assert group is not None, f"{one} comes before a fence"
            group.append(int(found[1]))


def most_registers(code):
    """One more than the highest number."""
    numbers = [int(number) for one in code for operand in one.operands for number in re.findall(r"\bR(\d+)", operand)]
    widest = [max(one.written_by_threads, default=0) for one in code]
    return max(numbers + widest) + 1


def reachable(code, first):
    place = {one.address: index for index, one in enumerate(code)}
    seen, ahead = set(), [place[first.address]]
    while ahead:
        index = ahead.pop()
        if index in seen or index >= len(code):
            continue
        seen.add(index)
        one = code[index]
        if one.target is not None:
            ahead.append(place[one.target])
        if not (one.name in ("BRA", "EXIT") and not one.predicate):
            ahead.append(index + 1)
    return [code[index] for index in sorted(seen)]
