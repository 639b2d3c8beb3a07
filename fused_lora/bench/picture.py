"""A results file as one PNG: every candidate's time over the frozen linear's, group by group. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from . import charts, groups, table
from .baselines import FROZEN
from .results import Results
from .svg import COLOURS


def draw(results: Results, path: Path) -> None:
    found = [group for group in groups.groups_of(results) if any(row.ratio_to_frozen for row in group.rows)]
    names = [name for name in groups.candidates_of(results) if name != FROZEN]
    ours = groups.our_default(results)
    colour = {name: COLOURS[key][0] for name, key in charts.colours(names, ours).items()}
    ink, muted, grid = (COLOURS[name][0] for name in ("ink", "muted", "grid"))
    style: Any = {"font.family": "DejaVu Sans", "font.size": 9.5, "text.color": ink, "axes.edgecolor": grid}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11, 1.8 + 0.27 * max(len(found), 1)), facecolor="white", layout="constrained")
        axes = figure.add_subplot()
        for y, group in enumerate(found):
            for row in group.rows:
                if row.candidate not in names or row.ratio_to_frozen is None:
                    continue
                mine = row.candidate == ours
                middle, low, high = (min(value, charts.LARGEST_RATIO) for value in table.pace(row))
                axes.plot([low, high], [y, y], color=colour[row.candidate], lw=2 if mine else 0.8, zorder=2 + mine)
                axes.plot([middle], [y], "o", color=colour[row.candidate], ms=7 if mine else 4.5, zorder=3 + mine)
                if mine and row.ratio_to_frozen > charts.LARGEST_RATIO:
                    place = (middle + 0.02, y)
                    axes.annotate(f"{row.ratio_to_frozen:.1f}", place, color=colour[row.candidate], va="center")
        handles = [axes.plot([], [], "o", color=colour[name], label=name)[0] for name in names]
        axes.legend(handles=handles, ncols=len(names), loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False)
        axes.axvline(1, color=muted, lw=1)
        axes.set_yticks(range(len(found)), [charts.short_title(group) for group in found], color=ink)
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_xlim(charts.smallest_ratio(found) - 0.02, charts.LARGEST_RATIO + 0.03)
        axes.grid(axis="x", color=grid)
        axes.tick_params(length=0, labelcolor=ink)
        axes.set_xlabel(
            f"time ÷ frozen linear's, lower is better; {charts.LARGEST_RATIO:g} stands for more", color=muted
        )
        axes.spines[:].set_visible(False)
        env = results.environment
        figure.suptitle(f"{env.device}, {env.threads} threads, torch {env.torch_version}, {env.date}", weight="bold")
        figure.savefig(path, format="png", dpi=140)
