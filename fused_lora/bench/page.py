"""A results file as one page for a browser: page.html.jinja, filled in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from . import table
from .baselines import FROZEN, OURS_PREFIX
from .colours import COLOURS
from .groups import Group, Tally, candidates_of, groups_of, pace, standing
from .results import ResultsFile, Row, Spread
from .shapes import PASSES

# longer bars are cut here, and marked
LONGEST = 2.5


def write(file: ResultsFile, path: Path, failed: Mapping[str, str] | None = None) -> list[Path]:
    """The page at ``path`` and, where matplotlib is installed, a picture beside it; returns what was written.

    failed: candidate of a group -> why it got no time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(file, failed or {}), encoding="utf-8")
    try:
        from . import charts
    except ImportError:
        return [path]
    picture, environment = path.with_suffix(".png"), file.environment
    figure = charts.ratio_figure(groups_of(file), candidates_of(file.rows), f"{environment}, {environment.date}")
    picture.write_bytes(charts.as_png(figure))
    return [path, picture]


def render(file: ResultsFile, failed: Mapping[str, str]) -> str:
    found, env = groups_of(file), file.environment
    facts = {
        "device": env.device, "threads": env.threads, "torch": env.torch_version, "triton": env.triton_version,
        "CUDA": env.cuda_version, "Python": env.python_version, "date": env.date,
    }  # fmt: skip
    # known passes in their order, then others
    sections: dict[str, list[dict[str, Any]]] = {pass_: [] for pass_ in PASSES}
    for group in found:
        sections.setdefault(group.pass_, []).append(_card(group))
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True).get_template("page.html.jinja")
    return template.render(
        environment=env, facts=facts, colours=COLOURS, tally=Tally.of(found), failed=failed,
        sections={pass_: cards for pass_, cards in sections.items() if cards},
    )  # fmt: skip


def _card(group: Group) -> dict[str, Any]:
    """A group: its candidates' bars, fastest first. A bar of length 1 is the frozen baseline's, else the fastest's."""
    name, _, sizes = group.shape.partition(" (")
    rows = sorted(group.rows, key=lambda row: pace(row).median)
    unit = 1.0 if any(row.ratio for row in rows) else pace(rows[0]).median
    end = min(pace(rows[-1]).median / unit, LONGEST)
    bars = [_bar(row, row.candidate == group.ours, unit, end) for row in rows]
    return {
        "name": name, "sizes": sizes.removesuffix(")"), "dtype": group.dtype, "bars": bars, "place": standing(group)
    }  # fmt: skip


def _bar(row: Row, ours: bool, unit: float, end: float) -> dict[str, Any]:
    """Lengths in percent of the longest bar."""

    def length(value: float) -> float:
        return 100 * min(value / unit, end) / end

    spread: Spread = pace(row)
    others = "frozen" if row.candidate == FROZEN else "kin" if row.candidate.startswith(OURS_PREFIX) else "baseline"
    return {
        "name": row.candidate, "look": "ours" if ours else others, "ratio": spread.median / unit,
        "width": length(spread.median), "cut": spread.median / unit > end * 1.0001, "facts": _facts(row),
        "left": length(spread.p20), "spread": max(length(spread.p80) - length(spread.p20), 0.3),
    }  # fmt: skip


def _facts(row: Row) -> list[str]:
    facts = [f"{table.milliseconds(row)} ms"]
    facts += [f"wall {row.wall_ms:.4g} ms"] if row.wall_ms is not None else []
    facts += [f"host {row.host_share:.0%}"] if row.host_share is not None else []
    facts += [f"{row.tflops:.3g} TFLOP/s"] if row.tflops is not None and row.tflops >= 0.1 else []
    facts += [f"{row.gb_per_s:.3g} GB/s"] if row.gb_per_s is not None else []
    facts += [f"saved {table.size(row.saved_bytes)}"] if row.saved_bytes else []
    facts += [f"peak {table.size(row.peak_bytes)}"] if row.peak_bytes else []
    return facts
