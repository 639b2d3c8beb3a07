"""``make report``: what is made of the files in benchmarks/results/: every table and plot of measured numbers in README
and docs, and the table that ``impl="auto"`` chooses by.

    python -m tools.publish [--check]

A page is written by hand but for what stands between ``<!-- name -->`` and ``<!-- /name -->``. What no file holds says
"not measured". A test holds every page to what this makes of the files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fused_lora.bench.results import FOLDERS, load_all

from .files import Files
from .tables import choices, growth, host, layers, model_error, others, zoo

CHECKOUT = Path(__file__).parents[1]
# page -> marker -> what stands there
BLOCKS: dict[str, dict[str, Callable[[Files], str]]] = {
    "README.md": {"speed": layers.highlights},
    "docs/benchmarks.md": {
        "layers": layers.machines,
        "models": layers.models,
        "repeats": others.repeats,
        "peft": others.peft_steps,
    },
    "docs/peft.md": {"suite": others.peft_suite},
    "docs/compile.md": {"overhead": others.compiled_steps, "call": others.cost_of_a_call},
    "docs/distributed.md": {"memory": others.memory_by_strategy},
    "docs/gpu.md": {"auto": choices.choices},
    "docs/host.md": {"host": host.tables},
    "docs/quantized.md": {"quantized": others.quantized_steps},
    "docs/codegen.md": {"launches": others.launches},
    "docs/zoo.md": {"zoo": zoo.models},
    "docs/scaling.md": {
        "measured": growth.measured,
        "kept": growth.kept,
        "model": growth.model,
        "error": lambda files: model_error.errors(files, growth.compiled_rows(files)),
    },
}


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
    files = _files(checkout)
    made = {checkout / name: _page(checkout, name, files) for name in BLOCKS}
    made[checkout / choices.PATH] = choices.text(files)
    pictures = checkout / "docs" / "pictures"
    plots = layers.plots(files) | growth.plots(files)
    return made | {pictures / name: plot for name, plot in plots.items()}


def write(checkout: Path, page: str) -> None:
    """One page anew, for the command that wrote its results file."""
    (checkout / page).write_text(_page(checkout, page, _files(checkout)), encoding="utf-8")


def _files(checkout: Path) -> Files:
    return {kind: load_all(checkout / "benchmarks" / "results", kind) for kind in FOLDERS}


def _page(checkout: Path, name: str, files: Files) -> str:
    text = (checkout / name).read_text(encoding="utf-8")
    for marker, content in BLOCKS[name].items():
        text = _between(text, name, marker, content(files))
    return text


def _between(text: str, page: str, name: str, content: str) -> str:
    """text with what stands between a block's markers replaced."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{page} must have the markers {begin.strip()} and {end} once each")
    return text[: text.index(begin) + len(begin)] + content.rstrip("\n") + "\n" + text[text.index(end) :]


if __name__ == "__main__":
    sys.exit(main())
