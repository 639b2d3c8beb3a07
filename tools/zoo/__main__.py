"""``make zoo``: adapt every model of the zoo, compare it, and write what was found to the results file and the page.

    python -m tools.zoo [--only NAMES] [--jobs N] [--out FILE]

Each model is examined in a process of its own: one that breaks stops no other.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fused_lora.bench.results import Environment, ResultsFile, Row, default_path

from .. import publish
from ..tables.zoo import cells
from .checks import examine
from .compared import DIFFERS, brief
from .entry import CHECKS, Entry

# library -> the module with its table
LIBRARIES = {
    "torch.nn": "of_torch",
    "torchvision": "of_torchvision",
    "timm": "of_timm",
    "transformers": "of_transformers",
}
PACKAGES = ("peft", "torchvision", "timm", "transformers")
# seconds for one model
LIMIT_S = 300.0
KNOWN = "known"


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 where a model differs and no reason is known, or differs no longer; 2 where nothing is to do."""
    parser = argparse.ArgumentParser(prog="make zoo", description="Models of other libraries, adapted and compared.")
    parser.add_argument("--only", metavar="NAMES", help="models whose names have one of these in them, by commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="models at a time; default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: of a whole run, benchmarks/results/zoo/")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    entries = chosen(args.only)
    if not entries:
        print(f"--only must name a model of the zoo, got {args.only!r}", file=sys.stderr)
        return 2
    environment = Environment.here(torch.device("cpu"))
    file = ResultsFile("zoo", "make zoo", environment, settings={name: _version(name) for name in PACKAGES})
    found = {}
    with tqdm(total=len(entries), unit="model") as bar:
        for entry, result in examined(entries, args.jobs):
            found[entry] = result
            bar.set_postfix_str(entry.name)
            bar.update()
    unexplained = []
    for entry in entries:
        unexplained += settle(entry, found[entry])
        row = row_of(entry, found[entry])
        file.add([row])
        print("  ".join(str(cell).strip("`") for cell in cells(row)))
    for line in unexplained:
        print(f"not as expected: {line}")
    path = args.out or (None if args.only else default_path("zoo", environment))
    if path is not None:
        file.save(path)
        print(f"written: {path}")
    if args.out is None and path is not None:
        publish.write(publish.CHECKOUT, "docs/zoo.md")
    return 1 if unexplained else 0


def chosen(only: str | None) -> list[Entry]:
    wanted = [name.strip().lower() for name in (only or "").split(",") if name.strip()]
    entries = [entry for module in LIBRARIES.values() for entry in _table(module)]
    return [entry for entry in entries if not wanted or any(name in entry.title.lower() for name in wanted)]


def _table(module: str) -> list[Entry]:
    try:
        table = importlib.import_module(f"{__package__}.{module}")
    except ModuleNotFoundError as error:
        print(f"left out: {module}, for want of {error.name}", file=sys.stderr)
        return []
    models: list[Entry] = table.MODELS
    return models


def examined(entries: Sequence[Entry], jobs: int) -> Iterator[tuple[Entry, dict[str, Any]]]:
    """Each entry with what was found, as they end."""
    # forked: the libraries are imported once
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(entries))
    running: dict[Any, tuple[Entry, Any]] = {}
    while waiting or running:
        while waiting and len(running) < max(jobs, 1):
            entry = waiting.pop()
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(entry, there), daemon=True)
            process.start()
            there.close()
            running[here] = entry, process
        ready = wait(list(running), timeout=LIMIT_S)
        # nothing for so long: all that run are over their time
        for pipe in ready or list(running):
            assert isinstance(pipe, Connection)
            entry, process = running.pop(pipe)
            result = _received(pipe) if ready else broken(f"no answer in {LIMIT_S:g} seconds")
            process.kill()
            process.join()
            yield entry, result


def _received(pipe: Connection) -> dict[str, Any]:
    try:
        result: dict[str, Any] = pipe.recv()
    except EOFError:
        return broken("the process ended without an answer")
    return result


def _child(entry: Entry, pipe: Connection) -> None:
    # what libraries print would break the bar
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        result = examine(entry)
    except Exception as error:
        result = broken(brief(error))
    pipe.send(result)
    pipe.close()


def broken(why: str) -> dict[str, Any]:
    """What is found of a model that could not be examined."""
    checks = dict.fromkeys(CHECKS, DIFFERS)
    return {"linears": 0, "adapted": 0, "checks": checks, "notes": {"fresh": why}, "all_linear": ""}


def settle(entry: Entry, found: dict[str, Any]) -> list[str]:
    """Put the known reasons to what differs; what is not as expected, in words."""
    unexplained = []
    for check, verdict in found["checks"].items():
        reason = entry.known.get(check)
        if verdict == DIFFERS and reason is None:
            unexplained.append(f"{entry.title}, {check}: {found['notes'].get(check, '')}")
        elif verdict == DIFFERS:
            seen = found["notes"].get(check)
            found["checks"][check] = KNOWN
            found["notes"][check] = f"{reason} ({seen})" if seen else reason
        elif reason is not None:
            unexplained.append(f"{entry.title}, {check}: differs no longer, and has a reason to: {reason}")
    return unexplained


def row_of(entry: Entry, found: dict[str, Any]) -> Row:
    """Counted are the layers with an adapter."""
    count = found["adapted"]
    about = {"library": entry.library, "family": entry.family, "name": entry.name}
    extra = about | {name: value for name, value in found.items() if name != "adapted"}
    return Row("examine", entry.title, "float32", "ours", 1, count, count, count, unit="layers", extra=extra)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
