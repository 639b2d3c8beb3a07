"""A results file as one page for a browser: no script, nothing fetched, light and dark, wide and narrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from . import groups, table
from .baselines import FROZEN, OURS
from .results import Results, Row
from .runner import Group
from .shapes import WORKS
from .svg import COLOURS, FONT

# longer bars are cut here, and marked
LONGEST = 2.5


def write(results: Results, path: Path, wrong: Mapping[str, str] | None = None) -> list[Path]:
    """The page at ``path`` and, where matplotlib is installed, a picture beside it; returns what was written.

    wrong: candidate of a group -> why it got no time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(results, wrong or {}), encoding="utf-8")
    try:
        from .picture import draw
    except ImportError:
        return [path]
    picture = path.with_suffix(".png")
    draw(results, picture)
    return [path, picture]


def page(results: Results, wrong: Mapping[str, str]) -> str:
    found = groups.groups_of(results)
    env = results.environment
    facts = {
        "device": env.device, "threads": str(env.threads), "torch": env.torch_version, "triton": env.triton_version,
        "CUDA": env.cuda_version, "Python": env.python_version, "date": env.date,
    }  # fmt: skip
    chips = "".join(f"<li>{escape(key)} <b>{escape(value)}</b></li>" for key, value in facts.items() if value)
    works = sorted({group.title.split("  ")[0] for group in found}, key=_place)
    sections = "".join(_section(work, [g for g in found if g.title.split("  ")[0] == work]) for work in works)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>fused_lora on {escape(env.device)}</title><style>{_STYLE}</style></head>\n'
        f"<body><main><h1>fused_lora on {escape(env.device)}</h1><ul class=chips>{chips}</ul>"
        f"{_verdict(found)}{_wrong(wrong)}"
        f"<p class=how>A bar is the time over that of the bare linear layer with W frozen, the floor at 1.00; the thin "
        f"line is the 20th to 80th percentile of the rounds. Candidates took turns; each was held to float64 truth "
        f"first.</p>{sections}</main></body></html>\n"
    )


def _place(work: str) -> tuple[int, str]:
    """Known works in their order, then others."""
    return (WORKS.index(work) if work in WORKS else len(WORKS), work)


def _verdict(found: Sequence[Group]) -> str:
    places = [place for place in map(table.standing, found) if place is not None]
    ahead, level, behind = table.counts(places)
    counts = (("faster", ahead, "good"), ("level", level, ""), ("slower", behind, "bad"))
    tiles = "".join(f"<li class='{look}'><b>{count}</b> {word}</li>" for word, count, look in counts)
    losses = "".join(
        f"<li>{escape(place.group)}: {escape(str(place))}</li>" for place in places if place.clear and place.lead < 0
    )
    return (
        f"<h2>Ours against the fastest peer, in {len(places)} groups</h2><ul class=tiles>{tiles}</ul>"
        + (f"<h3>Where ours is slower</h3><ul class=losses>{losses}</ul>" if losses else "")
    )  # fmt: skip


def _wrong(wrong: Mapping[str, str]) -> str:
    items = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in wrong.items())
    return f"<h3>Wrong, so without a time</h3><ul class=losses>{items}</ul>" if items else ""


def _section(work: str, found: Sequence[Group]) -> str:
    return f"<h2>{escape(work)}</h2><div class=groups>{''.join(map(_group, found))}</div>"


def _group(group: Group) -> str:
    _, shape, dtype = group.title.split("  ")
    name, _, sizes = shape.partition(" (")
    rows = sorted(group.rows, key=table.pace)
    end = min(max(table.pace(row)[0] for row in rows) / _unit(rows), LONGEST)
    bars = "".join(_row(row, row.candidate == group.ours, _unit(rows), end) for row in rows)
    place = table.standing(group)
    look = "" if place is None or not place.clear else " good" if place.lead > 0 else " bad"
    verdict = "" if place is None else f"<p class='verdict{look}'>{escape(str(place))}</p>"
    return (
        f"<article><h3>{escape(name)} <small>{escape(dtype)}</small></h3>"
        f"<p class=sizes>{escape(sizes.removesuffix(')'))}</p>{bars}{verdict}</article>"
    )


def _unit(rows: Sequence[Row]) -> float:
    """What a bar of length 1 is: the floor's pace, or where there is no floor, the fastest."""
    return 1.0 if any(row.ratio_to_frozen is not None for row in rows) else min(row.median_ms for row in rows)


def _row(row: Row, ours: bool, unit: float, end: float) -> str:
    ratio, low, high = (value / unit for value in table.pace(row))
    others = "floor" if row.candidate == FROZEN else "kin" if row.candidate.startswith(OURS) else "peer"
    look = "ours" if ours else others
    width, cut = 100 * min(ratio, end) / end, ratio > end * 1.0001
    left, right = (100 * min(value, end) / end for value in (low, high))
    facts = [f"{table.milliseconds(row)} ms"]
    facts += [f"wall {row.wall_ms:.4g} ms"] if row.wall_ms is not None else []
    facts += [f"host {row.host_share:.0%}"] if row.host_share is not None else []
    facts += [f"{row.tflops:.3g} TFLOP/s"] if row.tflops is not None and row.tflops >= 0.1 else []
    facts += [f"{row.gb_per_s:.3g} GB/s"] if row.gb_per_s is not None else []
    facts += [f"saved {table.size(row.saved_bytes)}"] if row.saved_bytes else []
    facts += [f"peak {table.size(row.peak_bytes)}"] if row.peak_bytes else []
    spread = "" if cut else f"<i style='left:{left:.1f}%;width:{max(right - left, 0.3):.1f}%'></i>"
    return (
        f"<div class='row {look}'><span class=name>{escape(row.candidate)}</span><span class=ratio>{ratio:.2f}"
        f"</span><span class=track><span class='bar{' cut' if cut else ''}' style='width:{width:.1f}%'></span>{spread}"
        f"</span><span class=facts>{' · '.join(facts)}</span></div>"
    )


def _variables(mode: int) -> str:
    return "".join(f"--{name}:{pair[mode]};" for name, pair in COLOURS.items())


_STYLE = (
    f":root{{{_variables(0)}--back:#f4f5f8}}"
    f"@media (prefers-color-scheme:dark){{:root{{{_variables(1)}--back:#12141a}}}}"
    f"*{{box-sizing:border-box}}body{{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 {FONT}}}"
    "main{max-width:1180px;margin:0 auto;padding:20px 16px 60px}"
    "h1{font-size:clamp(22px,5vw,32px);line-height:1.2;margin:.4em 0}h2{margin:1.6em 0 .5em;font-size:20px}"
    "h3{margin:0;font-size:16px;overflow-wrap:anywhere}small{color:var(--muted);font-weight:400}"
    "ul{padding:0;list-style:none}.chips{display:flex;flex-wrap:wrap;gap:6px}"
    ".chips li{background:var(--paper);border:1px solid var(--grid);border-radius:99px;padding:1px 11px;font-size:13px}"
    ".tiles{display:flex;flex-wrap:wrap;gap:12px}.tiles li{flex:1 1 90px;background:var(--paper);padding:10px 16px;"
    "border-radius:10px;border:1px solid var(--grid)}.tiles b{display:block;font-size:28px;line-height:1.2}"
    ".tiles .good b,.verdict.good{color:var(--ours)}.tiles .bad b,.verdict.bad,.losses{color:var(--red)}"
    ".losses li{margin:2px 0 2px 1em;list-style:disc;overflow-wrap:anywhere}.how{color:var(--muted);max-width:75ch}"
    ".groups{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(350px,100%),1fr));gap:14px}"
    "article{background:var(--paper);border:1px solid var(--grid);border-radius:12px;padding:14px 16px;min-width:0}"
    ".sizes{margin:0 0 8px;color:var(--muted);font-size:13px}"
    ".row{display:grid;grid-template-columns:1fr auto;gap:0 8px;padding:3px 0}.ratio{font-variant-numeric:tabular-nums}"
    ".track{grid-column:1/3;position:relative;height:9px;background:var(--grid);border-radius:3px;overflow:hidden}"
    ".bar{position:absolute;inset:0 auto 0 0;background:var(--floor);border-radius:3px}"
    ".ours .bar,.kin .bar{background:var(--ours)}.kin .bar{opacity:.5}.peer .bar{background:var(--blue)}"
    ".bar.cut{border-right:4px double var(--paper)}"
    ".track i{position:absolute;top:3.5px;height:2px;background:var(--ink)}"
    ".facts{grid-column:1/3;color:var(--muted);font-size:12px;overflow-wrap:anywhere}"
    ".ours .name,.ours .ratio{font-weight:700;color:var(--ours)}.verdict{margin:8px 0 0;font-size:13px}"
)
