"""What each way to compute a LoRA layer reads, writes and multiplies, launch by launch: arithmetic, nothing measured.

Every launch reads its operands from memory once and writes its result once; what caches save between launches is not
counted. So these are the fewest bytes for that order of launches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# the launches that multiply with W
BASES = "x Wᵀ", "dy W", "all of it", "dx and g"
OURS, FROZEN, ADDMM, EAGER, PEFT = "ours", "frozen", "addmm", "eager", "peft, fp32 adapters"


@dataclass(frozen=True)
class Layer:
    """x (M, K), weight (N, K), rank R; itemsize: bytes of an element of x, W, A and B."""

    M: int
    K: int
    N: int
    R: int
    itemsize: int = 2


@dataclass(frozen=True)
class Launch:
    """flops: multiplications and additions. reads, writes: bytes."""

    what: str
    flops: int
    reads: int
    writes: int

    @property
    def moved(self) -> int:
        return self.reads + self.writes


def forward(way: str, layer: Layer) -> list[Launch]:
    return _FORWARD[way](layer)


def backward(way: str, layer: Layer) -> list[Launch]:
    """dx, dA and dB; for the frozen linear dx alone."""
    return _BACKWARD[way](layer)


def kept(way: str, layer: Layer) -> int:
    """Bytes that are kept for the backward, without parameters."""
    x, h = layer.M * layer.K, layer.M * layer.R
    if way == PEFT:
        # x for nothing but its float32 copy: the base's weight is frozen
        return 4 * x + 4 * h
    return {FROZEN: 0, ADDMM: x, EAGER: x + h, OURS: x + h}[way] * layer.itemsize


def _launch(what: str, flops: int, reads: int, writes: int, itemsize: int) -> Launch:
    return Launch(what, flops, reads * itemsize, writes * itemsize)


def _base(layer: Layer) -> Launch:
    M, K, N = layer.M, layer.K, layer.N
    return _launch("x Wᵀ", 2 * M * K * N, M * K + K * N, M * N, layer.itemsize)


def _low_rank_forward(layer: Layer, itemsize: int) -> Launch:
    M, K, R = layer.M, layer.K, layer.R
    return _launch("h = x Aᵀ", 2 * M * K * R, M * K + R * K, M * R, itemsize)


def _frozen_forward(layer: Layer) -> list[Launch]:
    return [_base(layer)]


def _ours_forward(layer: Layer) -> list[Launch]:
    M, K, N, R = layer.M, layer.K, layer.N, layer.R
    flops = 2 * M * K * N + 2 * M * R * (K + N)
    return [_launch("all of it", flops, M * K + K * N + R * (K + N), M * N + M * R, layer.itemsize)]


def _addmm_forward(layer: Layer) -> list[Launch]:
    M, N, R = layer.M, layer.N, layer.R
    into = _launch("y += scale · h Bᵀ", 2 * M * N * R, M * R + N * R + M * N, M * N, layer.itemsize)
    return [_base(layer), _low_rank_forward(layer, layer.itemsize), into]


def _eager_forward(layer: Layer) -> list[Launch]:
    M, N, R, size = layer.M, layer.N, layer.R, layer.itemsize
    return [
        _base(layer),
        _low_rank_forward(layer, size),
        _launch("h Bᵀ", 2 * M * N * R, M * R + N * R, M * N, size),
        _launch("· scale", M * N, M * N, M * N, size),
        _launch("+", M * N, 2 * M * N, M * N, size),
    ]


def _peft_forward(layer: Layer) -> list[Launch]:
    """The adapter's branch, and the sum, in float32: what PEFT does with its default, float32 adapters."""
    M, K, N, R, size = layer.M, layer.K, layer.N, layer.R, layer.itemsize
    return [
        _base(layer),
        Launch("x in float32", 0, M * K * size, M * K * 4),
        _low_rank_forward(layer, 4),
        _launch("h Bᵀ", 2 * M * N * R, M * R + N * R, M * N, 4),
        _launch("· scale", M * N, M * N, M * N, 4),
        Launch("+", M * N, M * N * (size + 4), M * N * 4),
        Launch("y in 16 bits", 0, M * N * 4, M * N * size),
    ]


def _base_backward(layer: Layer) -> Launch:
    M, K, N = layer.M, layer.K, layer.N
    return _launch("dy W", 2 * M * K * N, M * N + K * N, M * K, layer.itemsize)


def _low_rank_backward(layer: Layer, itemsize: int) -> list[Launch]:
    """g = dy B, dA = gᵀ x, dB = dyᵀ h."""
    M, K, N, R = layer.M, layer.K, layer.N, layer.R
    return [
        _launch("g = dy B", 2 * M * N * R, M * N + N * R, M * R, itemsize),
        _launch("gᵀ x", 2 * M * K * R, M * R + M * K, R * K, itemsize),
        _launch("dyᵀ h", 2 * M * N * R, M * N + M * R, N * R, itemsize),
    ]


def _frozen_backward(layer: Layer) -> list[Launch]:
    return [_base_backward(layer)]


def _ours_backward(layer: Layer) -> list[Launch]:
    M, K, N, R, size = layer.M, layer.K, layer.N, layer.R, layer.itemsize
    low_rank = 2 * M * R * (K + N)
    return [
        _launch("dx and g", 2 * M * K * N + low_rank, M * N + K * N + R * (K + N), M * K + M * R, size),
        _launch("dA and dB", low_rank, M * (K + N) + 2 * M * R, R * (K + N), size),
    ]


def _addmm_backward(layer: Layer) -> list[Launch]:
    M, K, R, size = layer.M, layer.K, layer.R, layer.itemsize
    again = _low_rank_forward(layer, size)
    into = _launch("dx += g A", 2 * M * K * R, M * R + R * K + M * K, M * K, size)
    return [*_low_rank_backward(layer, size), again, _base_backward(layer), into]


def _eager_backward(layer: Layer) -> list[Launch]:
    M, K, N, R, size = layer.M, layer.K, layer.N, layer.R, layer.itemsize
    return [
        _launch("dy · scale", M * N, M * N, M * N, size),
        *_low_rank_backward(layer, size),
        _launch("g A", 2 * M * K * R, M * R + R * K, M * K, size),
        _base_backward(layer),
        _launch("dx +", M * K, 2 * M * K, M * K, size),
    ]


def _peft_backward(layer: Layer) -> list[Launch]:
    M, K, N, R, size = layer.M, layer.K, layer.N, layer.R, layer.itemsize
    return [
        Launch("dy in float32", 0, M * N * size, M * N * 4),
        _launch("dy · scale", M * N, M * N, M * N, 4),
        *_low_rank_backward(layer, 4),
        _launch("g A", 2 * M * K * R, M * R + R * K, M * K, 4),
        Launch("dx in 16 bits", 0, M * K * 4, M * K * size),
        _base_backward(layer),
        _launch("dx +", M * K, 2 * M * K, M * K, size),
    ]


_Way = Callable[[Layer], list[Launch]]
_FORWARD: dict[str, _Way] = {
    OURS: _ours_forward, FROZEN: _frozen_forward, ADDMM: _addmm_forward, EAGER: _eager_forward, PEFT: _peft_forward,
}  # fmt: skip
_BACKWARD: dict[str, _Way] = {
    OURS: _ours_backward, FROZEN: _frozen_backward, ADDMM: _addmm_backward, EAGER: _eager_backward,
    PEFT: _peft_backward,
}  # fmt: skip
