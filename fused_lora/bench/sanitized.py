"""Every kernel once, in every form, on operands small enough for compute-sanitizer, and checked.

python -m fused_lora.bench.sanitized [--device cpu]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch

from .. import extension
from ..kernels.configs import DecodeConfig, Form, Schedule
from ..kernels.entries import Choice, Reduced, Tiled
from .subjects import ADAPTER_GRADIENTS, FORWARD, INPUT_GRADIENT, Job, Subject, in_one_line, make

# several tiles, and an end that fills none
SIZES = {"cuda": (300, 328, 648), "cpu": (33, 72, 104)}
DTYPES = ("bfloat16", "bfloat16+float32", "float32")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda")
    device = torch.device(parser.parse_args(argv).device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    M, K, N = SIZES[device.type]
    jobs = [Job(FORWARD, 3, K, N, 8, dtype) for dtype in DTYPES]
    jobs += [
        Job(work, M, K, N, 20, dtype, dropout)
        for dtype in DTYPES
        for dropout in (False, True)
        for work in (FORWARD, INPUT_GRADIENT, ADAPTER_GRADIENTS)
    ]
    wrong = 0
    for job in jobs:
        subject = make(job, device)
        for choice in _choices(subject):
            verdict = subject.verdict(choice)
            if verdict is not None:
                wrong += 1
                print(f"RED: {job}: {in_one_line(choice)}: {verdict}")
    print(f"{len(jobs)} kinds of launch in every form: {'all right' if wrong == 0 else f'{wrong} wrong'}")
    return 1 if wrong else 0


def _choices(subject: Subject) -> Iterator[Choice | None]:
    rule = subject.rule
    yield rule
    if subject.device.type == "cuda" and extension.why_unavailable(subject.device, subject.x.dtype) is None:
        yield None
    if isinstance(rule, Reduced):
        yield from (Reduced(rule.config, parts) for parts in (1, 3))
        return
    if isinstance(rule, DecodeConfig):
        return
    for schedule in (Schedule(Form.RECOMPUTE), Schedule(Form.PUBLISH), Schedule(Form.PRODUCE, 2)):
        if Tiled(rule.tile, schedule) != rule:
            yield Tiled(rule.tile, schedule)


if __name__ == "__main__":
    sys.exit(main())
