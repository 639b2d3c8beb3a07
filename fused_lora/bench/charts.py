"""Plots of measured ratios, and of curves over a size, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .baselines import FROZEN, OURS
from .runner import Group
from .svg import Svg

PEER_COLOURS = ("orange", "blue", "violet", "olive", "red", "cyan", "pink", "brown", "muted")
# beyond it a ratio is drawn at the edge; ours with its number
LARGEST_RATIO = 2.0
_WIDTH = 760


def colours(candidates: Sequence[str], ours: str) -> dict[str, str]:
    """Ours alone is teal; a peer keeps its colour in every plot that has the same candidates."""
    peers = [name for name in candidates if name not in (FROZEN, ours)]
    found = {name: PEER_COLOURS[place % len(PEER_COLOURS)] for place, name in enumerate(peers)}
    return found | {ours: "ours", FROZEN: "floor"}


def smallest_ratio(groups: Sequence[Group]) -> float:
    """Where the axis of ratios begins: a step of 0.2 below every one, at 0.8 the latest."""
    ratios = [
        r for group in groups for row in group.rows for r in (row.ratio_to_frozen, row.ratio_p20) if r is not None
    ]
    return min(0.8, math.floor(min(ratios, default=1.0) / 0.2 + 1e-9) * 0.2)


def ratio_plot(groups: Sequence[Group], candidates: Sequence[str], title: str) -> str:
    """A line for each group, a dot for each candidate at its time over the frozen linear's; ours with its spread."""
    groups = [group for group in groups if any(row.ratio_to_frozen is not None for row in group.rows)]
    names = [name for name in candidates if name != FROZEN]
    ours = groups[0].ours if groups else OURS
    colour = colours(candidates, ours)
    places = _legend_places(names, 20, 54)
    left, right, top, step = 330, 715, 30 + max((y for _, y in places), default=54), 24
    svg = Svg(_WIDTH, top + step * len(groups) + 44, title)
    svg.text(20, 30, title, 15, bold=True)
    _legend(svg, names, colour, places)

    low = smallest_ratio(groups)

    def place(ratio: float) -> float:
        return left + (min(max(ratio, low), LARGEST_RATIO) - low) / (LARGEST_RATIO - low) * (right - left)

    bottom = top + step * len(groups)
    for fifth in range(round(5 * low), round(5 * LARGEST_RATIO) + 1):
        tick = fifth / 5
        x = place(tick)
        svg.line([(x, top - 6), (x, bottom)], "muted" if tick == 1 else "grid", 1)
        label = f"≥ {tick:g}" if tick == LARGEST_RATIO else f"{tick:g}"
        svg.text(x, bottom + 18, label, 11.5, "muted", "middle")
    svg.text((left + right) / 2, bottom + 36, "time ÷ frozen linear's, lower is better", 11.5, "muted", "middle")
    for index, group in enumerate(groups):
        y = top + index * step + 10
        svg.text(left - 14, y + 4, short_title(group), 11.5, "ink", "end")
        for row in sorted(group.rows, key=lambda row: row.candidate == group.ours):
            if row.candidate not in names or row.ratio_to_frozen is None:
                continue
            if row.candidate == group.ours and row.ratio_p20 is not None and row.ratio_p80 is not None:
                svg.line([(place(row.ratio_p20), y), (place(row.ratio_p80), y)], "ours", 2)
            radius = 5 if row.candidate == group.ours else 3.6
            svg.dot(place(row.ratio_to_frozen), y, colour[row.candidate], radius)
            if row.candidate == group.ours and row.ratio_to_frozen > LARGEST_RATIO:
                svg.text(place(row.ratio_to_frozen) + 9, y + 4, f"{row.ratio_to_frozen:.1f}", 11.5, "ours")
    return svg.render()


def short_title(group: Group) -> str:
    """Work, name of the shape, dtype."""
    work, shape, dtype = group.title.split("  ")
    return f"{work}  {shape.split(' (')[0]}  {dtype}"


@dataclass(frozen=True)
class Curve:
    """points: (x, y), ascending. dashed: a model's, not measured."""

    points: Sequence[tuple[float, float]]
    colour: str
    dashed: bool = False


def curve_plot(curves: Mapping[str, Curve], title: str, x_label: str, y_label: str, log_y: bool = True) -> str:
    """Curves over a logarithmic x whose values are the ticks."""
    svg = Svg(_WIDTH, 400, title)
    svg.text(20, 30, title, 15, bold=True)
    names = list(curves)
    _legend(svg, names, {name: curve.colour for name, curve in curves.items()}, _legend_places(names, 20, 54))
    left, right, top, bottom = 74, 735, 80, 340
    xs = sorted({x for curve in curves.values() for x, _ in curve.points})
    ys = [y for curve in curves.values() for _, y in curve.points]
    ticks = _log_ticks(min(ys), max(ys)) if log_y else _ticks(min([*ys, 1.0]), max(ys))

    def across(x: float) -> float:
        low, high = math.log(xs[0]), math.log(xs[-1])
        return left + 20 + (math.log(x) - low) / max(high - low, 1e-9) * (right - left - 40)

    def up(y: float) -> float:
        low, high, at = (math.log(v) if log_y else v for v in (ticks[0], ticks[-1], y))
        return bottom - (at - low) / max(high - low, 1e-9) * (bottom - top)

    for tick in ticks:
        svg.line([(left, up(tick)), (right, up(tick))], "grid", 1)
        svg.text(left - 8, up(tick) + 4, f"{tick:g}", 11.5, "muted", "end")
    for x in xs:
        svg.text(across(x), bottom + 20, f"{x:g}", 11.5, "muted", "middle")
    svg.text((left + right) / 2, bottom + 44, x_label, 12, "muted", "middle")
    svg.text(left - 54, top - 8, y_label, 12, "muted")
    for curve in curves.values():
        points = [(across(x), up(y)) for x, y in curve.points]
        if len(points) > 1:
            svg.line(points, curve.colour, 2, dashed=curve.dashed)
        for x, y in points:
            svg.dot(x, y, curve.colour, 2.4 if curve.dashed else 3.6)
    return svg.render()


def _legend_places(names: Sequence[str], left: float, top: float) -> list[tuple[float, float]]:
    """Where each name stands, in as many lines as they need."""
    places, x, y = [], left, top
    for name in names:
        width = 30 + 8 * len(name)
        if x + width > _WIDTH and x > left:
            x, y = left, y + 20
        places.append((x, y))
        x += width
    return places


def _legend(
    svg: Svg, names: Sequence[str], colour: Mapping[str, str], places: Sequence[tuple[float, float]]
) -> None:  # fmt: skip
    for name, (x, y) in zip(names, places, strict=True):
        svg.dot(x + 5, y - 4, colour[name], 5)
        svg.text(x + 15, y, name, 12)


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of each decade, or the decades where there are many, around what is drawn."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1,) if last - first > 3 else (1, 2, 5)
    ticks = [step * 10.0**decade for decade in range(first, last + 1) for step in steps]
    below, above = max(t for t in ticks if t <= low), min((t for t in ticks if t >= high), default=ticks[-1])
    return [tick for tick in ticks if below <= tick <= above]


def _ticks(low: float, high: float) -> list[float]:
    step = next(step for step in (0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10, 20, 50) if (high - low) / step <= 7)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * place, 6) for place in range(first, last + 1)]
