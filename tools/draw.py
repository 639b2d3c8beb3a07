"""Draws the pictures of how-it-works.md: ``python -m tools.draw`` writes docs/pictures/*.svg."""

from __future__ import annotations

from pathlib import Path

from fused_lora.bench.svg import Svg
from tools.traffic import ADDMM, EAGER, FROZEN, OURS, PEFT, Launch, Layer, backward, forward

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
HEADLINE = Layer(M=8192, K=4096, N=4096, R=16)
GROUP_M = 8


def tile_of(index: int, tiles_m: int, tiles_p: int, group: int) -> tuple[int, int]:
    """Row and column of the tile at a place in line, publishers first: ``_tile`` of the kernel, in plain Python."""
    if index < tiles_m:
        return index, 0
    rest, columns = index - tiles_m, tiles_p - 1
    first = rest // (group * columns) * group
    rows = min(tiles_m - first, group)
    within = rest % (group * columns)
    return first + within % rows, within // rows + 1


def tile_order() -> Svg:
    tiles_m, tiles_p, group, cell = 6, 7, 3, 46
    svg = Svg(760, 400, "Tiles of y, numbered by ticket: the first column is handed out first, and publishes h")
    left, top = 60, 62
    svg.text(left, 30, "y, tile by tile; the number is the tile's ticket", 15, bold=True)
    svg.text(left - 12, top + tiles_m * cell / 2, "M", 14, "muted", "end")
    svg.text(left + tiles_p * cell / 2, top + tiles_m * cell + 22, "N", 14, "muted", "middle")
    for index in range(tiles_m * tiles_p):
        row, column = tile_of(index, tiles_m, tiles_p, group)
        x, y = left + column * cell, top + row * cell
        if column == 0:
            svg.rect(x + 1.5, y + 1.5, cell - 3, cell - 3, "ours", 4)
        else:
            svg.rect(x + 1.5, y + 1.5, cell - 3, cell - 3, "blue" if row < group else "violet", 4, 0.22)
        svg.text(x + cell / 2, y + cell / 2 + 5, str(index), 14, "paper" if column == 0 else "ink", "middle", True)
    text = left + tiles_p * cell + 34
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
    for place, (colour, opacity, head, *lines) in enumerate(notes):
        y = top + 14 + place * 84
        svg.rect(text, y - 12, 16, 16, colour, 3, opacity)
        svg.text(text + 26, y + 1, head, 14, bold=True)
        for row, line in enumerate(lines):
            svg.text(text + 26, y + 21 + 18 * row, line, 12.5, "muted")
    svg.text(left, 386, "Whoever waits holds a higher ticket than whom it waits for, so the wait always ends.", 13)
    return svg


def hand_over() -> Svg:
    svg = Svg(760, 270, "A publisher stores h and raises a flag while the other tiles are still in their main loops")
    svg.text(24, 30, "The hand-over of h, in time (not to scale)", 15, bold=True)
    left, unit = 150, 52
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
    for row, (name, spans) in enumerate(lanes.items()):
        y = 56 + row * 56
        svg.text(left - 14, y + 24, name, 13, "muted", "end")
        for start, length, colour, opacity, label in spans:
            svg.rect(left + start * unit, y, length * unit - 2, 38, colour, 4, opacity)
            svg.text(left + (start + length / 2) * unit, y + 24, label, 12, "ink", "middle")
    raised = left + 7.5 * unit
    svg.line([(raised, 48), (raised, 226)], "orange", 1.5, dashed=True)
    svg.line([(raised, 94), (left + 7.6 * unit + 2, 112)], "orange", 2, arrow=True)
    svg.text(raised, 244, "flag raised: h is in memory", 12.5, "orange", "middle", True)
    svg.text(24, 262, "Later waves find the flag up and wait for nothing.", 12.5, "muted")
    return svg


def traffic() -> Svg:
    """Bytes read and written by each launch of a forward and a backward."""
    ways, halves = (FROZEN, OURS, ADDMM, EAGER, PEFT), (("forward", forward), ("backward", backward))
    svg = Svg(760, 545, "Bytes that each way to compute a LoRA layer reads and writes, launch by launch")
    svg.text(24, 30, "Memory traffic of one layer, launch by launch", 15, bold=True)
    shape = f"{HEADLINE.M:,} tokens, {HEADLINE.K} → {HEADLINE.N}, rank {HEADLINE.R}, 16-bit"
    svg.text(24, 50, f"{shape}. Strong: read; faint: written.", 12.5, "muted")
    svg.text(
        24,
        68,
        "Arithmetic, not a measurement: every launch reads its operands and writes its result once.",
        12.5,
        "muted",
    )
    left, width = 150, 440
    most = max(sum(launch.moved for launch in half(way, HEADLINE)) for way in ways for _, half in halves)
    for which, (title, half) in enumerate(halves):
        top = 104 + which * 222
        svg.text(24, top, title, 14, bold=True)
        for row, way in enumerate(ways):
            y, launches = top + 14 + row * 36, half(way, HEADLINE)
            svg.text(left - 12, y + 18, way, 12.5, "ink" if way == OURS else "muted", "end", way == OURS)
            end = _bars(svg, launches, left, y, width / most, "ours" if way == OURS else "floor")
            total = sum(launch.moved for launch in launches) / 1e6
            count = f"{len(launches)} launch" + ("es" if len(launches) > 1 else "")
            svg.text(end + 8, y + 18, f"{total:,.0f} MB, {count}", 12.5, "ink", bold=way == OURS)
    return svg


def _bars(svg: Svg, launches: list[Launch], x: float, y: float, scale: float, colour: str) -> float:
    """A bar for each launch, its reads strong and its writes faint; returns where the last ends."""
    for launch in launches:
        for count, opacity in ((launch.reads, 0.95), (launch.writes, 0.45)):
            svg.rect(x, y, max(count * scale - 0.6, 0.6), 26, colour, 0, opacity)
            x += count * scale
        x += 2
    return x


DRAWINGS = {"tile-order": tile_order, "hand-over": hand_over, "traffic": traffic}


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (PICTURES / f"{name}.svg").write_text(draw().render(), encoding="utf-8")


if __name__ == "__main__":
    main()
