"""What each way to compute a LoRA layer reads, writes and multiplies, launch by launch: arithmetic, nothing measured.

Every launch reads its operands from memory once and writes its result once; what caches save between launches is not
counted. So these are the fewest bytes for that order of launches.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

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
    M, K, N, R, size = astuple(layer)
    low_rank = 2 * M * R * (K + N)
    base = _launch("x Wᵀ", 2 * M * K * N, M * K + K * N, M * N, size)
    if way == FROZEN:
        return [base]
    if way == OURS:
        return [_launch("all of it", 2 * M * K * N + low_rank, M * K + K * N + R * (K + N), M * N + M * R, size)]
    if way == ADDMM:
        into = _launch("y += scale · h Bᵀ", 2 * M * N * R, M * R + N * R + M * N, M * N, size)
        return [base, _h(layer, size), into]
    if way == EAGER:
        return [base, _h(layer, size), *_branch(layer, size), _launch("+", M * N, 2 * M * N, M * N, size)]
    # the adapter's branch, and the sum, in float32: what PEFT does with its default, float32 adapters
    return [
        base,
        Launch("x in float32", 0, M * K * size, M * K * 4),
        _h(layer, 4),
        *_branch(layer, 4),
        Launch("+", M * N, M * N * (size + 4), M * N * 4),
        Launch("y in 16 bits", 0, M * N * 4, M * N * size),
    ]


def backward(way: str, layer: Layer) -> list[Launch]:
    """dx, dA and dB; for the frozen linear dx alone."""
    M, K, N, R, size = astuple(layer)
    low_rank = 2 * M * R * (K + N)
    base = _launch("dy W", 2 * M * K * N, M * N + K * N, M * K, size)
    if way == FROZEN:
        return [base]
    if way == OURS:
        return [
            _launch("dx and g", 2 * M * K * N + low_rank, M * N + K * N + R * (K + N), M * K + M * R, size),
            _launch("dA and dB", low_rank, M * (K + N) + 2 * M * R, R * (K + N), size),
        ]
    if way == ADDMM:
        into = _launch("dx += g A", 2 * M * K * R, M * R + R * K + M * K, M * K, size)
        return [*_gradients(layer, size), _h(layer, size), base, into]
    wide = size if way == EAGER else 4
    launches = [
        _launch("dy · scale", M * N, M * N, M * N, wide),
        *_gradients(layer, wide),
        _launch("g A", 2 * M * K * R, M * R + R * K, M * K, wide),
        base,
        _launch("dx +", M * K, 2 * M * K, M * K, size),
    ]
    if way == EAGER:
        return launches
    narrow = Launch("dx in 16 bits", 0, M * K * 4, M * K * size)
    return [Launch("dy in float32", 0, M * N * size, M * N * 4), *launches[:-2], narrow, *launches[-2:]]


def kept(way: str, layer: Layer) -> int:
    """Bytes that are kept for the backward, without parameters."""
    x, h = layer.M * layer.K, layer.M * layer.R
    if way == PEFT:
        # x for nothing but its float32 copy: the base's weight is frozen
        return 4 * x + 4 * h
    return {FROZEN: 0, ADDMM: x, EAGER: x + h, OURS: x + h}[way] * layer.itemsize


def _launch(what: str, flops: int, reads: int, writes: int, itemsize: int) -> Launch:
    return Launch(what, flops, reads * itemsize, writes * itemsize)


def _h(layer: Layer, size: int) -> Launch:
    M, K, R = layer.M, layer.K, layer.R
    return _launch("h = x Aᵀ", 2 * M * K * R, M * K + R * K, M * R, size)


def _branch(layer: Layer, size: int) -> list[Launch]:
    """scale · h Bᵀ."""
    M, N, R = layer.M, layer.N, layer.R
    product = _launch("h Bᵀ", 2 * M * N * R, M * R + N * R, M * N, size)
    return [product, _launch("· scale", M * N, M * N, M * N, size)]


def _gradients(layer: Layer, size: int) -> list[Launch]:
    """g = dy B, dA = gᵀ x, dB = dyᵀ h."""
    M, K, N, R = layer.M, layer.K, layer.N, layer.R
    return [
        _launch("g = dy B", 2 * M * N * R, M * N + N * R, M * R, size),
        _launch("gᵀ x", 2 * M * K * R, M * R + M * K, R * K, size),
        _launch("dyᵀ h", 2 * M * N * R, M * N + M * R, N * R, size),
    ]
