"""The one table of shapes that are timed, most valuable first."""

from __future__ import annotations

from dataclasses import dataclass

FORWARD = "forward"  # no gradients
BACKWARD = "backward"  # dx, dA, dB of a forward that is not timed
STEP = "step"  # forward and backward
DECODE = "decode"  # forward of up to 16 tokens, no gradients
TRAIN = "train"  # a network's training step, optimizer included
DEQUANTIZE = "dequantize"  # a 4-bit weight into 16 bits; no pass of a layer
PASSES = (FORWARD, BACKWARD, STEP, DECODE, TRAIN)
_LAYER, _DECODE = (FORWARD, BACKWARD, STEP), (DECODE,)


@dataclass(frozen=True)
class Shape:
    """A layer as it runs: x (M, K), weight (N, K), rank R.

    tags: "cpu", "gpu" and "dry" (kernels interpreted) say where it is timed, "first" that it comes before the others
    in every dtype, "quick" that a quick run takes it too.
    """

    name: str
    M: int
    K: int
    N: int
    R: int
    tags: tuple[str, ...]
    passes: tuple[str, ...] = _LAYER
    bias: bool = False

    def __str__(self) -> str:
        return f"{self.name} (M={self.M} K={self.K} N={self.N} R={self.R})"

    def flops(self, pass_: str, lora: bool) -> int:
        """Multiplications and additions that the formulas ask for, however a candidate computes them."""
        if pass_ == STEP:
            return self.flops(FORWARD, lora) + self.flops(BACKWARD, lora)
        base, low_rank = 2 * self.M * self.K * self.N, 2 * self.M * self.R * (self.K + self.N)
        # of the backward's low-rank products, half are for dx and half for dA and dB
        return base + (0 if not lora else 2 * low_rank if pass_ == BACKWARD else low_rank)

    def bytes(self, pass_: str, itemsize: int, lora: bool) -> int:
        """The fewest bytes that memory must move: operands read once and results written once, by each pass."""
        if pass_ == STEP:
            return self.bytes(FORWARD, itemsize, lora) + self.bytes(BACKWARD, itemsize, lora)
        base, low_rank = self.M * (self.K + self.N) + self.K * self.N, self.R * (self.K + self.N)
        # x is read again for dA
        adapter = 2 * low_rank + self.M * self.K if pass_ == BACKWARD else low_rank
        return (base + (adapter if lora else 0)) * itemsize


# in_features, out_features of the linear layers of a block
MODEL_LAYERS = {
    "llama-7b": {"qkvo": (4096, 4096), "up": (4096, 11008), "down": (11008, 4096)},
    "llama-8b": {"qo": (4096, 4096), "kv": (4096, 1024), "up": (4096, 14336), "down": (14336, 4096)},
    "llama-70b": {"qo": (8192, 8192), "kv": (8192, 1024), "up": (8192, 28672), "down": (28672, 8192)},
}

_CPU, _GPU, _DRY = ("cpu",), ("gpu",), ("dry",)
_CPU_QUICK = ("cpu", "quick")
_FIRST, _FIRST_QUICK = ("gpu", "first"), ("gpu", "first", "quick")


def _layer(model: str, layer: str, M: int, R: int) -> Shape:
    """Up to 16 tokens are decoded, without gradients."""
    K, N = MODEL_LAYERS[model][layer]
    return Shape(f"{model}-{layer}-m{M}-r{R}", M, K, N, R, _GPU, _DECODE if M <= 16 else _LAYER)


SHAPES = (
    Shape("headline", 8192, 4096, 4096, 16, _FIRST_QUICK),
    Shape("square-2048", 512, 2048, 2048, 16, _CPU),
    Shape("decode-4096-m1", 1, 4096, 4096, 16, _FIRST_QUICK, _DECODE),
    Shape("decode-2048-m1", 1, 2048, 2048, 16, _CPU_QUICK, _DECODE),
    Shape("richboynet-1", 10, 784, 1000, 1, _CPU_QUICK, bias=True),
    Shape("richboynet-2", 10, 1000, 2000, 1, _CPU_QUICK, bias=True),
    Shape("richboynet-3", 10, 2000, 10, 1, _CPU_QUICK, bias=True),
    Shape("decode-4096-m16", 16, 4096, 4096, 16, _FIRST, _DECODE),
    Shape("decode-4096-m4", 4, 4096, 4096, 16, _FIRST, _DECODE),
    _layer("llama-8b", "up", 8192, 16),
    _layer("llama-8b", "down", 8192, 16),
    _layer("llama-8b", "kv", 8192, 16),
    _layer("llama-8b", "qo", 512, 16),
    _layer("llama-8b", "qo", 2048, 16),
    _layer("llama-8b", "qo", 8192, 64),
    _layer("llama-8b", "up", 1, 16),
    _layer("llama-70b", "up", 4096, 64),
    _layer("llama-8b", "qo", 8192, 8),
    _layer("llama-8b", "qo", 8192, 32),
    _layer("llama-8b", "qo", 8192, 128),
    _layer("llama-8b", "qo", 16384, 16),
    _layer("llama-70b", "qo", 4096, 16),
    _layer("llama-70b", "kv", 4096, 16),
    _layer("llama-70b", "down", 4096, 64),
    _layer("llama-70b", "up", 16, 16),
    _layer("llama-70b", "up", 1, 16),
    _layer("llama-8b", "down", 1, 16),
    _layer("llama-8b", "kv", 64, 16),
    _layer("llama-8b", "up", 128, 16),
    _layer("llama-7b", "up", 4096, 16),
    _layer("llama-7b", "down", 4096, 16),
    # where kernels are interpreted: they are timed to test every step that makes a GPU's table
    Shape("dry", 20, 128, 136, 4, _DRY, bias=True),
    Shape("dry-decode", 3, 128, 136, 4, _DRY, _DECODE),
)


def select(place: str, quick: bool = False) -> list[Shape]:
    """What is timed at a place, "cpu", "gpu" or "dry", in the table's order."""
    return [shape for shape in SHAPES if place in shape.tags and (not quick or "quick" in shape.tags)]
