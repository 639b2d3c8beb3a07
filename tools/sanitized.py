"""Every kernel once, in every schedule, on operands small enough for compute-sanitizer, and checked.

python -m tools.sanitized [--device cpu] [--kernel NAME]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch

from fused_lora.backends import four_bits, native
from fused_lora.backends.triton.configs import DecodeConfig, Schedule, ScheduleConfig
from fused_lora.backends.triton.entries import Choice, Reduced, Tiled
from fused_lora.backends.triton.launch_dequantize import dequantize_4bit
from fused_lora.bench.subjects import ADAPTER_GRADIENTS, FORWARD, INPUT_GRADIENT, Job, Subject, in_one_line, make

# several tiles, and an end that fills none
SIZES = {"cuda": (300, 328, 648), "cpu": (33, 72, 104)}
# the extension's portable kernels; Hopper's own, in one block of ranks and in several
RANKS = {"cuda": (20, 24, 136), "cpu": (20,)}
DTYPES = ("bfloat16", "bfloat16+float32", "float32")
# what is chosen -> the kernel that it launches, by a part of its name; the last is in all of the compiled extension's
KERNELS: dict[type[Choice] | type[None] | type[four_bits.FourBits], str] = {
    Tiled: "_lora_matmul_kernel",
    DecodeConfig: "_decode_kernel",
    Reduced: "_adapter_grad_kernel",
    four_bits.FourBits: "_dequantize_4bit_kernel",
    type(None): "fused_lora4cuda",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda")
    parser.add_argument("--kernel", choices=tuple(KERNELS.values()), help="this one alone")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    M, K, N = SIZES[device.type]
    jobs = [Job(FORWARD, 3, K, N, 8, dtype) for dtype in DTYPES]
    jobs += [
        Job(pass_, M, K, N, rank, dtype, dropout)
        for rank in RANKS[device.type]
        for dtype in DTYPES
        for dropout in (False, True)
        for pass_ in (FORWARD, INPUT_GRADIENT, ADAPTER_GRADIENTS)
    ]
    launches = wrong = 0
    for job in jobs:
        subject = make(job, device)
        for choice in _choices(subject):
            if args.kernel not in (None, KERNELS[type(choice)]):
                continue
            launches += 1
            verdict = subject.verdict(choice)
            if verdict is not None:
                wrong += 1
                print(f"failed: {job}: {in_one_line(choice)}: {verdict}")
    if args.kernel in (None, KERNELS[four_bits.FourBits]):
        for case, right in _dequantized((N, K), device):
            launches += 1
            if not right:
                wrong += 1
                print(f"failed: dequantize: {case}: other bits")
    print(f"{launches} launches of {args.kernel or 'every kernel'}: {'all right' if wrong == 0 else f'{wrong} wrong'}")
    return 1 if wrong else 0


def _dequantized(shape: tuple[int, int], device: torch.device) -> Iterator[tuple[str, bool]]:
    """Launches of the dequantizing kernel, and whether their bits are right; of the odd shape it reads bytes."""
    for N, K in (shape, (shape[0] - 1, shape[1] - 1)):
        for blocksize, double in ((32, True), (64, False), (4096, True)):
            bits = four_bits.random((N, K), device, double=double, blocksize=blocksize)
            for dtype in (torch.bfloat16, torch.float32):
                got = dequantize_4bit(bits, torch.empty(N, K, dtype=dtype, device=device))
                yield (
                    f"{N}×{K}, {blocksize=}, {double=}, {dtype}",
                    torch.equal(got, four_bits.plain(bits, (N, K), dtype)),
                )


def _choices(subject: Subject) -> Iterator[Choice | None]:
    rule = subject.rule
    yield rule
    if subject.device.type == "cuda" and native.why_not(subject.device, subject.x.dtype) is None:
        yield None
    if isinstance(rule, Reduced):
        yield from (Reduced(rule.config, parts) for parts in (1, 3))
        return
    if isinstance(rule, DecodeConfig):
        return
    for kind, split in ((Schedule.RECOMPUTE, 1), (Schedule.PUBLISH, 1), (Schedule.PRODUCE, 2)):
        choice = Tiled(rule.tile, ScheduleConfig(kind, split))
        if choice != rule:
            yield choice


if __name__ == "__main__":
    sys.exit(main())
