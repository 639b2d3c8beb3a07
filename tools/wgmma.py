"""``python -m tools.wgmma`` writes csrc/cuda/device/wgmma.cuh: wgmma of 16-bit types, in the kernels' widths.

An instruction names every register of its sums, 4 to 128 of them, which C++ cannot spell as a loop.
"""

from __future__ import annotations

from pathlib import Path

HEADER = Path(__file__).parents[1] / "csrc" / "cuda" / "device" / "wgmma.cuh"
# columns of a product: ranks of a thin one, tiles of out
WIDTHS = (16, 32, 64, 128, 256)
TYPES = {"BFloat16": "bf16", "Half": "f16"}

OPENING = """\
// Written by tools/wgmma.py.
// wgmma m64nNk16: acc (64 × N) += a (64 × 16) b (16 × N) by a warpgroup, which goes on at once.
// A lane's part of acc: rows r = 16 · warp + lane / 4 and r + 8, columns c = 8 · j + lane % 4 · 2 and
// c + 1, for each j: acc[4 · j], [4 · j + 1] are at (r, c), (r, c + 1), the next two in row r + 8.
// multiply_registers: a lane's four registers of a, as mma.m16n8k16 has them.
// B_TRANSPOSED: b's tile is contiguous along N, not along k.  A_TRANSPOSED: a's along its rows.
// accumulate: false sets acc.  tests/cuda_shim/wgmma.cuh has the same names for a host compiler.
// clang-format off
#pragma once

#include "hopper.cuh"

namespace fused_lora::cuda {

template <int N, typename Element, bool B_TRANSPOSED, bool A_TRANSPOSED = false>
struct Wgmma;
"""


def product(width: int, element: str, b_transposed: bool, a_transposed: bool) -> str:
    sums = width // 2
    acc = ", ".join(f"%{i}" for i in range(sums))
    outputs = ", ".join(f'"+f"(acc[{i}])' for i in range(sums))
    name = f"wgmma.mma_async.sync.aligned.m64n{width}k16.f32.{TYPES[element]}.{TYPES[element]}"

    def method(signature: str, operands: str, inputs: str, count: int, transposed: str) -> str:
        return f"""\
  __device__ static void {signature} {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{sums + count}, 0;\\n"
                 "{name} {{{acc}}}, {operands}, p, 1, 1{transposed};\\n}}"
                 : {outputs}
                 : {inputs}, "r"(static_cast<int>(accumulate)));
  }}
"""

    a, b = int(a_transposed), int(b_transposed)
    methods = method(
        f"multiply(float (&acc)[{sums}], uint64_t a, uint64_t b, bool accumulate)",
        f"%{sums}, %{sums + 1}", '"l"(a), "l"(b)', 2, f", {a}, {b}",
    )  # fmt: skip
    if not a_transposed:
        registers = ", ".join(f"%{sums + i}" for i in range(4))
        methods += method(
            f"multiply_registers(float (&acc)[{sums}], const uint32_t (&a)[4], uint64_t b, bool accumulate)",
            f"{{{registers}}}, %{sums + 4}", '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)', 5, f", {b}",
        )  # fmt: skip
    flags = ", ".join(str(flag).lower() for flag in (b_transposed, a_transposed))
    return f"template <>\nstruct Wgmma<{width}, {element}, {flags}> {{\n{methods}}};\n"


def header() -> str:
    both = (False, True)
    products = [
        product(width, element, b, a)
        for width in WIDTHS
        for element in TYPES
        for b in both
        for a in both
        if not a or width <= 128
    ]
    return OPENING + "".join(products) + "\n}  // namespace fused_lora::cuda\n"


if __name__ == "__main__":
    HEADER.write_text(header())
