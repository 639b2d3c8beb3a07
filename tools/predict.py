"""A model of how long a layer takes on a GPU: a roofline, its inputs and assumptions in the open. Not a measurement.

A launch takes as long as its arithmetic or its memory traffic (``traffic.py``), whichever is longer, at a stated share
of what the datasheet promises, and a fixed time to start. The base product's arithmetic comes in whole tiles, so an
SM that has one more than the others is waited for; the tiles are those of our rules for every way, and a frozen
linear's library may choose better. What the offline compile found (``compiled.py``) gives the pace of our main loop.
Nothing is known here of caches, of waiting or of the host, so it is mostly a lower bound: where it errs, it should err
low. How far it errs, ``tables/model_error.py`` says of every GPU that was measured. ``impl="auto"`` goes by measured
times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fused_lora.backends.triton.configs import (
    Device,
    Problem,
    Schedule,
    TileConfig,
    block_r,
    default_config,
    default_schedule,
)
from fused_lora.backends.triton.decode_configs import takes_decode, tile_rows
from fused_lora.bench.results import Row

from . import compiled, traffic
from .traffic import OURS, Launch, Layer


@dataclass(frozen=True)
class Gpu:
    """From the vendor's datasheet: TFLOP/s of dense 16-bit products summed in float32, GB/s of memory."""

    name: str
    tflops: float
    gb_per_s: float
    device: Device


GPUS = (
    Gpu("A100 80 GB SXM", 312, 2039, Device((8, 0), 166912, 108)),
    Gpu("H100 SXM", 989, 3350, Device((9, 0), 232448, 132)),
    Gpu("RTX 4090", 165.2, 1008, Device((8, 9), 101376, 128)),
)
# what a good GEMM reaches of the datasheet's rate, what a good copy does of the memory's
GEMM_SHARE = 0.7
MEMORY_SHARE = 0.85
# between the end of a launch and the next one's first load
START_US = 2.0


def gpu_called(device: str) -> Gpu | None:
    """The GPU whose short name is part of the driver's name for it."""
    return next((gpu for gpu in GPUS if (gpu.name.removesuffix(" SXM").removesuffix(" 80 GB")) in device), None)


@dataclass(frozen=True)
class Grid:
    """The base product of one pass in tiles. found: what the offline compile says of our launch, if anything."""

    tile: TileConfig
    schedule: Schedule
    tiles: int
    sms: int
    found: Row | None

    @property
    def rounded(self) -> float:
        """The tiles of the busiest SM over the mean of all."""
        return -(-self.tiles // self.sms) * self.sms / self.tiles

    @property
    def pace(self) -> float:
        return compiled.pace(self.found)


FORWARD, INPUT_GRADIENT = "forward", "input gradient"


def grid_of(pass_: str, layer: Layer, gpu: Gpu, known: Sequence[Row] = ()) -> Grid | None:
    """The tiles, by the rules that choose a tile and a schedule; None for decode, where memory decides."""
    P, Q = (layer.N, layer.K) if pass_ == FORWARD else (layer.K, layer.N)
    problem = Problem(layer.M, P, Q, layer.R, layer.itemsize, layer.itemsize)
    if takes_decode(problem, gpu.device):
        return None
    tile = default_config(problem, gpu.device)
    schedule = default_schedule(problem, tile, gpu.device).kind
    major, minor = gpu.device.capability
    found = compiled.find(known, 10 * major + minor, pass_, tile, schedule.name, layer.R)
    tiles = -(-layer.M // tile.BLOCK_M) * -(-P // tile.BLOCK_P)
    return Grid(tile, schedule, tiles, gpu.device.sms, found)


def forward_ms(way: str, layer: Layer, gpu: Gpu, known: Sequence[Row] = ()) -> float:
    return _ms(FORWARD, way, traffic.forward(way, layer), layer, gpu, known)


def step_ms(way: str, layer: Layer, gpu: Gpu, known: Sequence[Row] = ()) -> float:
    """Forward and backward."""
    backward = _ms(INPUT_GRADIENT, way, traffic.backward(way, layer), layer, gpu, known)
    return forward_ms(way, layer, gpu, known) + backward


def _ms(pass_: str, way: str, launches: list[Launch], layer: Layer, gpu: Gpu, known: Sequence[Row]) -> float:
    grid = grid_of(pass_, layer, gpu, known)
    total = 0.0
    for launch in launches:
        flops: float = launch.flops
        if launch.what in traffic.BASES:
            if way == OURS:
                flops = _fused_flops(pass_, layer, grid) * (1.0 if grid is None else grid.pace)
            flops *= 1.0 if grid is None else grid.rounded
        arithmetic = flops / (gpu.tflops * GEMM_SHARE) * 1e-9
        memory = launch.moved / (gpu.gb_per_s * MEMORY_SHARE) * 1e-6
        total += max(arithmetic, memory) + START_US * 1e-3
    return total


def _fused_flops(pass_: str, layer: Layer, grid: Grid | None) -> int:
    """Floating-point operations of our one kernel, padding and repetition included."""
    P, Q = (layer.N, layer.K) if pass_ == FORWARD else (layer.K, layer.N)
    width = block_r(layer.R)
    padded = -(-layer.R // width) * width
    if grid is None:
        # the tokens are padded to whole tiles
        rows = tile_rows(layer.M)
        return 2 * -(-layer.M // rows) * rows * (P * Q + padded * (P + Q))
    columns = -(-P // grid.tile.BLOCK_P) if grid.schedule == Schedule.RECOMPUTE else 1
    return 2 * layer.M * (P * Q + padded * (Q * columns + P))
