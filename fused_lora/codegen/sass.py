"""Machine code read back: its matrix loops, and two faults of assemblers that come without a warning.

``unwritten_reads``: a uniform register that no path has written when it is read. ptxas 12.8 makes such code of two
wgmma operands that take turns in one place of shared memory: the product is then of whatever lies there.

``early_writes``: a register of a wgmma's first operand, written again before the wgmma is known to have read it. ptxas
before 13.3 does so to a pipelined wgmma that takes the operand from registers (triton#9433).
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import triton

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
MATRIX = re.compile(r"\b([HQI]GMMA|HMMA|UTC\w*MMA)\b")


@dataclass(frozen=True)
class Instruction:
    """predicate: its condition, or empty.  name: with its modifiers, HGMMA.64x16x16.F32.BF16."""

    address: int
    predicate: str
    name: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.address:04x}: {self.predicate} {self.name} {', '.join(self.operands)}".replace(":  ", ": ")

    @functools.cached_property
    def target(self) -> int | None:
        """The address that a branch, a call, or the end of a divergent region goes to."""
        if self.name.split(".")[0] not in ("BRA", "CALL", "BSSY", "JMP"):
            return None
        found = re.search(r"0x([0-9a-f]+)$", self.operands[-1]) if self.operands else None
        return None if found is None else int(found[1], 16)

    @functools.cached_property
    def written(self) -> frozenset[int]:
        """Uniform registers, by number."""
        place = self._result()
        if place is None:
            return frozenset()
        width = 4 if ".128" in self.name else 2 if ".64" in self.name or "WIDE" in self.name else 1
        return _span(self.operands[place], width)

    @functools.cached_property
    def read(self) -> frozenset[int]:
        """Uniform registers, by number: all that each operand surely spans."""
        result = self._result()
        found: set[int] = set()
        for place, operand in enumerate(self.operands):
            if place == result:
                continue
            for kind, number in re.findall(r"(\w*)\[?\bUR(\d+)\b", operand):
                first, width = int(number), 1
                if kind == "gdesc" and "GMMA" in self.name:
                    # the descriptors of both operands; with the first one in registers, the second of two pairs
                    first, width = (first + 2, 2) if re.match(r"R\d", self.operands[1]) else (first, 4)
                elif kind in ("gdesc", "desc") or (
                    ".64" in self.name and self.name.startswith("U") and not operand.startswith("c[")
                ):
                    width = 2
                found.update(range(first, first + width))
        return frozenset(found)

    def _result(self) -> int | None:
        """Which operand is a uniform register that it writes: the first one after predicates."""
        if not _WRITES_UNIFORM.match(self.name):
            return None
        place = next((i for i, operand in enumerate(self.operands) if not re.match(r"!?U?P[\dT]", operand)), None)
        return place if place is not None and re.fullmatch(r"UR\d+", self.operands[place]) else None

    @functools.cached_property
    def written_by_threads(self) -> frozenset[int]:
        """Ordinary registers, by number."""
        place = next((i for i, operand in enumerate(self.operands) if not re.match(r"!?U?P[\dT]", operand)), None)
        if place is None or not re.fullmatch(r"R\d+", self.operands[place]) or self.name.startswith(_NO_RESULT):
            return frozenset()
        sizes = re.match(r"[HQI]GMMA\.64x(\d+)x", self.name)
        wide = ".128" in self.name or "LDSM" in self.name
        width = int(sizes[1]) // 2 if sizes else 4 if wide else 2 if re.search(r"\.64|WIDE|CS2R", self.name) else 1
        return _span(self.operands[place], width)


_WRITES_UNIFORM = re.compile(
    r"(U(?!TMA|BLK|CGABAR|ISETP|FSETP|PSETP|PLOP3|R2UP|SETMAXREG|TC(?!ATOM)|GETNEXT|MEMSET)\w|R2UR|C?S2UR|C?REDUX"
    r"|VOTEU|LDCU|ELECT)"
)
_NO_RESULT = (
    "ST",
    "RED",
    "BAR",
    "SYNCS.ARRIVE",
    "CALL",
    "RET",
    "WARPSYNC",
    "ISETP",
    "FSETP",
    "R2UR",
    "R2P",
    "NANOSLEEP",
)


def _span(register: str, width: int) -> frozenset[int]:
    first = int(register.lstrip("UR"))
    return frozenset(range(first, first + width))


def disassemble(cubin: bytes) -> list[Instruction]:
    """The instructions of a cubin with one kernel, routines that it calls included, by address."""
    return parse(_listing(cubin))


def disassemble_each(cubin: bytes) -> dict[str, list[Instruction]]:
    """The instructions of each kernel of a cubin, by its mangled name."""
    kernels = re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", _listing(cubin), re.DOTALL)
    return {name: parse(text) for name, text in kernels}


def _listing(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(_CUOBJDUMP), "-sass", file.name], capture_output=True, text=True, check=True)
    return done.stdout


def parse(text: str) -> list[Instruction]:
    """As :func:`disassemble`, of what cuobjdump prints."""
    instructions = []
    for address, line in _LINE.findall(text):
        predicate, name, rest = re.match(r"(@!?U?P\w+)?\s*(\S+)\s*(.*)", line).groups()  # type: ignore[union-attr]
        operands = tuple(part.strip() for part in rest.split(",")) if rest else ()
        instructions.append(Instruction(int(address, 16), predicate or "", name, operands))
    addresses = [instruction.address for instruction in instructions]
    assert addresses == sorted(set(addresses)), "a cubin of one kernel has one run of addresses"
    return instructions


def matrix_loops(instructions: list[Instruction]) -> list[list[Instruction]]:
    """The bodies of the innermost loops with matrix instructions: from a backward branch's target to the branch."""
    place = _places(instructions)
    loops = []
    for index, one in enumerate(instructions):
        if one.name.startswith("BRA") and one.target is not None and one.target < one.address and one.target in place:
            loops.append((place[one.target], index))
    found = []
    for first, last in loops:
        inner = any(first <= head and tail <= last and (head, tail) != (first, last) for head, tail in loops)
        body = instructions[first : last + 1]
        if not inner and any(MATRIX.search(one.name) for one in body):
            found.append(body)
    return found


def unwritten_reads(instructions: list[Instruction]) -> list[str]:
    """Each instruction that reads a uniform register which no instruction on any way to it has written, in words.

    A way goes round no loop, so what only a later turn has written counts as unwritten; a write that hangs on a
    predicate counts as one. A call leads into its routine, and past it with all that the routine writes.
    """
    place = _places(instructions)
    after = [_next(instructions, place, index) for index in range(len(instructions))]
    order = _reverse_postorder(after)
    rank = {index: position for position, index in enumerate(order)}
    known: list[set[int]] = [set() for _ in instructions]
    found = []
    for index in order:
        one = instructions[index]
        missing = sorted(one.read - known[index])
        if missing:
            found.append(f"{one} reads {', '.join(f'UR{number}' for number in missing)}, which nothing has written")
        written = known[index] | one.written
        for following in after[index]:
            if rank[following] > rank[index]:
                into_routine = one.name.startswith("CALL") and instructions[following].address == one.target
                returned = one.name.startswith("CALL") and not into_routine
                known[following] |= written | (_writes_of_routine(instructions, after, place[one.target]) if returned
                                               and one.target in place else set())  # fmt: skip
    return found


def early_writes(instructions: list[Instruction]) -> list[str]:
    """Each write to a register of a wgmma's first operand before a wait has retired that wgmma, in words.

    A wait for at most n groups (WARPGROUP.DEPBAR.LE gsb0, n) retires all but the n groups that were issued last; the
    wgmma marked gsb0 is the last of its group.
    """
    place = _places(instructions)
    after = [_next(instructions, place, index) for index in range(len(instructions))]
    found = []
    for index, one in enumerate(instructions):
        if not re.match(r"[HQI]GMMA", one.name) or not re.match(r"R\d", one.operands[1]):
            continue
        operand = _span(re.match(r"R\d+", one.operands[1])[0], 4)  # type: ignore[index]
        # groups closed since the wgmma was issued, its own included
        seen = {(following, _closes_group(one)) for following in after[index]}
        ahead = list(seen)
        while ahead:
            here, groups = ahead.pop()
            at = instructions[here]
            wait = re.fullmatch(r"0x([0-9a-f]+)", at.operands[1]) if at.name == "WARPGROUP.DEPBAR.LE" else None
            if wait is not None and groups > int(wait[1], 16):
                continue
            if at.written_by_threads & operand:
                found.append(f"{at} writes an operand of {one} before it is read")
                continue
            # more groups than any wait leaves open
            steps = {(following, min(groups + _closes_group(at), 16)) for following in after[here]} - seen
            seen |= steps
            ahead.extend(steps)
    return sorted(set(found))


def _closes_group(one: Instruction) -> int:
    return int("GMMA" in one.name and "gsb0" in one.operands)


def _places(instructions: Iterable[Instruction]) -> dict[int, int]:
    return {one.address: index for index, one in enumerate(instructions)}


def _next(instructions: list[Instruction], place: dict[int, int], index: int) -> tuple[int, ...]:
    """Where control may go from an instruction: past it, to its target, or both."""
    one = instructions[index]
    kind = one.name.split(".")[0]
    ways = set()
    if one.target is not None and one.target in place and kind != "BSSY":
        ways.add(place[one.target])
    # BRA.U and BRA.DIV hang on an operand
    ends = kind in ("EXIT", "RET", "JMP", "KILL") or (kind == "BRA" and len(one.operands) == 1)
    if (one.predicate or not ends) and index + 1 < len(instructions):
        ways.add(index + 1)
    if kind == "BSYNC":
        ways |= {
            place[other.target] for other in instructions
            if other.name.startswith("BSSY") and other.operands[0] == one.operands[0] and other.target in place
        }  # fmt: skip
    return tuple(sorted(ways))


def _reverse_postorder(after: list[tuple[int, ...]]) -> list[int]:
    """Every instruction that the first leads to, each before those that follow it, loops aside."""
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(after[0]))]
    while stack:
        index, ways = stack[-1]
        for following in ways:
            if following not in seen:
                seen.add(following)
                stack.append((following, iter(after[following])))
                break
        else:
            order.append(index)
            stack.pop()
    return order[::-1]


def _writes_of_routine(instructions: list[Instruction], after: list[tuple[int, ...]], start: int) -> set[int]:
    seen, ahead = {start}, [start]
    written: set[int] = set()
    while ahead:
        index = ahead.pop()
        written |= instructions[index].written
        for following in after[index]:
            if following not in seen:
                seen.add(following)
                ahead.append(following)
    return written
