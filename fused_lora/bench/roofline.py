"""The peak rates of known GPUs, and the share of them that a time reaches. Unknown GPUs have none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """From the vendor's datasheet: TFLOP/s of dense 16-bit matrix products summed in float32, and GB/s of memory."""

    tflops: float
    gb_per_s: float

    def share(self, flops: int, moved_bytes: int, ms: float) -> float:
        """The least time for this arithmetic and this traffic, whichever takes longer, over the time that it took."""
        return max(flops / self.tflops * 1e-9, moved_bytes / self.gb_per_s * 1e-6) / ms


# by the driver's name
PEAKS = {
    "NVIDIA A10": Peak(125.0, 600.0),
    "NVIDIA A100-PCIE-40GB": Peak(312.0, 1555.0),
    "NVIDIA A100-SXM4-40GB": Peak(312.0, 1555.0),
    "NVIDIA A100 80GB PCIe": Peak(312.0, 1935.0),
    "NVIDIA A100-SXM4-80GB": Peak(312.0, 2039.0),
    "NVIDIA GeForce RTX 3090": Peak(71.0, 936.0),
    "NVIDIA GeForce RTX 4090": Peak(165.2, 1008.0),
    "NVIDIA L4": Peak(121.0, 300.0),
    "NVIDIA L40S": Peak(362.0, 864.0),
    "NVIDIA H100 PCIe": Peak(756.0, 2000.0),
    "NVIDIA H100 80GB HBM3": Peak(989.0, 3350.0),
    "NVIDIA H200": Peak(989.0, 4800.0),
}


def peak_of(device: str, dtype: str) -> Peak | None:
    """None for an unknown GPU, and for a base in float32, whose rate depends on how it may be rounded."""
    return None if dtype.startswith("float32") else PEAKS.get(device)
