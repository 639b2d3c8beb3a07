"""The one table of shapes that are timed, most valuable first."""

from __future__ import annotations

from dataclasses import dataclass

FORWARD = "forward"  # no gradients
STEP = "step"  # forward and backward: dx, dA, dB
TRAIN = "train"  # a network's training step, optimizer included
WORKS = (FORWARD, STEP, TRAIN)


@dataclass(frozen=True)
class Shape:
    """A layer at work: x (M, K), weight (N, K), rank R.

    tags: "cpu" and "gpu" say where it is timed, "quick" that a quick run takes it too.
    """

    name: str
    M: int
    K: int
    N: int
    R: int
    tags: tuple[str, ...]
    works: tuple[str, ...] = (FORWARD, STEP)
    bias: bool = False

    def __str__(self) -> str:
        return f"{self.name} (M={self.M} K={self.K} N={self.N} R={self.R})"

    def flops(self, work: str, lora: bool) -> int:
        """Multiplications and additions that the formulas ask for, however a candidate computes them."""
        base, thin = 2 * self.M * self.K * self.N, 2 * self.M * self.R * (self.K + self.N)
        if work == FORWARD:
            return base + (thin if lora else 0)
        # dx costs the same again, and so do dA and dB together
        return 2 * base + (3 * thin if lora else 0)

    def bytes(self, work: str, itemsize: int, lora: bool) -> int:
        """The fewest bytes that memory must move: operands read once and results written once, by each pass."""
        base, thin = self.M * (self.K + self.N) + self.K * self.N, self.R * (self.K + self.N)
        if work == FORWARD:
            return (base + (thin if lora else 0)) * itemsize
        # x is read again for dA
        return (2 * base + (3 * thin + self.M * self.K if lora else 0)) * itemsize


_CPU, _GPU = ("cpu",), ("gpu",)
_CPU_QUICK, _GPU_QUICK = ("cpu", "quick"), ("gpu", "quick")
_DECODE = (FORWARD,)

SHAPES = (
    Shape("headline", 8192, 4096, 4096, 16, _GPU_QUICK),
    Shape("square-2048", 512, 2048, 2048, 16, _CPU),
    Shape("decode-4096-m1", 1, 4096, 4096, 16, _GPU_QUICK, _DECODE),
    Shape("decode-2048-m1", 1, 2048, 2048, 16, _CPU_QUICK, _DECODE),
    Shape("richboynet-1", 10, 784, 1000, 1, _CPU_QUICK, bias=True),
    Shape("richboynet-2", 10, 1000, 2000, 1, _CPU_QUICK, bias=True),
    Shape("richboynet-3", 10, 2000, 10, 1, _CPU_QUICK, bias=True),
    Shape("decode-4096-m16", 16, 4096, 4096, 16, _GPU, _DECODE),
    Shape("decode-4096-m4", 4, 4096, 4096, 16, _GPU, _DECODE),
    Shape("llama-8b-up", 8192, 4096, 14336, 16, _GPU),
    Shape("llama-8b-down", 8192, 14336, 4096, 16, _GPU),
    Shape("llama-8b-kv", 8192, 4096, 1024, 16, _GPU),
    Shape("square-4096-r8", 8192, 4096, 4096, 8, _GPU),
    Shape("square-4096-r32", 8192, 4096, 4096, 32, _GPU),
    Shape("square-4096-r64", 8192, 4096, 4096, 64, _GPU),
    Shape("square-4096-r128", 8192, 4096, 4096, 128, _GPU),
    Shape("square-4096-m512", 512, 4096, 4096, 16, _GPU),
    Shape("square-4096-m2048", 2048, 4096, 4096, 16, _GPU),
    Shape("square-4096-m16384", 16384, 4096, 4096, 16, _GPU),
    Shape("llama-7b-up", 4096, 4096, 11008, 16, _GPU),
    Shape("llama-7b-down", 4096, 11008, 4096, 16, _GPU),
    Shape("llama-70b-qo", 4096, 8192, 8192, 16, _GPU),
    Shape("llama-70b-kv", 4096, 8192, 1024, 16, _GPU),
    Shape("llama-70b-up", 4096, 8192, 28672, 64, _GPU),
    Shape("llama-70b-down", 4096, 28672, 8192, 64, _GPU),
    Shape("decode-70b-up-m1", 1, 8192, 28672, 16, _GPU, _DECODE),
    Shape("decode-70b-up-m16", 16, 8192, 28672, 16, _GPU, _DECODE),
)


def select(device_type: str, quick: bool = False) -> list[Shape]:
    """What is timed on "cpu" or "cuda", in the table's order."""
    place = "gpu" if device_type == "cuda" else "cpu"
    return [shape for shape in SHAPES if place in shape.tags and (not quick or "quick" in shape.tags)]
