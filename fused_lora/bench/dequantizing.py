"""What dequantizing a 4-bit weight takes: our kernel and bitsandbytes', on the same bytes."""

from __future__ import annotations

import copy

import torch

from .. import backends
from ..backends import four_bits
from ..quantized import KINDS
from ..quantized.bitsandbytes import by_our_kernel, by_the_library
from .baselines import OURS_PREFIX
from .shapes import DEQUANTIZE
from .workloads import Candidate, parse_dtype

LIBRARY, OURS = "bitsandbytes", f"{OURS_PREFIX}triton"
_WAYS = {LIBRARY: by_the_library, OURS: by_our_kernel}
# N, K of the largest and of the commonest weight of Llama 3 8B
SIZES = {"cuda": ((14336, 4096), (4096, 4096)), "cpu": ((64, 128),)}


class DequantizeWorkload:
    """NF4 in blocks of 64, with double quantization, into a new (N, K) of dtype."""

    pass_, first, copies, names = DEQUANTIZE, False, 1, (OURS, LIBRARY)
    longest_sum = 1

    def __init__(self, N: int, K: int, dtype: str, device: torch.device) -> None:
        self.label, self.dtype, self.device = f"nf4-{N}x{K} (K={K} N={N}, double quantization)", dtype, device
        self._shape, self._bits = (N, K), four_bits.random((N, K), device)

    def adapted(self, name: str) -> bool:
        return False

    def ours(self) -> str:
        return OURS

    def why_not(self, name: str) -> str | None:
        dtype = parse_dtype(self.dtype)[0]
        return backends.why_not("triton", self.device, dtype) if name == OURS else KINDS["4-bit"].problem()

    def candidate(self, name: str) -> Candidate:
        dtype, bits = parse_dtype(self.dtype)[0], self._bits
        if name not in _WAYS:
            return Candidate(lambda: {"W": four_bits.plain(bits, self._shape, dtype)}, ())
        if name == LIBRARY:
            # which registers its operators
            import bitsandbytes  # noqa: F401
        recipe = ("4-bit", bits.blocksize, "nf4", self._shape, bits.blocksize2)
        tensors = tuple(part for part in bits if isinstance(part, torch.Tensor))
        return Candidate(lambda: {"W": _WAYS[name](recipe, tensors, dtype)}, ())

    def exact(self) -> DequantizeWorkload:
        exact = copy.copy(self)
        exact.dtype = "float64"
        return exact

    def useful(self, name: str) -> tuple[int, int]:
        """No arithmetic to speak of; every byte that is kept, and of the result."""
        numel = self._shape[0] * self._shape[1]
        kept = sum(part.nbytes for part in self._bits if isinstance(part, torch.Tensor))
        return 0, kept + numel * parse_dtype(self.dtype)[0].itemsize
