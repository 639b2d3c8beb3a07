"""What the offline compile found: registers and shared memory, so tiles that an SM holds at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fused_lora.backends.triton.configs import TileConfig
from fused_lora.bench.results import Row
from fused_lora.codegen.record import sizes


@dataclass(frozen=True)
class SM:
    """What an SM has for the programs that it holds at once. shared_kb: each program takes 1 more than it asks for."""

    shared_kb: int
    threads: int
    programs: int
    registers: int = 65536


# from the CUDA programming guide's table of compute capabilities
SMS = {
    80: SM(164, 2048, 32),
    86: SM(100, 1536, 16),
    89: SM(100, 1536, 24),
    90: SM(228, 2048, 32),
    100: SM(228, 2048, 32),
    120: SM(100, 1536, 24),
}
# a warp's registers are allocated in units of this many
REGISTER_PIECE = 256


def find(rows: Sequence[Row], arch: int, pass_: str, tile: TileConfig, schedule: str, rank: int) -> Row | None:
    """Of bfloat16 alone, the launch of this tile and schedule whose rank is the smallest that is no smaller than this.

    Of any number of stages, which changes no instruction of a main loop.
    """
    name = f"{tile.BLOCK_M}×{tile.BLOCK_P}×{tile.BLOCK_Q}, {tile.num_warps}, "
    wanted = {"arch": arch, "schedule": schedule, "adapters": "bfloat16"}
    found = [
        row for row in rows
        if (row.pass_, row.dtype) == (pass_, "bfloat16") and wanted.items() <= row.extra.items()
        and row.extra["tile"].startswith(name)
        and rank <= sizes(row)["R"]
    ]  # fmt: skip
    return min(found, key=lambda row: sizes(row)["R"], default=None)


def resident(row: Row) -> int:
    """Programs that one SM holds at once."""
    about = row.extra
    sm, warps = SMS[about["arch"]], about["warps"]
    warp = -(-int(row.median) * 32 // REGISTER_PIECE) * REGISTER_PIECE
    return min(
        sm.registers // (warp * warps), sm.shared_kb // (about["shared_kb"] + 1), sm.threads // (32 * warps),
        sm.programs,
    )  # fmt: skip


def pace(row: Row | None) -> float:
    """Instructions in our main loop over the bare GEMM's; 1 where that is not known."""
    loop, plain = (row.extra["loop"], row.extra["plain"]) if row is not None else (None, None)
    return loop / plain if loop and plain else 1.0
