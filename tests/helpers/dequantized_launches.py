"""A process that holds repeated launches of the dequantizing kernel to those through Triton's JIT: ``… FOLDER``.

FOLDER has the stub of libcuda. Nothing is computed: what reaches the launcher is compared, parameter by parameter.
"""

import sys
from pathlib import Path

import torch
from planned_launches import Recorder

from fused_lora.backends.four_bits import FourBits
from fused_lora.backends.triton import launch_dequantize
from fused_lora.backends.triton.launch_dequantize import dequantize_4bit
from fused_lora.bench.host import stub


def draw(N, K, dtype, double, later=0):
    """later: bytes of q's memory before q."""
    q = torch.zeros(later + (N * K + 1) // 2, dtype=torch.uint8)[later:]
    code, blocks, out = torch.zeros(16), -(-N * K // 64), torch.empty(N, K, dtype=dtype)
    if not double:
        return FourBits(q, code, torch.zeros(blocks), 64), out
    scales = torch.zeros(blocks, dtype=torch.uint8), 64, torch.zeros(-(-blocks // 256)), torch.zeros(256)
    return FourBits(q, code, *scales, torch.tensor(0.0), 256), out


def main():
    stub.install(Path(sys.argv[1]))
    torch.set_num_threads(1)
    recorder = Recorder()

    def launched(bits, out):
        launches, jit, _ = recorder.of(lambda: dequantize_4bit(bits, out), [*bits, out])
        return launches, jit

    for double in (False, True):
        for N, K in ((64, 128), (72, 104), (41, 123)):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                launched(*draw(N, K, dtype, double))
                # of another layer of that size
                operands = draw(N, K, dtype, double)
                straight, jit = launched(*operands)
                assert (len(straight), jit) == (1, 0)
                launch_dequantize._kept.clear()
                assert launched(*operands) == (straight, 1)
    # within a word, and where a pointer is no multiple of 16
    for later in (1, 4, 20):
        operands = draw(64, 128, torch.bfloat16, True, later)
        for _ in range(2):
            assert launched(*operands)[1] == 1


if __name__ == "__main__":
    main()
