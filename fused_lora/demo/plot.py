"""The demo's picture: what each adapter does to the errors, and what a training step and an adapter cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from .results import DIGITS, Errors, FineTuned, Results

_INK, _MUTED, _GRID = "#1f2430", "#6b7280", "#e6e8ec"
_NETWORK, _OURS, _ADAPTERS = "#b8bfca", "#1f9d8a", ("#2f6fde", "#e0752d")
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.axisbelow": True,
    "xtick.color": _INK,
    "ytick.color": _MUTED,
}
_LEFT, _BAR, _GAP = 0.055, 0.38, 0.015


def draw(results: Results, path: Path) -> None:
    """Write the picture as PNG."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(13, 7.8), facecolor="white")
        grid = figure.add_gridspec(
            2, 2, width_ratios=(2.25, 1), left=_LEFT, right=0.965, top=0.785, bottom=0.08, wspace=0.22, hspace=0.52
        )  # fmt: skip
        _head(figure, results)
        for row, (tuned, colour) in enumerate(zip(results.adapters, _ADAPTERS, strict=True)):
            _errors(figure.add_subplot(grid[row, 0]), results, tuned, colour)
        _times(figure.add_subplot(grid[0, 1]), results)
        _sizes(figure.add_subplot(grid[1, 1]), results)
        figure.savefig(path, format="png", dpi=150)


def _head(figure: Figure, results: Results) -> None:
    settings, base = results.settings, sum(layer.base for layer in results.layers)
    added = sum(layer.added for layer in results.layers)
    digits = " and ".join(f"{tuned.digit}s" for tuned in results.adapters)
    lines = (
        f"RichBoyNet on MNIST. Rank {settings.rank} puts {added:,} numbers beside {base:,} frozen ones "
        f"({100 * added / base:.2f} %); each adapter saw {settings.batches} batches of ten images of its digit.",
        "Left: the share of each digit's test images that is taken for another digit, and above the bars how many.",
    )
    figure.text(_LEFT, 0.946, f"One frozen network, two adapters: fixing the {digits}", size=19, weight="bold")
    for row, line in enumerate(lines):
        figure.text(_LEFT, 0.910 - 0.028 * row, line, size=10.5, color=_MUTED)


def _errors(axes: Any, results: Results, tuned: FineTuned, colour: str) -> None:
    before, after, digit = results.network, tuned.errors, tuned.digit
    axes.axvspan(digit - 0.5, digit + 0.5, color=colour, alpha=0.09, lw=0)
    bars = [
        _digit_bars(axes, before, -1, _NETWORK, _MUTED, strong=digit),
        _digit_bars(axes, after, 1, colour, colour, strong=digit),
    ]
    off = [results.off.percent(d) for d in DIGITS]
    bars += axes.plot(_places(-1), off, "o", ms=6, mfc="white", mec=_INK, mew=1.3, clip_on=False)
    axes.set_xlim(-0.6, 9.6)
    axes.set_ylim(0, 1.15 * max(tuned.errors.percent(d) for tuned in results.adapters for d in DIGITS))
    axes.set_xticks(list(DIGITS))
    axes.get_xticklabels()[digit].set(weight="bold", color=colour)
    axes.set_ylabel("wrong, %")
    was, now = before.wrong[digit], after.wrong[digit]
    others = f"the others' {before.elsewhere(digit)} become {after.elsewhere(digit)}"
    _tidy(axes, f"Trained on {digit}s: {was} wrong become {now}, {others}", grid="y")
    names = ("network alone", f"{tuned.adapter} plugged in", "LoRA off again")
    axes.legend(
        bars, names, loc="lower left", bbox_to_anchor=(-0.008, 0.985), ncols=3, frameon=False, borderpad=0,
        fontsize=9.5, handlelength=1.4, handletextpad=0.5, columnspacing=1.6,
    )  # fmt: skip


def _places(side: int) -> list[float]:
    """Where each digit's bar stands: left of its number (-1) or right of it (1)."""
    return [digit + side * (_BAR / 2 + _GAP) for digit in DIGITS]


def _digit_bars(axes: Any, errors: Errors, side: int, colour: str, ink: str, strong: int) -> Any:
    places, heights = _places(side), [errors.percent(digit) for digit in DIGITS]
    for digit in DIGITS:
        weight, size = ("bold", 11.5) if digit == strong else ("normal", 9)
        # the ring of "LoRA off" sits on the left bar
        above = (0, 7 if side < 0 else 3)
        axes.annotate(
            f"{errors.wrong[digit]}", (places[digit], heights[digit]), above, textcoords="offset points", ha="center",
            color=ink, weight=weight, size=size,
        )  # fmt: skip
    return axes.bar(places, heights, _BAR, color=colour)


def _times(axes: Any, results: Results) -> None:
    spreads = (results.times.reference, results.times.fused)
    texts = [f"{spread.median:.1f} ms" for spread in spreads]
    _bars(axes, ("parametrize", "fused"), [s.median for s in spreads], [s.p80 for s in spreads], texts)
    for row, spread in enumerate(spreads):
        axes.plot([spread.p20, spread.p80], [row, row], color=_INK, lw=1.4, marker="|", ms=8)
    _tidy(axes, f"A training step: {1 / results.times.ratio:.1f} times as fast", grid="x")
    axes.set_xlabel("ms; median, and 20th to 80th percentile")


def _sizes(axes: Any, results: Results) -> None:
    saved = max(tuned.size for tuned in results.adapters)
    sizes = [results.network_size / 1e6, saved / 1e6]
    _bars(axes, ("network", "adapter"), sizes, sizes, [f"{sizes[0]:.1f} MB", f"{saved / 1e3:.0f} KB"])
    _tidy(axes, f"To save: {results.network_size / saved:,.0f} times smaller", grid="x")
    axes.set_xlabel("MB on disk")


def _bars(
    axes: Any, names: Sequence[str], values: Sequence[float], ends: Sequence[float], texts: Sequence[str]
) -> None:
    """Two horizontal bars, what it is measured against and ours; each text stands behind its end."""
    axes.barh([0, 1], values, 0.55, color=[_NETWORK, _OURS])
    for row, (end, text) in enumerate(zip(ends, texts, strict=True)):
        axes.annotate(text, (end, row), (8, 0), textcoords="offset points", va="center", weight="bold", size=11)
    axes.set_yticks([0, 1], names, color=_INK)
    axes.set_ylim(1.6, -0.6)
    axes.set_xlim(0, 1.33 * max(ends))


def _tidy(axes: Any, title: str, grid: str) -> None:
    axes.set_title(title, loc="left", weight="bold", size=11.5, pad=24)
    axes.grid(axis=grid, color=_GRID)
    axes.tick_params(length=0)
    for side in ("top", "right", "left" if grid == "y" else "bottom"):
        axes.spines[side].set_visible(False)
