"""``make report``: tables and plots of the README and of docs/, from the files in benchmarks/results/.

    python -m tools.publish [--check]

What no file holds says "not measured". A test holds every page to what this makes of the files.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from fused_lora.bench import charts, groups, table
from fused_lora.bench.baselines import EAGER, FROZEN, LORAFUSION, OURS
from fused_lora.bench.results import Results, Row
from fused_lora.bench.runner import Group
from fused_lora.bench.shapes import DECODE, FORWARD, STEP, TRAIN

from . import compiled, host_page, scaling_page
from .models import MODEL

CHECKOUT = Path(__file__).parents[1]
NOT_MEASURED = "**not measured**"
# what the README shows: title, work, the shape's name, dtype
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
# a time between two events, as files had it before they had a wall
GLIMPSE = (
    "Its times are between two device events, the host 0.1 ms ahead: where a call costs the host more than that, it is "
    "the host's time that shows."
)
# whom the default is held against, in words
BASELINES = ("addmm", EAGER, "peft", LORAFUSION)


def main(argv: Sequence[str] | None = None, checkout: Path = CHECKOUT) -> int:
    """0; with --check 1 where a page is not what the files say."""
    parser = argparse.ArgumentParser(prog="make report", description="Tables and plots from benchmarks/results/.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page differs")
    args = parser.parse_args(argv)
    stale = []
    for path, text in outputs(checkout).items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path)
        if not args.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for path in stale:
        print(f"{'differs from the results' if args.check else 'written'}: {path.relative_to(checkout)}")
    return 1 if args.check and stale else 0


def outputs(checkout: Path) -> dict[Path, str]:
    """path -> text of everything that is made of the results files."""
    folder, pictures = checkout / "benchmarks" / "results", checkout / "docs" / "pictures"
    files, scaling, models = (load_all(folder / part) for part in ("", "scaling", "models"))
    readme = checkout / "README.md"
    text = _between(readme.read_text(encoding="utf-8"), "speed", _readme_speed(files))
    made = {readme: text, checkout / "docs" / "benchmarks.md": _benchmarks_page(files, models)}
    for name, results in files.items():
        plot = charts.ratio_plot(groups.groups_of(results), groups.candidates_of(results), _title(results))
        made[pictures / f"measured-{Path(name).stem}.svg"] = plot
    known = compiled.read(checkout / "docs" / "codegen.md")
    made[checkout / "docs" / "scaling.md"] = scaling_page.page(scaling, _where, known)
    made |= {pictures / name: plot for name, plot in scaling_page.plots(scaling, known).items()}
    host = checkout / "docs" / "host.md"
    made[host] = _between(host.read_text(encoding="utf-8"), "host", host_page.tables(host_page.read(folder / "host")))
    return made


def load_all(folder: Path) -> dict[str, Results]:
    """File name -> results, the newest of each device, newest first."""
    files = {path.name: Results.load(path) for path in sorted(folder.glob("*.json"))}
    newest: dict[str, str] = {}
    for name in sorted(files, key=lambda name: files[name].environment.date):
        newest[files[name].environment.device] = name
    return {name: files[name] for name in reversed(newest.values())}


def _between(text: str, name: str, content: str) -> str:
    """text with what stands between the markers ``<!-- name -->`` and ``<!-- /name -->`` replaced."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the page must have the markers {begin.strip()} and {end} once each")
    return text[: text.index(begin) + len(begin)] + content + text[text.index(end) :]


# --------------------------------------------------------------------------------------------------
# The README
# --------------------------------------------------------------------------------------------------


def _readme_speed(files: dict[str, Results]) -> str:
    parts = []
    for kind, highlights in (("CPU", CPU_HIGHLIGHTS), ("GPU", GPU_HIGHLIGHTS)):
        found = [(name, results) for name, results in files.items() if groups.is_gpu(results) == (kind == "GPU")]
        if not found:
            parts.append(f"On a {kind}: {NOT_MEASURED}.\n")
        for name, results in found:
            source = f"[{name}](benchmarks/results/{name})"
            words = f"{in_words(results)}\n\n" if kind == "GPU" else ""
            parts.append(f"On a {kind}, {_where(results)}, from {source}:\n\n{words}{_highlights(results, highlights)}")
    return "\n".join(parts)


def in_words(results: Results) -> str:
    """Where a GPU's file has the default, layer by layer, against the baselines; and what its times are."""
    layers = [group for group in groups.groups_of(results) if group.rows[0].work != MODEL]
    default, native = groups.our_default(results), f"{OURS}native"
    names = [name for name in BASELINES if name in groups.candidates_of(results)]
    places = [place for group in layers if (place := table.standing(group, names)) is not None]
    ahead, level, behind = table.counts(places)
    won = {name: _tokens_won(layers, default, name) for name in names}
    fewest = min(itertools.chain(*won.values()), default=None)
    words = (
        f"**The default, `{default}`, is ahead of the fastest of {', '.join(names)} in {ahead} of {len(places)} "
        f"groups, level in {level} and behind in {behind}**; ahead of each alone: "
        + ", ".join(f"{name} in {len(found)}" for name, found in won.items())
        + (". " if fewest is None else f", none of them under {fewest:,} tokens. ")
    )
    if native in groups.candidates_of(results):
        found = _tokens_won(layers, native, default)
        where = f", none of them above {max(found):,} tokens" if found else ""
        words += f"`{native}` is ahead of it in {len(found)}{where}. "
    return words + _clocks(results)


def _tokens_won(layers: Iterable[Group], ours: str, name: str) -> list[int]:
    """Tokens of the groups in which ours is clearly ahead of the named candidate."""
    places = [(group, table.standing(replace(group, ours=ours), [name])) for group in layers]
    return [groups.tokens_of(group) for group, place in places if place is not None and place.won]


def _clocks(results: Results) -> str:
    """What a GPU's file calls time, and whose time that is."""
    ours = groups.our_default(results)
    if groups.has_wall(results):
        pairs = [(by[ours], min(by[name] for name in BASELINES if name in by)) for by in _walls(results) if ours in by]
        quicker = sum(mine < best for mine, best in pairs)
        return (
            f"That is the device's time, with the host hidden. By the wall's, which a user waits for, it takes less "
            f"than the fastest of them in {quicker} of {len(pairs)}."
        )
    quickest = [
        f"no {work} of `{ours}` takes less than {mine:.3f} ms, the frozen linear's quickest {frozen:.3f}"
        for work in (FORWARD, STEP)
        if (mine := _quickest(results, ours, work)) and (frozen := _quickest(results, FROZEN, work))
    ]
    return f"{GLIMPSE} However small the layer, {'; '.join(quickest)}." if quickest else GLIMPSE


def _quickest(results: Results, name: str, work: str) -> float | None:
    return min((row.median_ms for row in results.rows if (row.candidate, row.work) == (name, work)), default=None)


def _walls(results: Results) -> list[dict[str, float]]:
    """By group of one layer, what a user waits for each candidate, where it and a baseline were timed."""
    found = [
        {row.candidate: row.wall_ms for row in group.rows if row.wall_ms is not None}
        for group in groups.groups_of(results) if group.rows[0].work != MODEL
    ]  # fmt: skip
    return [walls for walls in found if set(BASELINES) & set(walls)]


def _highlights(results: Results, highlights: Iterable[tuple[str, str, str, str]]) -> str:
    names = [name for name in groups.candidates_of(results) if name != FROZEN]
    both = ", device / wall" if groups.has_wall(results) else ""
    lines = [f"| ÷ frozen linear{both} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for title, work, shape, dtype in highlights:
        rows = [
            row for row in results.rows
            if row.work == work and row.dtype == dtype and row.shape.split(" ")[0] == shape
        ]  # fmt: skip
        if rows:
            found = {row.candidate: row for row in rows}
            lines.append(f"| {title} | {' | '.join(_ratio(found.get(name), found.get(FROZEN)) for name in names)} |")
    return "\n".join(lines) + "\n"


def _ratio(row: Row | None, frozen: Row | None) -> str:
    """A candidate's time over the frozen linear's; the wall's too where it was measured."""
    if row is None or row.ratio_to_frozen is None:
        return "–"
    wall = "" if row.wall_ms is None or frozen is None else f" / {row.wall_ms / (frozen.wall_ms or 1):.2f}"
    return f"{row.ratio_to_frozen:.2f}{wall}"


# --------------------------------------------------------------------------------------------------
# docs/benchmarks.md
# --------------------------------------------------------------------------------------------------

_INTRODUCTION = """# Benchmarks

<!-- written by `make report` from benchmarks/results/; edit tools/publish.py instead -->

How to read them:

- Candidates take turns, in another order each round, so what slows the machine down slows them all. A ratio is the
  median of the ratios within each round, and *p20–p80* its spread.
- *÷ frozen* is the time over that of the bare `nn.Linear` with W frozen: the floor. It has no adapter, so it does less.
- Each candidate is held to float64 truth before it is timed, and a wrong one gets no time.
- `ours-…` is this project by `impl`; `addmm` the in-place arithmetic of Unsloth and axolotl; `eager` the formula as
  one writes it; `peft` PEFT's own layer; `parametrize` forms `W + scale · B A`.
- *saved* is kept between forward and backward, without parameters. *peak* is the most that PyTorch's allocator has out
  during the work, above what it had before, results and gradients included; what a library takes by other ways, such as
  a GEMM's packed operands on a CPU, is not in it.
- `backward` is timed after a forward that is not. On a CPU, calls take turns with copies of their inputs that outgrow
  its caches (16 at most); the weights stay the same. On a GPU the cache is flushed before every call.
- On a GPU *ms* and *÷ frozen* are the device's time: it is kept busy until the host has issued the whole call. *wall
  ms* is what a user waits for one call of many in a row, with whatever is in the cache; *host* is the share of it that
  the host needs to issue one. A * marks a time whose host could not be hidden. Files without a *wall ms* are older.
- `lorafusion` is LoRAFusion's own kernels, where its package is installed.
- `compiled` is `torch.compile` of `eager`: on a GPU in the first shapes alone, on a CPU where a C++ compiler is found.
- Losses stay in.

Measure your own machine with `fused-lora bench`, or `make gpu` where there is a GPU.
"""

_MODELS = """## Whole models

A training step, forward, backward and fused Adam on what is trained, with LoRA in all linear layers, made as a user
makes it: `ours-…` by `apply_lora`, `peft` by `get_peft_model`, `ours-in-peft` by `fuse` of that. `eager` has the
formula in the linear layers' places, and `full` trains every parameter. MiniLM is the real all-MiniLM-L6-v2, run by
Transformers; the blocks are of real sizes, with random weights. Dropout is off. *peak* is of one step, so Adam's state,
8 bytes a trained parameter in float32, comes on top. `make models` measures it where you are.
"""


def _benchmarks_page(files: dict[str, Results], models: dict[str, Results]) -> str:
    parts = [_INTRODUCTION]
    if not any(map(groups.is_gpu, files.values())):
        parts.append(f"## GPU\n\n{NOT_MEASURED}: no file in `benchmarks/results/` comes from a GPU.\n")
    for name, results in files.items():
        parts.append(_machine(name, results))
    parts.append(_MODELS)
    if not any(groups.is_gpu(results) and _has_models(results) for results in (*files.values(), *models.values())):
        parts.append(f"On a GPU: {NOT_MEASURED}.\n")
    for name, results in models.items():
        found = groups.groups_of(results)
        parts.append(f"### On {_where(results)}\n\nMeasured on {results.environment.date}; from `models/{name}`.\n")
        parts.append("\n".join(_standings(found)) + "\n")
        parts += ["\n".join([f"**{charts.short_title(group)}**", "", *_full(group), ""]) for group in found]
    return "\n".join(parts)


def _has_models(results: Results) -> bool:
    return any(row.work == MODEL for row in results.rows)


def _machine(name: str, results: Results) -> str:
    found = groups.groups_of(results)
    title = _title(results)
    picture = f"![{title}](pictures/measured-{Path(name).stem}.svg)"
    lines = [f"## {title}", "", f"{_where(results)}, measured on {results.environment.date}; from `{name}`.", ""]
    if groups.is_gpu(results):
        lines += [in_words(results), ""]
    lines += [picture, "", *_standings(found), ""]
    for group in found:
        lines += [f'??? note "{charts.short_title(group)}"', "", *(f"    {line}".rstrip() for line in _full(group)), ""]
    return "\n".join(lines)


def _standings(found: Sequence[Group]) -> list[str]:
    places = [(group, place) for group in found if (place := table.standing(group)) is not None]
    ahead, level, behind = table.counts([place for _, place in places])
    lines = [
        f"Against the fastest peer of each of {len(places)} groups: {ahead} faster, {level} level (their spreads "
        f"overlap), {behind} **slower**" + (":" if behind else "."),
        "",
    ]
    return lines + [f"- {charts.short_title(group)}: {place}" for group, place in places if place.lost]


def _full(group: Group) -> list[str]:
    shape = group.title.split("  ")[1]
    # a GPU's alone have a wall
    columns = [column for column in _COLUMNS if column[0] not in _WALL or any(row.wall_ms for row in group.rows)]
    lines = [shape, "", f"| {' | '.join(head for head, _ in columns)} |", "|---" * len(columns) + "|"]
    for row in sorted(group.rows, key=table.pace):
        lines.append(f"| {' | '.join(cell(row) for _, cell in columns)} |")
    return lines


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _range(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{low:.3f}–{high:.3f}"


_WALL = ("wall ms", "host")
_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("candidate", lambda row: row.candidate),
    ("÷ frozen", lambda row: _number(row.ratio_to_frozen, ".3f")),
    ("p20–p80", lambda row: _range(row.ratio_p20, row.ratio_p80)),
    ("ms", table.milliseconds),
    ("wall ms", lambda row: _number(row.wall_ms, ".4g")),
    ("host", lambda row: _number(row.host_share, ".0%")),
    ("rounds", lambda row: str(row.rounds)),
    ("TFLOP/s", lambda row: _number(row.tflops, ".3g")),
    ("GB/s", lambda row: _number(row.gb_per_s, ".3g")),
    ("saved", lambda row: table.size(row.saved_bytes)),
    ("peak", lambda row: table.size(row.peak_bytes)),
)


def _title(results: Results) -> str:
    return f"{results.environment.device}: time of a layer over the frozen linear's"


def _where(results: Results) -> str:
    env = results.environment
    versions = [f"torch {env.torch_version}"]
    if groups.is_gpu(results):
        versions += [f"triton {env.triton_version}", f"CUDA {env.cuda_version}"]
    return ", ".join([env.device, f"{env.threads} thread{'' if env.threads == 1 else 's'}", *versions])


if __name__ == "__main__":
    sys.exit(main())
