"""What the offline compile found, read from docs/codegen.md: registers and shared memory, so tiles that fit at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fused_lora.backends.triton.configs import TileConfig


@dataclass(frozen=True)
class Compiled:
    """One launch of one GPU. arch: its compute capability, 90 for 9.0.  tile: "BLOCK_M×BLOCK_P×BLOCK_Q, warps, stages".

    shared_kb: as it is printed, to a whole KB.  loop, plain: instructions in the main loop of the tiles that wait for
    ``h``, and of the bare GEMM's; None where there is no bare GEMM to compare with.
    """

    arch: int
    work: str
    dtype: str
    R: int
    tile: str
    warps: int
    form: str
    registers: int
    shared_kb: int
    loop: int | None
    plain: int | None


@dataclass(frozen=True)
class Processor:
    """What one has for the programs that it holds at once. shared_kb: of which each program costs 1 more."""

    shared_kb: int
    threads: int
    programs: int
    registers: int = 65536


# from the CUDA programming guide's table of compute capabilities
PROCESSORS = {
    80: Processor(164, 2048, 32),
    86: Processor(100, 1536, 16),
    89: Processor(100, 1536, 24),
    90: Processor(228, 2048, 32),
    100: Processor(228, 2048, 32),
    120: Processor(100, 1536, 24),
}
# a warp's registers are given out in pieces of so many
REGISTER_PIECE = 256


def read(page: Path) -> list[Compiled]:
    """The rows of the page's table; none where there is no page."""
    if not page.exists():
        return []
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in page.open(encoding="utf-8")]
    head = next((row for row in rows if row[0] == "GPU"), [])
    named = (dict(zip(head, row, strict=True)) for row in rows if row[0].startswith("sm_"))
    return [
        Compiled(
            arch=int(row["GPU"][3:]),
            work=row["work"],
            dtype=row["dtype"],
            R=int(row["R"]),
            tile=row["tile, warps, stages"],
            warps=int(row["tile, warps, stages"].split(", ")[1]),
            form=row["form"],
            registers=int(row["registers"]),
            shared_kb=int(row["shared KB"]),
            loop=_count(row["loop"]),
            plain=_count(row["plain"]),
        )
        for row in named
    ]


def _count(cell: str) -> int | None:
    return int(cell) if re.fullmatch(r"\d+", cell) else None


def find(rows: Sequence[Compiled], arch: int, work: str, tile: TileConfig, form: str, rank: int) -> Compiled | None:
    """In bfloat16, the launch of this tile and form with the smallest compiled rank that is no smaller than this."""
    name = f"{tile.BLOCK_M}×{tile.BLOCK_P}×{tile.BLOCK_Q}, {tile.num_warps}, {tile.num_stages}"
    wanted = (arch, work, "bfloat16", name, form)
    found = [row for row in rows if (row.arch, row.work, row.dtype, row.tile, row.form) == wanted and rank <= row.R]
    return min(found, key=lambda row: row.R, default=None)


def resident(row: Compiled) -> int:
    """Programs that one processor holds at once."""
    processor = PROCESSORS[row.arch]
    warp = -(-row.registers * 32 // REGISTER_PIECE) * REGISTER_PIECE
    return min(
        processor.registers // (warp * row.warps),
        processor.shared_kb // (row.shared_kb + 1),
        processor.threads // (32 * row.warps),
        processor.programs,
    )
