"""Tile sizes: one documented rule that answers for every GPU, without timing anything.

``fits`` is the only statement of limits; ``default_config`` takes the first candidate that it accepts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Device:
    """What a rule may know of a GPU: compute capability, shared memory a program may use, in bytes, multiprocessors."""

    capability: tuple[int, int]
    shared_memory: int
    multiprocessors: int = 108


@dataclass(frozen=True)
class Problem:
    """Sizes of ``out[M,P] = a[M,Q] w[Q,P] + scale · (a[M,Q] u[Q,R]) v[R,P]``, bytes of an element of a and of u.

    tensor_cores: False for float32 at full precision, which is multiplied in ordinary registers.
    """

    M: int
    P: int
    Q: int
    R: int
    itemsize: int
    adapter_itemsize: int
    dropout: bool = False
    tensor_cores: bool = True

    def __post_init__(self) -> None:
        assert self.tensor_cores or self.itemsize == 4, "only float32 is ever multiplied without tensor cores"


@dataclass(frozen=True)
class TileConfig:
    BLOCK_M: int
    BLOCK_P: int
    BLOCK_Q: int
    BLOCK_R: int
    GROUP_M: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ReductionConfig:
    BLOCK_M: int
    BLOCK_C: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class DecodeConfig:
    """Q is cut into SPLIT parts for a tile of out, into SPLIT_THIN for a tile of the thin product."""

    BLOCK_P: int
    BLOCK_Q: int
    BLOCK_R: int
    SPLIT: int
    SPLIT_THIN: int
    num_warps: int
    num_stages: int


# tl.dot's least size on every side
MIN_DOT = 16
# rows of the one tile that holds all tokens of a decoding step
DECODE_ROWS = MIN_DOT
# widest rank block that leaves the accumulators in registers beside a tile of the output
MAX_BLOCK_R = 128
MAX_BLOCK_R_EXACT = 32


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def block_r(rank: int, limit: int = MAX_BLOCK_R) -> int:
    """Ranks are padded to a power of two that a dot accepts, and beyond the limit looped over."""
    return min(max(next_power_of_2(rank), MIN_DOT), limit)


def shared_bytes(config: TileConfig, problem: Problem) -> int:
    """Pipeline buffers of the main loop: num_stages copies of the tiles of a, w and u."""
    tiles = (config.BLOCK_M + config.BLOCK_P) * config.BLOCK_Q * problem.itemsize
    return config.num_stages * (tiles + config.BLOCK_R * config.BLOCK_Q * problem.adapter_itemsize)


def registers(config: TileConfig, problem: Problem) -> int:
    """float32 accumulators per thread: the tile, its thin product, and the separate LoRA term that dropout needs."""
    wide = config.BLOCK_M * config.BLOCK_P * (2 if problem.dropout else 1)
    return (wide + config.BLOCK_M * config.BLOCK_R) // (config.num_warps * 32)


def fits(config: TileConfig, problem: Problem, device: Device) -> bool:
    """Shared memory as the device allows, and accumulators that leave enough of a thread's 255 registers for the rest.

    Half of them where tensor cores read their operands from shared memory; without, fragments of both operands pass
    through registers, and compiling showed spills beyond 48.
    """
    limit = 128 if problem.tensor_cores else 48
    return shared_bytes(config, problem) <= device.shared_memory and registers(config, problem) <= limit


# Largest first: BLOCK_M, BLOCK_P, BLOCK_Q, warps, stages.
_HALF = ((128, 128, 64, 8, 3), (128, 128, 32, 8, 3), (64, 128, 32, 8, 3), (64, 64, 32, 4, 3), (32, 32, 32, 4, 2))
_FLOAT = ((128, 128, 32, 8, 3), (128, 64, 32, 8, 3), (64, 64, 32, 4, 2), (32, 32, 32, 4, 2))
_EXACT = ((64, 64, 16, 8, 2), (32, 32, 16, 4, 2))


def default_config(problem: Problem, device: Device) -> TileConfig:
    """The largest tile that fits, cut down to the tokens there are; the last candidate fits every GPU."""
    rank = block_r(problem.R, MAX_BLOCK_R if problem.tensor_cores else MAX_BLOCK_R_EXACT)
    candidates = _HALF if problem.itemsize == 2 else _FLOAT if problem.tensor_cores else _EXACT
    rows = max(next_power_of_2(max(problem.M, 1)), MIN_DOT)
    for block_m, block_p, block_q, warps, stages in candidates:
        config = TileConfig(min(block_m, rows), block_p, block_q, rank, 8, warps, stages)
        if rows < block_m:
            # fewer accumulators than eight warps can share
            config = replace(config, num_warps=4)
        if fits(config, problem, device):
            return config
    return replace(config, num_stages=1, BLOCK_R=MIN_DOT)


def default_reduction(rank: int, itemsize: int, device: Device) -> ReductionConfig:
    """A block of 64 columns loads whole cache lines; M is walked in the longest steps that never spill."""
    from_shared_memory = device.capability[0] in (9, 10)
    return ReductionConfig(64 if itemsize == 2 and from_shared_memory else 32, 64, block_r(rank, 64), 4, 3)


def takes_decode(problem: Problem) -> bool:
    """Whether ``decode.py`` computes this problem: few tokens, so that reading w is all the work, and no dropout, which
    only training has."""
    return problem.M <= DECODE_ROWS and not problem.dropout


# Largest first: BLOCK_P, bytes of w in a row of BLOCK_Q, stages. Two programs of the first have 96 KB of w under way.
_DECODE = ((64, 256, 4), (64, 128, 4), (64, 128, 2))
# bytes of u in a row of BLOCK_R: compiling showed spills, of a few bytes, beyond it
_DECODE_RANK_BYTES = 64
MAX_SPLIT = 16
# shared memory that the system takes beside each program's
_RESERVED = 1024


def decode_programs(config: DecodeConfig, problem: Problem, device: Device) -> int:
    """How many programs share a multiprocessor: as many as have room there for their pipelines of tiles of w and a.

    The newest tile has no buffer where the matrix instruction takes its operands from registers.
    """
    buffers = config.num_stages if device.capability[0] in (9, 10) else config.num_stages - 1
    pipeline = buffers * (config.BLOCK_P + DECODE_ROWS) * config.BLOCK_Q * problem.itemsize
    return (device.shared_memory + _RESERVED) // (pipeline + _RESERVED)


def default_decode(problem: Problem, device: Device) -> DecodeConfig:
    """The longest loads of which two programs share a multiprocessor, and as many parts as run at once.

    More parts would wait for a place, and then read with the GPU half empty; fewer would leave multiprocessors idle.
    The thin product is cut into no fewer, and shorter where there is room: the other programs wait for it at their end.
    """
    rank = block_r(problem.R, _DECODE_RANK_BYTES // problem.adapter_itemsize)
    candidates = [DecodeConfig(p, row // problem.itemsize, rank, 1, 1, 4, stages) for p, row, stages in _DECODE]
    config = next((c for c in candidates if decode_programs(c, problem, device) >= 2), candidates[-1])
    steps = -(-problem.Q // config.BLOCK_Q)
    tiles, thin_tiles = -(-problem.P // config.BLOCK_P), -(-problem.R // config.BLOCK_R)
    places = decode_programs(config, problem, device) * device.multiprocessors
    # a part of one step would spend its time filling the pipeline
    split = max(min(places // (tiles + thin_tiles), steps // 2, MAX_SPLIT), 1)
    room = (places - tiles * split) // thin_tiles
    thin_parts = min(room if room > 0 else MAX_SPLIT, steps // 4, MAX_SPLIT)
    return replace(config, SPLIT=split, SPLIT_THIN=max(split, thin_parts))


# Triton's interpreter runs a program at a time: small tiles, so that small cases still have several of them, and tails
INTERPRETER_TILE = TileConfig(BLOCK_M=32, BLOCK_P=32, BLOCK_Q=32, BLOCK_R=16, GROUP_M=2, num_warps=4, num_stages=1)
INTERPRETER_DECODE = DecodeConfig(32, 32, BLOCK_R=16, SPLIT=3, SPLIT_THIN=2, num_warps=4, num_stages=1)
INTERPRETER_REDUCTION = ReductionConfig(BLOCK_M=32, BLOCK_C=32, BLOCK_R=16, num_warps=4, num_stages=1)
