"""Plots of measured ratios, and curves over a size, by matplotlib: PNG, or SVG in the reader's light or dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .colours import COLOURS
from .groups import Group
from .results import FROZEN

BASELINE_COLOURS = ("orange", "blue", "violet", "olive", "red", "cyan", "pink", "brown", "muted")
# beyond it a ratio is drawn at the edge; ours with its number
LARGEST_RATIO = 2.0
_LIGHT = {name: light for name, (light, _) in COLOURS.items()}
STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "svg.fonttype": "none", "svg.hashsalt": "fused_lora",
    "text.color": _LIGHT["ink"], "axes.labelcolor": _LIGHT["muted"], "axes.edgecolor": _LIGHT["grid"],
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "axes.axisbelow": True, "grid.color": _LIGHT["grid"], "xtick.color": _LIGHT["muted"],
    "ytick.color": _LIGHT["muted"],
    "xtick.major.size": 0, "ytick.major.size": 0, "legend.frameon": False, "figure.facecolor": _LIGHT["paper"],
    "axes.facecolor": "none",
}  # fmt: skip


def colours(candidates: Sequence[str], ours: str) -> dict[str, str]:
    """Ours is teal, and nothing else is; a baseline has one colour in all plots of the same candidates."""
    others = [name for name in candidates if name not in (FROZEN, ours)]
    found = {name: _LIGHT[BASELINE_COLOURS[place % len(BASELINE_COLOURS)]] for place, name in enumerate(others)}
    return found | {ours: _LIGHT["ours"], FROZEN: _LIGHT["frozen"]}


def new_figure(width: float, height: float) -> Figure:
    """In inches; as wide as its text says, whatever the reader's fonts."""
    with matplotlib.rc_context(STYLE):
        return Figure(figsize=(width, height), layout="constrained")


def smallest_ratio(groups: Sequence[Group]) -> float:
    """Where the axis of ratios begins: a step of 0.2 below every one, at 0.8 the latest."""
    ratios = [ratio.p20 for group in groups for row in group.rows if (ratio := row.ratio) is not None]
    return min(0.8, math.floor(min(ratios, default=1.0) / 0.2 + 1e-9) * 0.2)


def ratio_figure(groups: Sequence[Group], candidates: Sequence[str], title: str) -> Figure:
    """A line for each group, a dot for each candidate at its time over the frozen baseline's, with its spread."""
    groups = [group for group in groups if any(row.ratio for row in group.rows)]
    names = [name for name in candidates if name != FROZEN]
    ours = groups[0].ours if groups else ""
    colour = colours(names, ours)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(9.5, 1.6 + 0.25 * max(len(groups), 1))
        axes = figure.add_subplot()
        for name in names:
            rows = ((y, row) for y, group in enumerate(groups) for row in group.rows if row.candidate == name)
            found = [(y, row.ratio) for y, row in rows if row.ratio is not None]
            ys, (lows, middles, highs) = (
                [y for y, _ in found],
                ([min(getattr(ratio, part), LARGEST_RATIO) for _, ratio in found] for part in ("p20", "median", "p80")),
            )
            mine = name == ours
            style: Any = {"color": colour[name], "zorder": 2 + mine}
            axes.hlines(ys, lows, highs, lw=2 if mine else 0.8, **style)
            axes.plot(middles, ys, "o", ms=7 if mine else 4.5, gid=name, **style)
            for y, ratio in found if mine else ():
                if ratio.median > LARGEST_RATIO:
                    axes.annotate(f"{ratio.median:.1f}", (LARGEST_RATIO + 0.02, y), color=colour[name], va="center")
        axes.axvline(1, color=_LIGHT["muted"], lw=1)
        axes.set_yticks(range(len(groups)), [group.short_title for group in groups], color=_LIGHT["ink"])
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_xlim(smallest_ratio(groups) - 0.02, LARGEST_RATIO + 0.05)
        axes.grid(axis="x")
        axes.spines[:].set_visible(False)
        axes.set_xlabel(f"time ÷ frozen baseline's, lower is better; {LARGEST_RATIO:g} stands for more")
        _head(figure, axes, title, {name: colour[name] for name in names})
    return figure


@dataclass(frozen=True)
class Curve:
    """points: (x, y), ascending. dashed: a model's, not measured."""

    points: Sequence[tuple[float, float]]
    colour: str
    dashed: bool = False


def curve_figure(curves: Mapping[str, Curve], title: str, x_label: str, y_label: str) -> Figure:
    """Curves over a logarithmic x whose values are the ticks; y from 1 or below."""
    with matplotlib.rc_context(STYLE):
        figure = new_figure(7.6, 4)
        axes = figure.add_subplot()
        for name, curve in curves.items():
            xs, ys = zip(*curve.points, strict=True) if curve.points else ((), ())
            style, marker = ("--", 3.0) if curve.dashed else ("-", 4.5)
            axes.plot(xs, ys, style, color=curve.colour, marker="o", ms=marker, lw=1.8, gid=name)
        values = sorted({x for curve in curves.values() for x, _ in curve.points})
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(values))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        low = min([1.0, *(y for curve in curves.values() for _, y in curve.points)])
        axes.set_ylim(bottom=low - 0.03)
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        axes.set(xlabel=x_label, ylabel=y_label)
        _head(figure, axes, title, {name: curve.colour for name, curve in curves.items()})
    return figure


def _head(figure: Figure, axes: Axes, title: str, colour: Mapping[str, str]) -> None:
    """The title, and the names in as many lines as they need."""
    handles = [axes.plot([], [], "o", ms=7, color=colour[name], label=name)[0] for name in colour]
    font: Any = {"weight": "bold", "size": 11}
    place: Any = {"loc": "outside upper left", "ncols": min(len(handles), 5) or 1, "alignment": "left"}
    figure.legend(handles=handles, title=title, title_fontproperties=font, **place)


def as_svg(figure: Figure, title: str) -> str:
    """The same bytes every time, to the hundredth of a point; light and dark by the reader's own setting."""
    with matplotlib.rc_context(STYLE):
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    svg = re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", file.getvalue())
    svg = svg.replace("'DejaVu Sans'", "'DejaVu Sans', system-ui, sans-serif")
    for name, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{name})")
    modes = ["".join(f"--{name}:{pair[mode]};" for name, pair in COLOURS.items()) for mode in (0, 1)]
    style = f"<style>svg{{{modes[0]}}}@media (prefers-color-scheme:dark){{svg{{{modes[1]}}}}}</style>"
    head, separator, rest = svg.partition("<defs>")
    return "\n".join(line.rstrip() for line in f"{head}{style}\n {separator}{rest}".splitlines()) + "\n"


def as_png(figure: Figure) -> bytes:
    with matplotlib.rc_context(STYLE):
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=140)
    return file.getvalue()
