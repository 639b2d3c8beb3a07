"""The page of the zoo: every model of other libraries that was adapted, and what differed."""

from __future__ import annotations

from itertools import groupby

from fused_lora.bench.results import ResultsFile, Row
from fused_lora.bench.table import markdown

from ..files import NOT_MEASURED, Files, source
from ..zoo.entry import CHECKS

# what a check found -> its cell
WORDS = {"ok": "=", "rounded": "≈", "warned": "warned", "known": "≠", "differs": "**≠**"}


def models(files: Files) -> str:
    return "\n".join(_models(name, file) for name, file in files["zoo"].items()) or f"{NOT_MEASURED}.\n"


def _models(name: str, file: ResultsFile) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in file.settings.items())
    cells_of = [check for row in file.rows for check in row.extra["checks"].values()]
    counted = {verdict: cells_of.count(verdict) for verdict in WORDS}
    layers, linears = (
        sum(count) for count in zip(*((row.median, row.extra["linears"]) for row in file.rows), strict=True)
    )
    parts = [
        f"{len(file.rows)} models, {layers:g} of their {linears} linear layers adapted. Of {len(cells_of)} checks "
        f"{counted['ok']} found the same bits, {counted['rounded']} a rounding's difference, {counted['warned']} a "
        f"difference that a warning names, and {counted['known'] + counted['differs']} another difference.\n\n"
        f"{source(name, file)} With {versions}.\n"
    ]
    heads = ["model", "family", "layers", *CHECKS, "what differs, and why"]
    for library, rows in groupby(file.rows, lambda row: row.extra["library"]):
        parts.append(f"### {library}\n\n{markdown(heads, [cells(row) for row in rows])}")
    return "\n".join(parts)


def cells(row: Row) -> list[str]:
    about = row.extra
    verdicts = [WORDS[about["checks"][check]] for check in CHECKS]
    return [f"`{about['name']}`", about["family"], f"{row.median:g} of {about['linears']}", *verdicts, _why(row)]


def _why(row: Row) -> str:
    """The notes, each once, after the checks that they are of."""
    by_note: dict[str, list[str]] = {}
    for check, note in row.extra["notes"].items():
        by_note.setdefault(note, []).append(check)
    said = [f"{', '.join(checks)}: {note}" for note, checks in by_note.items()]
    text = "; ".join([*said, *filter(None, [row.extra["all_linear"]])])
    # a bar would end the cell, and angles and stars mean something in Markdown
    for sign in "|<>*_[]":
        text = text.replace(sign, f"\\{sign}")
    return text
