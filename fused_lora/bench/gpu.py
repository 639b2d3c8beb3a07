"""``make gpu``, from a checkout on a machine with a GPU: the kernel tests on the device, then a timing table.

    python -m fused_lora.bench.gpu [--only tests|speed] [--quick] [--device cpu] [--out FILE]

Needs PyTorch with its Triton, and pytest; nothing is installed and nothing fetched.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
SPEED_DTYPES = {"cuda": "bfloat16,float16", "cpu": "float32"}


def main(argv: Sequence[str] | None = None, checkout: Path = CHECKOUT) -> int:
    """The exit code: of the tests if they are red, else of the timing; 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="make gpu", description="Kernel tests on the device, then a timing table.")
    parser.add_argument("--only", choices=("tests", "speed"), help="one half")
    parser.add_argument("--quick", action="store_true", help="time few shapes; not saved without --out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu interprets the kernels, slowly")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: benchmarks/results/<device>-<date>.json")
    args = parser.parse_args(argv)

    # here, not at the top: --help needs no PyTorch
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "make gpu: PyTorch finds no CUDA device here; --device cpu interprets the kernels instead", file=sys.stderr
        )
        return 2
    if args.device == "cuda":
        # before Triton is first imported, here or by the tests
        os.environ.pop("TRITON_INTERPRET", None)
    if args.only != "speed":
        code = run_tests(checkout, interpret=args.device == "cpu")
        if code != 0:
            print(f"make gpu: the kernel tests are red (pytest exit code {code}), so nothing is timed", file=sys.stderr)
            return code
    return 0 if args.only == "tests" else run_speed(args.device, args.quick, args.out)


def run_tests(checkout: Path, interpret: bool) -> int:
    """pytest's exit code. The tests choose the device themselves: the GPU, unless Triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"} if interpret else None
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-q"]
    return subprocess.run(command, cwd=checkout, env=environment, check=False).returncode


def run_speed(device: str, quick: bool, out: Path | None) -> int:
    from . import add_arguments, run

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = ["--device", device, "--dtype", SPEED_DTYPES[device], "--work", "forward,step"]
    options += ["--quick"] if quick else []
    options += [] if out is None else ["--out", str(out)]
    return run(parser.parse_args(options))


if __name__ == "__main__":
    sys.exit(main())
