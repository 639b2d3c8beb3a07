"""Draws the pictures of how-it-works.md: ``python -m tools.draw`` writes docs/pictures/*.svg."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from fused_lora.bench.charts import STYLE, as_svg
from fused_lora.bench.colours import COLOURS
from tools.traffic import ADDMM, EAGER, FROZEN, OURS, PEFT, Layer, backward, forward

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
HEADLINE = Layer(M=8192, K=4096, N=4096, R=16)
# between the bars of two launches
GAP_MB = 6
C = {name: light for name, (light, _) in COLOURS.items()}


def _blank(width: float, height: float) -> tuple[Figure, Axes]:
    """Bare axes in points, y downward."""
    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def _box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, alpha: float = 1.0) -> None:
    style: Any = {"boxstyle": "round,pad=0,rounding_size=3", "lw": 0, "alpha": alpha}
    axes.add_patch(FancyBboxPatch((x, y), width, height, fc=C[colour], **style))


def _say(axes: Axes, x: float, y: float, text: str, colour: str = "ink", size: float = 9.5, **style: Any) -> None:
    axes.text(x, y, text, color=C[colour], size=size, va="center", **style)


def tile_of(index: int, tiles_m: int, tiles_p: int, group: int) -> tuple[int, int]:
    """Row and column of the tile at a place in line, publishers first: ``_tile`` of the kernel, in plain Python."""
    if index < tiles_m:
        return index, 0
    rest, columns = index - tiles_m, tiles_p - 1
    first = rest // (group * columns) * group
    rows = min(tiles_m - first, group)
    within = rest % (group * columns)
    return first + within % rows, within // rows + 1


def tile_order() -> Figure:
    """Tiles of y, numbered by ticket: the first column is handed out first, and publishes h"""
    tiles_m, tiles_p, group, cell = 6, 7, 3, 34
    figure, axes = _blank(570, 290)
    left, top = 40, 44
    _say(axes, left, 20, "y, tile by tile; the number is the tile's ticket", size=11, weight="bold")
    _say(axes, left - 9, top + tiles_m * cell / 2, "M", "muted", ha="right")
    _say(axes, left + tiles_p * cell / 2, top + tiles_m * cell + 12, "N", "muted", ha="center")
    for index in range(tiles_m * tiles_p):
        row, column = tile_of(index, tiles_m, tiles_p, group)
        x, y = left + column * cell, top + row * cell
        colour = "ours" if column == 0 else "blue" if row < group else "violet"
        _box(axes, x + 1.5, y + 1.5, cell - 3, cell - 3, colour, 1.0 if column == 0 else 0.22)
        ink = "paper" if column == 0 else "ink"
        _say(axes, x + cell / 2, y + cell / 2, str(index), ink, ha="center", weight="bold")
    notes = [
        (
            "ours", 1.0, "Publishers: tickets 0 to 5",
            "x Wᵀ and, beside it, h = x Aᵀ of their rows.", "They store h and raise a flag.",
        ),
        (
            "blue", 0.3, "The first group of rows",
            "A plain GEMM: the main loop knows no adapter.", "They wait for the flag in their epilogue alone.",
        ),
        (
            "violet", 0.3, "The next group",
            "Groups of rows share operands in the L2 cache.", "Their publishers are done long since.",
        ),
    ]  # fmt: skip
    text = left + tiles_p * cell + 22
    for place, (colour, alpha, head, *lines) in enumerate(notes):
        y = top + 12 + place * 64
        _box(axes, text, y - 6, 12, 12, colour, alpha)
        _say(axes, text + 20, y, head, weight="bold")
        for number, line in enumerate(lines):
            _say(axes, text + 20, y + 16 + 14 * number, line, "muted", 8.8)
    _say(axes, left, 276, "Whoever waits holds a higher ticket than whom it waits for, so the wait always ends.")
    return figure


def hand_over() -> Figure:
    """A publisher stores h and raises a flag while the other tiles are still in their main loops"""
    loop = "main loop: x Wᵀ alone"
    # start, length, colour, opacity, what it is
    lanes = {
        "publisher": [
            (0, 6.6, "ours", 0.85, "main loop: x Wᵀ and x Aᵀ"),
            (6.6, 0.9, "orange", 0.9, "store"),
            (7.5, 1.5, "ours", 0.55, "epilogue"),
        ],
        "same wave": [
            (0, 6.0, "blue", 0.35, loop),
            (6.0, 1.6, "red", 0.3, "wait"),
            (7.6, 1.5, "blue", 0.55, "epilogue"),
        ],
        "later waves": [(5.0, 4.6, "violet", 0.35, loop), (9.6, 1.5, "violet", 0.6, "epilogue")],
    }
    figure, axes = _blank(570, 205)
    left, unit = 100, 41
    _say(axes, 18, 20, "The hand-over of h, in time (not to scale)", size=11, weight="bold")
    for lane, (name, spans) in enumerate(lanes.items()):
        y = 42 + lane * 42
        _say(axes, left - 10, y + 15, name, "muted", ha="right")
        for start, length, colour, alpha, label in spans:
            _box(axes, left + start * unit, y, length * unit - 2, 30, colour, alpha)
            _say(axes, left + (start + length / 2) * unit, y + 15, label, size=8.5, ha="center")
    raised = left + 7.5 * unit
    axes.plot([raised, raised], [36, 172], "--", color=C["orange"], lw=1.2)
    arrow = {"arrowstyle": "-|>", "color": C["orange"]}
    axes.annotate("", (left + 7.6 * unit + 3, 88), (raised, 70), arrowprops=arrow)
    _say(axes, raised, 181, "flag raised: h is in memory", "orange", 8.8, ha="center", weight="bold")
    _say(axes, 18, 195, "Later waves find the flag up and wait for nothing.", "muted", 8.8)
    return figure


def traffic() -> Figure:
    """Bytes that each way to compute a LoRA layer reads and writes, launch by launch"""
    ways, halves = (FROZEN, OURS, ADDMM, EAGER, PEFT), (("forward", forward), ("backward", backward))
    figure = Figure(figsize=(7.9, 5.6), layout="constrained")
    figure.suptitle("Memory traffic of one layer, launch by launch", weight="bold", x=0.01, ha="left")
    shape = f"{HEADLINE.M:,} tokens, {HEADLINE.K} → {HEADLINE.N}, rank {HEADLINE.R}, 16-bit"
    words = "Arithmetic, not a measurement: every launch reads its operands and writes its result once."
    figure.supxlabel(f"MB. {shape}. Strong: read; faint: written.\n{words}", color=C["muted"], size=8.8)
    panels = figure.subplots(2, 1, sharex=True)
    for axes, (title, half) in zip(panels, halves, strict=True):
        axes.set_title(title, size=9.5)
        for y, way in enumerate(ways):
            x, launches = 0.0, half(way, HEADLINE)
            for number, launch in enumerate(launches):
                x += GAP_MB * (number > 0)
                for count, alpha in ((launch.reads, 0.95), (launch.writes, 0.45)):
                    colour = C["ours" if way == OURS else "frozen"]
                    axes.add_patch(Rectangle((x, y - 0.36), count / 1e6, 0.72, fc=colour, alpha=alpha, lw=0))
                    x += count / 1e6
            moved = sum(launch.moved for launch in launches) / 1e6
            total = f"  {moved:,.0f} MB, {len(launches)} launch{'es' if len(launches) > 1 else ''}"
            axes.text(x, y, total, va="center", weight="bold" if way == OURS else "normal")
        axes.set_yticks(range(len(ways)), ways, color=C["ink"])
        axes.set_ylim(len(ways) - 0.5, -0.5)
        axes.spines[:].set_visible(False)
        axes.set_xticks([])
    most = max(sum(launch.moved for launch in half(way, HEADLINE)) for way in ways for _, half in halves)
    panels[0].set_xlim(0, most / 1e6 * 1.28)
    return figure


DRAWINGS = {"tile-order": tile_order, "hand-over": hand_over, "traffic": traffic}


def drawn(name: str) -> str:
    """The picture as SVG; its title is what the function says that it shows."""
    with matplotlib.rc_context(STYLE):
        return as_svg(DRAWINGS[name](), str(DRAWINGS[name].__doc__))


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    for name in DRAWINGS:
        (PICTURES / f"{name}.svg").write_text(drawn(name), encoding="utf-8")


if __name__ == "__main__":
    main()
