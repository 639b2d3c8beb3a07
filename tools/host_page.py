"""The tables of docs/host.md, from the files in benchmarks/results/host/."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fused_lora.bench.baselines import EAGER, FROZEN
from fused_lora.bench.host import parts
from fused_lora.bench.shapes import FORWARD, STEP

KERNELS = {parts.DECODE: "decode", parts.TILE: "tile", parts.DESCRIPTORS: "tile, by descriptors"}
# parts -> what they are called on the page
_ALONE = {
    parts.VALIDATION: "validation", parts.CHOICE: "choice of a backend", parts.VIEWS: "three transposed views",
    parts.JIT: "`JITFunction.run`", parts.LAUNCHER: "Triton's launcher without it",
}  # fmt: skip
_PLAIN = {
    parts.GEMMS: "eager's three GEMM calls", EAGER: "LoRA as one writes it, in a module",
    parts.LINEAR: "`F.linear`", parts.MODULE: "an `nn.Module` that does nothing",
}  # fmt: skip
_STEPS = {
    FROZEN: "the bare linear, W frozen", parts.FULL: "the bare linear, W trained", EAGER: "LoRA as one writes it",
    parts.PEFT: "PEFT's layer",
}  # fmt: skip
_COUNTED = {
    "launches": "kernels launched", "jit_runs": "of them through Triton's JIT", "descriptors": "descriptors made",
    "operators": "operators dispatched", "allocations": "tensors allocated",
}  # fmt: skip


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> what it holds, the newest of each device, newest first."""
    files = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    by_date = sorted(files, key=lambda name: files[name]["environment"]["date"])
    newest = {files[name]["environment"]["device"]: name for name in by_date}
    return {name: files[name] for name in reversed(newest.values())}


def tables(files: Mapping[str, dict[str, Any]]) -> str:
    """files: name -> what it holds."""
    return "\n".join(line for name, results in files.items() for line in _machine(name, results))


def _machine(name: str, results: dict[str, Any]) -> list[str]:
    where, stub = results["environment"], results["settings"]["driver"] == "stub"
    driver = "a stub of the driver" if stub else "its own driver"
    ratios = ", ".join(f"`{ratio}` {'–' if value is None else value}" for ratio, value in parts.ratios(results).items())
    steps = {kernel: parts.rows_of(results, STEP, kernel) for kernel in KERNELS}
    native = {pass_: parts.rows_of(results, pass_, parts.NATIVE) for pass_ in (FORWARD, STEP)}
    return [
        f"### {where['device']}, {driver}", "",
        f"Python {where['python_version']}, torch {where['torch_version']}, triton {where['triton_version']}, one "
        f"thread, measured on {where['date']}; from `host/{name}`. Medians in µs. {ratios}.", "",
        "A call without gradients:", "",
        *_head(KERNELS.values()), *_forward(results), "",
        "What a call does that is not the first of its kind:", "",
        *_head(f"{kernel}, {pass_}" for kernel in KERNELS.values() for pass_ in (FORWARD, STEP)), *_did(results), "",
        "A training step of one layer, forward and backward:", "",
        *_head(KERNELS.values()),
        _line("**the layer**", [rows[parts.LAYER]["median"] for rows in steps.values()]),
        _line("of which Triton's launcher", [rows[parts.LAUNCHER]["median"] for rows in steps.values()]),
        *_lines(_STEPS, steps.values()), "",
        "The compiled extension on the CPU, 32×256×256, rank 16, float32, arithmetic included:", "",
        *_head((FORWARD, STEP)),
        *_lines({
            parts.LAYER: "**the layer**", parts.LINEAR: "`F.linear`", EAGER: _STEPS[EAGER], FROZEN: _STEPS[FROZEN],
        }, native.values()), "",
    ]  # fmt: skip


def _forward(results: dict[str, Any]) -> list[str]:
    paths = [parts.path(results, kernel) for kernel in KERNELS]
    rows = [parts.rows_of(results, FORWARD, kernel) for kernel in KERNELS]
    return [
        *(_line(name, [path[name] for path in paths]) for name in parts.PATH),
        _line("**the layer**, all of these", [row[parts.LAYER]["median"] for row in rows]),
        *_lines({part: f"alone: {name}" for part, name in _ALONE.items()}, rows),
        *_lines({part: f"beside it: {name}" for part, name in _PLAIN.items()}, rows),
    ]


def _did(results: dict[str, Any]) -> list[str]:
    counted = results["settings"]["counted"]
    groups = [counted[f"{kernel} {pass_}"] for kernel in KERNELS for pass_ in (FORWARD, STEP)]
    return [f"| {name} | {' | '.join(str(did[key]) for did in groups)} |" for key, name in _COUNTED.items()]


def _head(columns: Iterable[str]) -> list[str]:
    columns = list(columns)
    return [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]


def _lines(names: Mapping[str, str], columns: Iterable[Mapping[str, dict[str, Any]]]) -> list[str]:
    """A line for each part that a column has."""
    columns = list(columns)
    found = {part: [column[part]["median"] if part in column else None for column in columns] for part in names}
    return [_line(names[part], values) for part, values in found.items() if any(v is not None for v in values)]


def _line(name: str, values: Iterable[float | None]) -> str:
    return f"| {name} | {' | '.join('–' if value is None else format(value, '.1f') for value in values)} |"
