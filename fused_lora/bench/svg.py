"""Just enough SVG for plots and drawings: the same bytes every time, light and dark by the reader's own setting."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

# class -> its colour in light, in dark; "ink" and "muted" are for text and lines
COLOURS = {
    "ink": ("#1f2430", "#e8eaf0"),
    "muted": ("#646b78", "#a3aab8"),
    "grid": ("#dfe2e8", "#3a404d"),
    "paper": ("#ffffff", "#1b1e26"),
    "ours": ("#12806f", "#3fc9b3"),
    "floor": ("#8a92a0", "#7b8494"),
    "blue": ("#2f6fde", "#7fa8f5"),
    "orange": ("#c95f14", "#f0a063"),
    "violet": ("#8a4fc7", "#bd93ec"),
    "red": ("#c2334d", "#f0808f"),
    "olive": ("#77801d", "#bcc658"),
    "cyan": ("#0e88a6", "#62c9e2"),
    "pink": ("#c0478e", "#ee94c8"),
    "brown": ("#8a5a3b", "#cb9c7a"),
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def _style() -> str:
    light, dark = (
        "".join(f".{name}{{fill:{pair[mode]}}}.{name}-line{{stroke:{pair[mode]}}}" for name, pair in COLOURS.items())
        for mode in (0, 1)
    )
    return f"text{{font-family:{FONT}}}{light}@media (prefers-color-scheme: dark){{{dark}}}"


class Svg:
    """A drawing of width × height units on the paper's colour; text is measured in the same units."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height = width, height
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(width)} {_n(height)}" role="img" '
            f'aria-label="{escape(title)}">',
            f"<title>{escape(title)}</title>",
            f"<style>{_style()}</style>",
        ]
        self.rect(0, 0, width, height, "paper", radius=8)

    def rect(
        self, x: float, y: float, width: float, height: float, colour: str, radius: float = 0, opacity: float = 1
    ) -> None:
        faint = "" if opacity == 1 else f' fill-opacity="{_n(opacity)}"'
        self._parts.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" rx="{_n(radius)}" '
            f'class="{colour}"{faint}/>'
        )

    def text(
        self, x: float, y: float, text: str, size: float = 13, colour: str = "ink", anchor: str = "start",
        bold: bool = False,
    ) -> None:  # fmt: skip
        """y is the baseline's. anchor: "start", "middle" or "end"."""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{_n(x)}" y="{_n(y)}" font-size="{_n(size)}" text-anchor="{anchor}" class="{colour}"{weight}>'
            f"{escape(text)}</text>"
        )

    def line(
        self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.5, dashed: bool = False,
        arrow: bool = False,
    ) -> None:  # fmt: skip
        """arrow: a head at the last point."""
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke-width="{_n(width)}" stroke-linejoin="round" '
            f'class="{colour}-line"{dashes}/>'
        )
        if arrow:
            (x0, y0), (x1, y1) = points[-2], points[-1]
            length = max(((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5, 1e-9)
            ux, uy = (x1 - x0) / length, (y1 - y0) / length
            back = [(x1 - 8 * ux - 4 * uy, y1 - 8 * uy + 4 * ux), (x1 - 8 * ux + 4 * uy, y1 - 8 * uy - 4 * ux)]
            head = " ".join(f"{_n(x)},{_n(y)}" for x, y in ((x1, y1), *back))
            self._parts.append(f'<polygon points="{head}" class="{colour}"/>')

    def dot(self, x: float, y: float, colour: str, radius: float = 3.5) -> None:
        self._parts.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}" class="{colour}"/>')

    def render(self) -> str:
        return "\n".join([*self._parts, "</svg>"]) + "\n"


def _n(value: float) -> str:
    """At most two decimals: what differs by less is the same picture."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
