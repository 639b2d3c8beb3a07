"""Layers and whole models: the README's table, docs/benchmarks.md and its plots."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from fused_lora.bench import charts
from fused_lora.bench.baselines import EAGER, FROZEN, LORAFUSION, OURS_PREFIX, PEFT
from fused_lora.bench.groups import (
    Group,
    Tally,
    candidates_of,
    groups_of,
    has_wall,
    is_gpu,
    our_default,
    wall,
)
from fused_lora.bench.results import ResultsFile, Row
from fused_lora.bench.shapes import DECODE, FORWARD, STEP, TRAIN
from fused_lora.bench.table import NOTHING, cells, markdown

from ..files import NOT_MEASURED, Files, source
from ..models import MODEL
from . import choices
from .others import repeats_in_words

# what the README shows: title, pass, the shape's name, dtype
CPU_HIGHLIGHTS = (
    ("RichBoyNet training step, batch 10, rank 1, float32", TRAIN, "RichBoyNet", "float32"),
    ("512×2048×2048, rank 16, step, float32", STEP, "square-2048", "float32"),
    ("… bfloat16", STEP, "square-2048", "bfloat16"),
    ("… float32 adapters over bfloat16", STEP, "square-2048", "bfloat16+float32"),
    ("one token, 2048×2048, rank 16, forward, float32", DECODE, "decode-2048-m1", "float32"),
    ("… bfloat16", DECODE, "decode-2048-m1", "bfloat16"),
)
GPU_HIGHLIGHTS = (
    ("8192×4096×4096, rank 16, forward, bfloat16", FORWARD, "headline", "bfloat16"),
    ("… step", STEP, "headline", "bfloat16"),
    ("8192×4096×14336, rank 16, step, bfloat16", STEP, "llama-8b-up-m8192-r16", "bfloat16"),
    ("8192×14336×4096, rank 16, step, bfloat16", STEP, "llama-8b-down-m8192-r16", "bfloat16"),
    ("2048×4096×4096, rank 16, step, bfloat16", STEP, "llama-8b-qo-m2048-r16", "bfloat16"),
    ("512×4096×4096, rank 16, step, bfloat16", STEP, "llama-8b-qo-m512-r16", "bfloat16"),
    ("one token, 4096×4096, rank 16, forward, bfloat16", DECODE, "decode-4096-m1", "bfloat16"),
    ("16 tokens, 4096×4096, rank 16, forward, bfloat16", DECODE, "decode-4096-m16", "bfloat16"),
)
# older files have the time between two events, and no wall time
GLIMPSE = (
    "Its times are between two device events, the host 0.1 ms ahead: where a call costs the host more than that, it is "
    "the host's time that shows."
)
# the baselines that the default is compared with, in words
BASELINES = ("addmm", EAGER, PEFT, LORAFUSION)


def highlights(files: Files) -> str:
    parts = []
    for kind, chosen in (("CPU", CPU_HIGHLIGHTS), ("GPU", GPU_HIGHLIGHTS)):
        found = [(name, file) for name, file in files["layers"].items() if is_gpu(file) == (kind == "GPU")]
        if not found:
            parts.append(f"On a {kind}: {NOT_MEASURED}.\n")
        for name, file in found:
            words = f"{in_words(file)}\n\n" if kind == "GPU" else ""
            link = f"[{name}](benchmarks/results/{name})"
            parts.append(f"On a {kind}, {file.environment}, from {link}:\n\n{words}{_highlights(file, chosen)}")
        if kind == "CPU":
            parts += [f"{repeats_in_words(name, file)}\n" for name, file in files["native"].items()]
    return "\n".join(parts)


def _highlights(file: ResultsFile, chosen: Iterable[tuple[str, str, str, str]]) -> str:
    names, ours = [name for name in candidates_of(file.rows) if name != FROZEN], our_default(file)
    lines = []
    for title, pass_, shape, dtype in chosen:
        found = {
            row.candidate: row for row in file.rows
            if (row.pass_, row.shape.split(" ")[0], row.dtype) == (pass_, shape, dtype)
        }  # fmt: skip
        if found:
            lines.append([title, *(_ratio(found.get(name), found.get(FROZEN), name == ours) for name in names)])
    return markdown([f"÷ frozen baseline{', device / wall' if has_wall(file) else ''}", *names], lines)


def _ratio(row: Row | None, frozen: Row | None, ours: bool) -> str:
    """A candidate's time over the frozen baseline's; ours with its spread, the wall's too where it was measured."""
    if row is None or row.ratio is None:
        return NOTHING
    spread = f" ({row.ratio.p20:.2f}–{row.ratio.p80:.2f})" if ours else ""
    walls = "" if row.wall_ms is None or frozen is None else f" / {row.wall_ms / (frozen.wall_ms or 1):.2f}"
    return f"{row.ratio.median:.2f}{spread}{walls}"


# --------------------------------------------------------------------------------------------------
# In words
# --------------------------------------------------------------------------------------------------


def in_words(file: ResultsFile) -> str:
    """Where a GPU's file has the fused kernels, layer by layer, against the baselines; what "auto" takes; what the
    times are."""
    layers = [group for group in groups_of(file) if group.pass_ != MODEL]
    default, native, present = our_default(file), f"{OURS_PREFIX}native", candidates_of(file.rows)
    names = [name for name in BASELINES if name in present]
    tally = Tally.of(layers, names)
    won = {name: _tokens_won(Tally.of(layers, [name])) for name in names}
    fewest = min(itertools.chain(*won.values()), default=None)
    words = (
        f"**`{default}` is ahead of the fastest of {', '.join(names)} in {tally.ahead} of "
        f"{len(tally.places)} groups, level in {tally.level} and behind in {tally.behind}**; ahead of each alone: "
        + ", ".join(f"{name} in {len(found)}" for name, found in won.items())
        + (". " if fewest is None else f", none of them under {fewest:,} tokens. ")
    )
    if native in present:
        found = _tokens_won(Tally.of(layers, [default], ours=native))
        where = f", none of them above {max(found):,} tokens" if found else ""
        words += f"`{native}` is ahead of it in {len(found)}{where}. "
    return words + choices.words(file) + _clocks(file, layers)


def _tokens_won(tally: Tally) -> list[int]:
    return [place.group.tokens for place in tally.won]


def _clocks(file: ResultsFile, layers: Sequence[Group]) -> str:
    """What the times of a GPU's file are: the device's, or what a user waits."""
    ours = our_default(file)
    if has_wall(file):
        tally = Tally.of(layers, BASELINES, wall)
        return (
            f"That is the device's time, with the host hidden. By the wall's, which a user waits for, it takes less "
            f"than the fastest of them in {tally.ahead} of {len(tally.places)}."
        )
    quickest = [
        f"no {pass_} of `{ours}` takes less than {mine:.3f} ms, the frozen baseline's quickest {frozen:.3f}"
        for pass_ in (FORWARD, STEP)
        if (mine := _quickest(file, ours, pass_)) and (frozen := _quickest(file, FROZEN, pass_))
    ]
    return f"{GLIMPSE} However small the layer, {'; '.join(quickest)}." if quickest else GLIMPSE


def _quickest(file: ResultsFile, name: str, pass_: str) -> float | None:
    return min((row.median for row in file.rows if (row.candidate, row.pass_) == (name, pass_)), default=None)


# --------------------------------------------------------------------------------------------------
# docs/benchmarks.md
# --------------------------------------------------------------------------------------------------


def machines(files: Files) -> str:
    parts = []
    if not any(map(is_gpu, files["layers"].values())):
        parts.append(f"## GPU\n\n{NOT_MEASURED}: no file in `benchmarks/results/` comes from a GPU.\n")
    for name, file in files["layers"].items():
        found = groups_of(file)
        parts += [f"## {_title(file)}\n", source(name, file) + "\n"]
        parts += [in_words(file) + "\n"] if is_gpu(file) else []
        parts += [f"![{_title(file)}](pictures/{_plot_name(name)})\n", _standings(found)]
        parts += [_folded(group) for group in found]
    return "\n".join(parts)


def models(files: Files) -> str:
    parts = []
    every = (*files["layers"].values(), *files["models"].values())
    if not any(is_gpu(file) and any(row.pass_ == MODEL for row in file.rows) for file in every):
        parts.append(f"On a GPU: {NOT_MEASURED}.\n")
    for name, file in files["models"].items():
        found = groups_of(file)
        parts += [f"### {file.environment.device}\n", source(name, file) + "\n", _standings(found)]
        parts += [f"**{group.short_title}**\n\n{_table(group)}" for group in found]
    return "\n".join(parts)


def plots(files: Files) -> dict[str, str]:
    """File name -> SVG."""
    made = {}
    for name, file in files["layers"].items():
        figure = charts.ratio_figure(groups_of(file), candidates_of(file.rows), _title(file))
        made[_plot_name(name)] = charts.as_svg(figure, _title(file))
    return made


def _plot_name(name: str) -> str:
    return f"measured-{Path(name).stem}.svg"


def _title(file: ResultsFile) -> str:
    return f"{file.environment.device}: time of a layer over the frozen baseline's"


def _standings(found: Sequence[Group]) -> str:
    tally = Tally.of(found)
    words = (
        f"Against the fastest baseline of each of {len(tally.places)} groups: {tally.ahead} faster, "
        f"{tally.level} level (their spreads overlap), {tally.behind} **slower**" + (":" if tally.behind else ".")
    )
    return "\n".join([words, "", *(f"- {place.group.short_title}: {place}" for place in tally.lost), ""])


def _table(group: Group) -> str:
    return f"{group.shape}\n\n{markdown(*cells(group.rows))}"


def _folded(group: Group) -> str:
    lines = (f"    {line}".rstrip() for line in _table(group).splitlines())
    return "\n".join([f'??? note "{group.short_title}"', "", *lines, ""])
