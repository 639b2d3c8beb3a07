"""``fused-lora``: a command is a module with ``add_arguments(parser)`` and ``run(args) -> int``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .. import bench, codegen, demo, tuning
from . import info

COMMANDS = {
    "demo": (demo, "train RichBoyNet on MNIST, then fix the digit it gets wrong by training A and B alone"),
    "info": (info, "versions, devices, and which implementations can run here"),
    "bench": (bench, "time the layer against the baselines"),
    "tune": (tuning, "time tiles and schedules on this GPU, and keep those that beat the rules"),
    "codegen": (codegen, "compile the kernels for GPUs that are not here: registers, spills, instructions"),
}


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(prog="fused-lora", description="A LoRA layer in one kernel.")
    subparsers = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, about) in COMMANDS.items():
        module.add_arguments(subparsers.add_parser(name, help=about, description=about))
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return COMMANDS[args.command][0].run(args)
