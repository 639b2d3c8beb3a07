"""What the demo says: sections of text, at most 100 columns wide, and results.json."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .results import DIGITS, Check, Comparison, Errors, FineTuned, LayerSize, Results, Settings, StepTimes

_PACKAGES = ("fused_lora", "torch", "numpy", "matplotlib", "safetensors")


def title(settings: Settings, implementation: str, data: str, train_images: int, test_images: int) -> str:
    return "\n".join([
        "RichBoyNet, 784 -> 1000 -> 2000 -> 10, on MNIST, and LoRA in its three layers",
        f"{data}: {train_images:,} to train on, {test_images:,} to test on",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"impl {settings.impl!r} runs {implementation!r}; seed {settings.seed}",
    ])  # fmt: skip


def network(errors: Errors, digit: int, second: int) -> str:
    percent, first, next_ = 100 * errors.total / sum(errors.images), errors.percent(digit), errors.percent(second)
    return _section(
        "The network, trained in one pass: which test images does it get wrong?",
        [
            *_head(errors),
            _wrong("network", errors),
            _row("% wrong", (f"{errors.percent(each):.1f}" for each in DIGITS)),
            "",
            f"{errors.total} wrong, {percent:.1f} %. LoRA is to fix the {digit}s ({first:.1f} % wrong), "
            f"then the {second}s ({next_:.1f} %).",
        ],
    )


def parameters(layers: Sequence[LayerSize], settings: Settings) -> str:
    base, added = sum(layer.base for layer in layers), sum(layer.added for layer in layers)
    rows = [
        f"{layer.name:<10}{layer.out_features:>6} x {layer.in_features:<6}{layer.base:>15,}{layer.added:>12,}"
        for layer in layers
    ]
    return _section(
        f"LoRA beside its three layers: rank {settings.rank}, alpha {settings.alpha:g}",
        [
            f"{'layer':<10}{'weight':>11}{'W and bias':>19}{'A and B':>12}",
            *rows,
            f"{'all':<25}{base:>15,}{added:>12,}   {100 * added / base:.3f} % added; only A and B are trained",
        ],
    )


def fine_tuning(
    tuned: FineTuned, before: Errors, settings: Settings, network_size: int, checks: Iterable[Check]
) -> str:
    digit, after = tuned.digit, tuned.errors
    changes = [now - was for was, now in zip(before.wrong, after.wrong, strict=True)]
    return _section(
        f"A and B trained on {settings.batches} batches of ten {digit}s",
        [
            *_head(before),
            _wrong("network", before),
            _wrong(tuned.adapter, after),
            _row("change", (f"{change:+d}" for change in changes), f"{sum(changes):+d}"),
            "",
            f"Wrong {digit}s: {before.wrong[digit]} -> {after.wrong[digit]}. Wrong among the others: "
            f"{before.elsewhere(digit)} -> {after.elsewhere(digit)}; it saw nothing but {digit}s.",
            f"Saved alone: {tuned.size / 1e3:.1f} KB, beside {network_size / 1e6:.1f} MB for the whole network.",
            *_lines(checks),
        ],
    )


def switching(adapters: Sequence[FineTuned], before: Errors, off: Errors, checks: Iterable[Check]) -> str:
    rows = [
        _wrong("network", before),
        *(_wrong(tuned.adapter, tuned.errors) for tuned in adapters),
        _wrong("LoRA off", off),
    ]
    return _section(
        f"{len(adapters)} adapters, one network: plugged in turn", [*_head(before), *rows, "", *_lines(checks)]
    )


def reference(comparison: Comparison, times: StepTimes, settings: Settings, tests: int, checks: Iterable[Check]) -> str:
    rows = [
        f"{name:<16}{spread.median:>8.2f} ms   ({spread.p20:.2f} to {spread.p80:.2f}, 20th to 80th percentile)"
        for name, spread in (("fused", times.fused), ("parametrize", times.reference))
    ]
    return _section(
        "Against torch.nn.utils.parametrize, W + (B @ A) * scale: same seed, same A, same batches",
        [
            f"Largest difference after {settings.batches} batches: A {comparison.A:.1e}, B {comparison.B:.1e}, "
            f"logits {comparison.logits:.1e}.",
            f"Predictions that differ: {comparison.predictions} of {tests:,}.",
            f"Logits against the same training in float64: fused {comparison.error:.1e}, "
            f"parametrize {comparison.reference_error:.1e}.",
            *_lines(checks),
            "",
            f"One step: forward, backward, optimizer. Medians of {times.steps}, taken in turns.",
            *rows,
            f"{'ratio':<16}{times.ratio:>8.2f}      the fused step is {1 / times.ratio:.1f} times as fast",
        ],
    )


def closing(results: Results, files: Iterable[str]) -> str:
    failed = [check for check in results.checks if not check.passed]
    verdict = (
        f"{len(failed)} of {len(results.checks)} checks FAILED" if failed else f"{len(results.checks)} checks, all hold"
    )
    return _section(f"{verdict}; {results.seconds:.0f} s. Written", files)


def as_json(results: Results) -> str:
    facts: dict[str, Any] = dataclasses.asdict(results)
    facts["times"]["ratio"] = results.times.ratio
    facts["versions"] = {name: importlib.metadata.version(name) for name in _PACKAGES}
    facts["versions"]["python"] = platform.python_version()
    facts["machine"] = {"cpu": platform.machine(), "threads": torch.get_num_threads()}
    return json.dumps(facts, indent=2, allow_nan=False) + "\n"


def _section(heading: str, lines: Iterable[str]) -> str:
    return "\n".join(["", heading, "-" * len(heading), *lines])


def _head(errors: Errors) -> list[str]:
    return [_row("digit", DIGITS, "all"), _row("test images", errors.images, sum(errors.images))]


def _wrong(label: str, errors: Errors) -> str:
    return _row(label, errors.wrong, errors.total)


def _row(label: str, cells: Iterable[object], last: object = "") -> str:
    """One cell for each digit, and one for all of them."""
    return (f"{label:<14}" + "".join(f"{cell!s:>6}" for cell in cells) + f"{last!s:>9}").rstrip()


def _lines(checks: Iterable[Check]) -> list[str]:
    return [f"{'ok' if check.passed else 'FAILED':<8}{check.claim}" for check in checks]
