"""The rule for ``decode.py``: which problems it computes, in which tiles, in how many parts of Q."""

from __future__ import annotations

import math
from dataclasses import replace

from .configs import MAX_SPLIT, MIN_DOT, DecodeConfig, Device, Problem, block_r, next_power_of_2

# of a tile, and of all of them
MOST_TILE_ROWS = 128
MOST_ROWS = 1024


def takes_decode(problem: Problem, device: Device) -> bool:
    """Whether ``decode.py`` computes this problem: few rows, and no dropout, of which it knows nothing.

    Up to 128 rows are one tile tall: w is read once, and that takes nearly all the time. On an H100 at K = N = 4096,
    64 rows took 29.7 µs where the tiled kernel took 43.8 and in-place addmm 32.2, 128 rows 30.0 and addmm 33.3.

    More rows take it where it finds places for two parts of Q or more, so where whole tiles would leave half of the
    SMs idle. This is arithmetic, for an H100 at K = N = 4096, with 8 TB/s out of L2 shared by 132 SMs (so 0.5 µs for a
    step of 128 x 128 x 64, 34 µs for its 64 steps) and a launch of 6 µs, against addmm, measured or interpolated:

        rows   whole tiles, µs       parts, µs                   addmm, µs
        256    64 SMs, 34 + 6        2: 17 + 6, and 4 in slots   34
        512    128 SMs, 34 + 6       1: 34 + 6                   41
        1024   128 of 128 x 256, 1.2 of cuBLAS                   63, 1.35 of it

    The parts are of tiles of 128 x 128: those of 128 x 64, as for fewer rows, would bring 201 MB out of L2 for 256
    rows, they 134. The tiles of a row can't share the low-rank product instead: each would wait for all, so some for a
    higher ticket.
    """
    if problem.dropout or problem.M > MOST_ROWS:
        return False
    config = default_decode(problem, device)
    return fits_decode(config, problem, device) and (problem.M <= config.ROWS or config.SPLIT > 1)


def tile_rows(M: int) -> int:
    """The least that hold all M, or the most."""
    return min(max(next_power_of_2(M), MIN_DOT), MOST_TILE_ROWS)


# Largest first: BLOCK_P, bytes of w in a row of BLOCK_Q, stages. Two programs of 64 columns, with up to 96 KB of w on
# their way, or one of 128, for more rows than a tile has, are enough for an SM.
_FULL = 128
_LOADS: tuple[tuple[int, int, int], ...] = ((64, 256, 4), (64, 128, 4), (64, 128, 3), (64, 128, 2))
_BLOCKS = ((128, 128, 6), (128, 128, 4))
# bytes of u in a row of BLOCK_R, for each column of a tile: compiling showed spills, of a few bytes, beyond
_RANK_BYTES = 1
# shared memory that the system takes beside each program's
_RESERVED = 1024


def _accumulator_limit(problem: Problem, device: Device) -> int:
    """As for the tiled kernel (``configs.accumulator_limit``), but sums of parts take as many registers again."""
    if problem.tensor_cores and device.capability[0] in (9, 10):
        return 64
    return 32 if problem.itemsize == 2 else 16


def decode_programs(config: DecodeConfig, problem: Problem, device: Device) -> int:
    """How many programs share an SM: as many as have room there for their pipelines of tiles of w and a, and for 128
    registers a thread.

    The newest tile has no buffer where the matrix instruction takes its operands from registers.
    """
    buffers = config.num_stages if device.capability[0] in (9, 10) else config.num_stages - 1
    pipeline = buffers * (config.BLOCK_P + config.ROWS) * config.BLOCK_Q * problem.itemsize
    return min((device.shared_memory + _RESERVED) // (pipeline + _RESERVED), 16 // config.num_warps)


def fits_decode(config: DecodeConfig, problem: Problem, device: Device) -> bool:
    """As ``configs.fits``, for ``decode.py``."""
    accumulators = config.ROWS * config.BLOCK_P // (config.num_warps * 32)
    return (
        not problem.dropout
        and problem.M <= MOST_ROWS
        and accumulators <= _accumulator_limit(problem, device)
        and decode_programs(config, problem, device) >= 1
    )


def default_decode(problem: Problem, device: Device) -> DecodeConfig:
    """The longest loads of which two programs share an SM, and as many parts as run at once; of several blocks of
    rows, tiles so wide that one program fills an SM.

    More parts would wait for a place, and then read with the GPU half empty; fewer would leave SMs idle.
    The low-rank product has as many parts, or more where there is room: the other programs wait for it at their end.
    """
    candidates = candidate_decodes(problem, device)
    fitting = [c for c in candidates if fits_decode(c, problem, device)] or candidates[-1:]
    first = (c for c in fitting if decode_programs(c, problem, device) >= _FULL // c.BLOCK_P)
    return split_decode(next(first, fitting[-1]), problem, device)


def candidate_decodes(problem: Problem, device: Device) -> list[DecodeConfig]:
    """Longest loads first, not split yet."""
    rows, loads = tile_rows(problem.M), _LOADS
    if rows < problem.M:
        loads = _BLOCKS + loads
    limit = _accumulator_limit(problem, device)
    return [
        DecodeConfig(
            columns, row // problem.itemsize, block_r(problem.R, columns * _RANK_BYTES // problem.adapter_itemsize),
            1, 1, 4 if rows * columns <= 128 * limit else 8, stages, rows,
        )
        for columns, row, stages in loads
    ]  # fmt: skip


def split_decode(config: DecodeConfig, problem: Problem, device: Device) -> DecodeConfig:
    """config with as many parts as run at once, but with few for how little each reads.

    After its own part, whoever is last at a tile reads all slots: a part's loads and those are least together where
    both are alike (``_most_parts``).
    """
    rows, steps = -(-problem.M // config.ROWS), -(-problem.Q // config.BLOCK_Q)
    tiles, h_tiles = rows * -(-problem.P // config.BLOCK_P), rows * -(-problem.R // config.BLOCK_R)
    places = decode_programs(config, problem, device) * device.sms
    # a part of one step would spend its time filling the pipeline
    split = max(min(places // (tiles + h_tiles), steps // 2, _most_parts(config.BLOCK_P, config, problem)), 1)
    room = (places - tiles * split) // h_tiles
    h_parts = min(room if room > 0 else MAX_SPLIT, steps // 4, _most_parts(config.BLOCK_R, config, problem))
    return replace(config, SPLIT=split, SPLIT_H=max(split, h_parts))


def _most_parts(columns: int, config: DecodeConfig, problem: Problem) -> int:
    loads, slot = (config.ROWS + columns) * problem.Q * problem.itemsize, 4 * config.ROWS * columns
    return min(math.isqrt(loads // slot), MAX_SPLIT)
