"""A model of how long a layer takes on a GPU: a roofline, its inputs and assumptions in the open. Not a measurement.

A launch takes as long as its arithmetic or its memory traffic (``traffic.py``), whichever is longer, at a stated share
of what the datasheet promises, and a fixed time to start. Nothing is known here of caches, of waves, or of waiting, so
the model is a floor: where it errs, it should err low.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.configs import DECODE_ROWS, Device, Form, Problem, block_r, default_config, default_schedule
from . import traffic
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
    """The one that the driver calls so, whose short name is in the driver's."""
    return next((gpu for gpu in GPUS if (gpu.name.removesuffix(" SXM").removesuffix(" 80 GB")) in device), None)


def forward_ms(way: str, layer: Layer, gpu: Gpu) -> float:
    return _ms(_kernels(way, traffic.forward(way, layer), layer, gpu, (layer.N, layer.K)), gpu)


def step_ms(way: str, layer: Layer, gpu: Gpu) -> float:
    """Forward and backward."""
    backward = _kernels(way, traffic.backward(way, layer), layer, gpu, (layer.K, layer.N))
    return forward_ms(way, layer, gpu) + _ms(backward, gpu)


def _ms(launches: list[Launch], gpu: Gpu) -> float:
    total = 0.0
    for launch in launches:
        arithmetic = launch.flops / (gpu.tflops * GEMM_SHARE) * 1e-9
        memory = launch.moved / (gpu.gb_per_s * MEMORY_SHARE) * 1e-6
        total += max(arithmetic, memory) + START_US * 1e-3
    return total


def _kernels(way: str, launches: list[Launch], layer: Layer, gpu: Gpu, sides: tuple[int, int]) -> list[Launch]:
    """The launches with the arithmetic that the hardware does for them, padding and repetition included."""
    if way != OURS:
        return launches
    first, *rest = launches
    P, Q = sides
    return [Launch(first.what, _fused_flops(layer, gpu, P, Q), first.reads, first.writes), *rest]


def _fused_flops(layer: Layer, gpu: Gpu, P: int, Q: int) -> int:
    """Of the one kernel, by the rules that choose its tile and its form for this GPU."""
    M, R = layer.M, layer.R
    width = block_r(R)
    padded = -(-R // width) * width
    if M <= DECODE_ROWS:
        # memory decides; the tokens are padded to one tile
        return 2 * DECODE_ROWS * (P * Q + padded * (P + Q))
    problem = Problem(M, P, Q, R, layer.itemsize, layer.itemsize)
    tile = default_config(problem, gpu.device)
    form = default_schedule(problem, tile, gpu.device).form
    columns = -(-P // tile.BLOCK_P) if form == Form.RECOMPUTE else 1
    return 2 * M * (P * Q + padded * (Q * columns + P))
