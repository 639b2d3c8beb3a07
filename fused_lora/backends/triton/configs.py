"""Tile sizes: one documented rule that answers for every GPU, without timing anything.

``fits`` is the only statement of limits; ``default_config`` takes the first candidate that it accepts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum


class Schedule(IntEnum):
    """Who computes the low-rank product of a row of tiles: see ``lora_matmul.py``."""

    PLAIN = 0
    RECOMPUTE = 1
    PUBLISH = 2
    PRODUCE = 3


@dataclass(frozen=True)
class Device:
    """What a rule may know of a GPU: compute capability, bytes of shared memory for a program, SMs.

    name: the driver's; only a file of tuned choices (``tuned.py``) asks for it.
    """

    capability: tuple[int, int]
    shared_memory: int
    sms: int = 108
    name: str = ""


@dataclass(frozen=True)
class Problem:
    """Sizes of ``out[M,P] = a[M,Q] w[Q,P] + scale · (a[M,Q] u[Q,R]) v[R,P]``, bytes of an element of a and of u.

    tensor_cores: False for float32 at full precision, which is multiplied in ordinary registers.
    aligned: a and w are such that tensor descriptors can describe them.
    along_p: w is contiguous along P, as the input gradient reads it, not along Q. Only tuned choices ask.
    """

    M: int
    P: int
    Q: int
    R: int
    itemsize: int
    adapter_itemsize: int
    dropout: bool = False
    tensor_cores: bool = True
    aligned: bool = False
    along_p: bool = False

    def __post_init__(self) -> None:
        assert self.tensor_cores or self.itemsize == 4, "only float32 is ever multiplied without tensor cores"


@dataclass(frozen=True)
class ReductionProblem:
    """What the adapter gradients reduce: M rows, and columns, K for dA and N for dB together.

    The other fields are as in Problem.
    """

    M: int
    columns: int
    R: int
    itemsize: int
    dropout: bool = False
    tensor_cores: bool = True


@dataclass(frozen=True)
class TileConfig:
    BLOCK_M: int
    BLOCK_P: int
    BLOCK_Q: int
    BLOCK_R: int
    GROUP_M: int
    num_warps: int
    num_stages: int


# tl.dot's least size on every side
MIN_DOT = 16


@dataclass(frozen=True)
class ScheduleConfig:
    """split: programs that share the low-rank product of a row of tiles, for PRODUCE; 1 otherwise.

    descriptors: tensor descriptors load a and w (``Problem.aligned``), not pointers.
    """

    kind: Schedule
    split: int = 1
    descriptors: bool = False


@dataclass(frozen=True)
class ReductionConfig:
    BLOCK_M: int
    BLOCK_C: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class DecodeConfig:
    """Q is cut into SPLIT parts for a tile of out, ROWS x BLOCK_P, into SPLIT_H for a tile of the low-rank product."""

    BLOCK_P: int
    BLOCK_Q: int
    BLOCK_R: int
    SPLIT: int
    SPLIT_H: int
    num_warps: int
    num_stages: int
    ROWS: int = MIN_DOT


# parts of Q, or producers of a row of tiles, at most
MAX_SPLIT = 16
# widest rank block that leaves the accumulators in registers beside a tile of the output
MAX_BLOCK_R = 128
MAX_BLOCK_R_CROWDED = 64
MAX_BLOCK_R_FLOAT = 64
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
    """float32 accumulators of a thread: the tile, its low-rank product, and the separate LoRA term of dropout."""
    wide = config.BLOCK_M * config.BLOCK_P * (2 if problem.dropout else 1)
    return (wide + config.BLOCK_M * config.BLOCK_R) // (config.num_warps * 32)


def accumulator_limit(problem: Problem, device: Device) -> int:
    """How many of a thread's 255 registers may be accumulators; compiling showed spills beyond, in Triton
    3.6 or 3.7.

    wgmma and tcgen05 read both operands from shared memory, mma.sync from registers, and without tensor cores whole
    fragments of both operands pass through them.
    """
    if not problem.tensor_cores:
        return 48
    if problem.dropout or device.capability[0] not in (9, 10):
        # the mask is computed in registers; ptxas 13 spills sooner
        most = 80 if device.capability[0] == 12 and not problem.dropout else 96
        return most if problem.itemsize == 2 else 64
    # float32 adapters are rounded in registers on their way to the tensor cores
    if problem.itemsize == 4 or problem.adapter_itemsize == 4:
        return 88 if problem.itemsize == 4 else 144
    return 176 if device.capability[0] == 9 else 192


def fits(config: TileConfig, problem: Problem, device: Device) -> bool:
    """The only statement of limits: shared memory as the device allows, accumulators as its registers do."""
    fits_memory = shared_bytes(config, problem) <= device.shared_memory
    return fits_memory and registers(config, problem) <= accumulator_limit(problem, device)


# Largest first: BLOCK_M, BLOCK_P, BLOCK_Q, warps, stages.
_Tiles = tuple[tuple[int, int, int, int, int], ...]
_WGMMA: _Tiles = ((128, 256, 64, 8, 3),)
_DEEP_WGMMA: _Tiles = ((128, 256, 64, 8, 4), *_WGMMA)
_DEEP: _Tiles = ((128, 128, 64, 8, 3),)
_ONE_WAVE: _Tiles = ((128, 128, 64, 8, 6), (128, 128, 64, 8, 5), (128, 128, 64, 8, 4))
_TCGEN05: _Tiles = ((128, 128, 64, 4, 3), *_DEEP)
_HALF: _Tiles = ((128, 128, 32, 8, 3), (64, 128, 32, 8, 3), (64, 64, 32, 4, 3), (32, 32, 32, 4, 2))
_FLOAT: _Tiles = ((128, 128, 32, 8, 3), (128, 64, 32, 8, 3), (64, 64, 32, 8, 2), (32, 32, 32, 4, 2))
_EXACT: _Tiles = ((64, 64, 16, 8, 2), (32, 32, 16, 4, 2))


def default_config(problem: Problem, device: Device) -> TileConfig:
    """The largest tile that fits; the last candidate fits every GPU.

    Steps of 64 along Q are for wgmma and tcgen05, which take them from shared memory. Tiles of 128 x 256 are for wgmma
    alone, where they come near cuBLAS's own pace, if there is one for two SMs of three: those of 128 x 128 bring a
    third more out of L2 for the same work. Where an SM gets no second tile, the pipeline has all of its memory: three
    stages, with 64 KB on their way, gave 512 rows half a microsecond a step on an H100, which a load's latency takes.

    Blocks of 128 ranks are for tcgen05 alone. Elsewhere they spill, or lengthen the main loop of those who wait, as
    compiling showed, or leave registers for half the tile only: on an H100 rank 128, in 128 x 128, took 1.72 of
    cuBLAS's time, rank 64, in 128 x 256, 1.19.
    """
    candidates = candidate_tiles(problem, device)
    smallest = replace(candidates[-1], num_stages=1, BLOCK_R=MIN_DOT)
    return next((config for config in candidates if fits(config, problem, device)), smallest)


def candidate_tiles(problem: Problem, device: Device) -> list[TileConfig]:
    """Largest first, whether they fit or not."""
    generation = device.capability[0]
    if not problem.tensor_cores:
        candidates, widest_rank = _EXACT, MAX_BLOCK_R_EXACT
    elif problem.itemsize == 4:
        candidates, widest_rank = _FLOAT, MAX_BLOCK_R_FLOAT
    else:
        candidates, widest_rank = _HALF, MAX_BLOCK_R if generation == 10 else MAX_BLOCK_R_CROWDED
        if generation == 9:
            candidates = _DEEP + candidates
            # blocks of ranks after the first need up to 50 KB beside the pipeline, as compiling showed
            deep = widest_rank >= problem.R
            if deep and _tiles(problem, 128, 128) <= device.sms:
                candidates = _ONE_WAVE + candidates
            if 3 * _tiles(problem, 128, 256) >= 2 * device.sms:
                candidates = (_DEEP_WGMMA if deep else _WGMMA) + candidates
        elif generation == 10 and problem.adapter_itemsize == 2:
            candidates = _TCGEN05 + candidates
    rank = block_r(problem.R, widest_rank)
    rows = max(next_power_of_2(max(problem.M, 1)), MIN_DOT)
    return [
        # a low tile has fewer accumulators than eight warps can share
        TileConfig(min(block_m, rows), block_p, block_q, rank, 8, 4 if rows < block_m else warps, stages)
        for block_m, block_p, block_q, warps, stages in candidates
    ]


def _tiles(problem: Problem, block_m: int, block_p: int) -> int:
    return -(-problem.M // block_m) * -(-problem.P // block_p)


def can_describe(problem: Problem, device: Device) -> bool:
    """Whether tensor descriptors can load a and w: where wgmma or tcgen05 multiply."""
    return problem.aligned and device.capability[0] in (9, 10)


def takes_descriptors(problem: Problem, tiles: int, device: Device) -> bool:
    """Whether tensor descriptors load a and w: not on Hopper, elsewhere where they can and tiles are a wave or more.

    They give the main loop about a fifth fewer instructions, and the host two encodings to make or find. On an H100 no
    wall time won by it (``benchmarks/results/nvidia-h100-80gb-hbm3-2026-11-24.json``: ``ours-triton``, which took them,
    beside ``ours-publish``, which took pointers in the same tile). At all 32 shapes they were behind, by 33 to 125 µs a
    forward, of which 31 to 42 were not theirs, and not by less in launches of 2.6 ms than of 0.1. On Blackwell they
    wait to be measured.
    """
    return device.capability[0] == 10 and can_describe(problem, device) and tiles >= device.sms


MAX_PRODUCERS = 8


def default_schedule(problem: Problem, config: TileConfig, device: Device) -> ScheduleConfig:
    """RECOMPUTE for one or two columns of tiles, PRODUCE while SMs are idle anyway, RECOMPUTE for about one wave, where
    nothing is left to do when publishers are done, else PUBLISH.

    A model of the launch (unit: a plain tile; u adds a tenth at rank 16, a quarter at rank 64; 132 SMs) gives,
    over the plain GEMM and for 4096 columns of output in tiles of 256:

        tokens      RECOMPUTE    PUBLISH      PRODUCE
        128, 512    1.14, 1.29   1.14, 1.29   1.04, 1.04   tiles and producers run side by side
        2048        1.14, 1.29   1.09, 1.17   1.08, 1.08
        8192        1.14, 1.29   1.05, 1.07   1.08, 1.08   producers cost time of their own

    One program computes one tile. Programs that took tickets until none are left would compute the same tiles in the
    same order; compiled so for 8.0, 9.0 and 10.0, the kernel needed 33 to 106 registers more at rank 16, and spilled up
    to 200 bytes at rank 64.
    """
    rows, tiles = -(-problem.M // config.BLOCK_M), _tiles(problem, config.BLOCK_M, config.BLOCK_P)
    descriptors = takes_descriptors(problem, tiles, device)
    if tiles <= 2 * rows:
        return ScheduleConfig(Schedule.RECOMPUTE, descriptors=descriptors)
    idle = (device.sms - tiles) // rows
    if idle >= 1:
        return ScheduleConfig(Schedule.PRODUCE, min(idle, MAX_PRODUCERS, -(-problem.Q // config.BLOCK_Q)))
    alone = tiles <= device.sms and problem.R <= config.BLOCK_R
    return ScheduleConfig(Schedule.RECOMPUTE if alone else Schedule.PUBLISH, descriptors=descriptors)


def default_reduction(rank: int, itemsize: int, device: Device) -> ReductionConfig:
    """Steps of 8 KB: 64 columns, so that every row gives whole cache lines and a thread holds few accumulators.

    Three steps are on their way at once where matrix instructions read their operands from shared memory, else two.
    One reading of the columns serves as many ranks as never spill. For 128 ranks Blackwell needs eight warps, as
    compiling showed.
    """
    from_shared_memory = device.capability[0] in (9, 10)
    ranks = block_r(rank, 128 if itemsize == 2 else 64)
    warps = 8 if device.capability[0] >= 10 and ranks == 128 else 4
    config = ReductionConfig(128 // itemsize, 64, ranks, warps, 4 if from_shared_memory else 3)
    while _reduction_buffers(config, itemsize) > device.shared_memory and config.num_stages > 1:
        config = replace(config, num_stages=config.num_stages - 1)
    return config


def fits_reduction(config: ReductionConfig, problem: ReductionProblem, device: Device) -> bool:
    """As :func:`fits`, for ``adapter_grad.py``."""
    accumulators = config.BLOCK_C * config.BLOCK_R // (config.num_warps * 32)
    return _reduction_buffers(config, problem.itemsize) <= device.shared_memory and accumulators <= 128


def _reduction_buffers(config: ReductionConfig, itemsize: int) -> int:
    return config.num_stages * config.BLOCK_M * (config.BLOCK_C + config.BLOCK_R) * itemsize


# programs that keep enough loads on their way for an SM, the fewest rows worth a program's start, and the most parts
# that one program sums at the end in little time
PROGRAMS = 4
LEAST_ROWS = 512
MOST_PARTS = 32


def reduction_parts(config: ReductionConfig, rows: int, tiles: int, itemsize: int, device: Device) -> int:
    """Into how many parts to split the rows: as many as run at once, so that no second wave waits for the first.

    The reduction is as fast as its loads are many. An SM gets up to PROGRAMS programs, fewer where their buffers fill
    its shared memory, and at least half as many unless the rows run out.
    """
    places = max(device.shared_memory // _reduction_buffers(config, itemsize), 1)
    at_once = min(PROGRAMS, places) * device.sms
    return max(min(at_once // max(tiles, 1), rows // LEAST_ROWS, MOST_PARTS), 1)


# Triton's interpreter runs a program at a time: small tiles, so that small cases still have several of them, and tails
INTERPRETER = Device((0, 0), shared_memory=1 << 20, sms=8, name="Triton's interpreter")
INTERPRETER_TILE = TileConfig(BLOCK_M=32, BLOCK_P=32, BLOCK_Q=32, BLOCK_R=16, GROUP_M=2, num_warps=4, num_stages=1)
INTERPRETER_DECODE = DecodeConfig(32, 32, BLOCK_R=16, SPLIT=3, SPLIT_H=2, num_warps=4, num_stages=1)
INTERPRETER_REDUCTION = ReductionConfig(BLOCK_M=32, BLOCK_C=32, BLOCK_R=16, num_warps=4, num_stages=1)
INTERPRETER_PARTS = 2
