"""The tables of docs/host.md: what a call costs its host, from the files in benchmarks/results/host/."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fused_lora.bench.baselines import EAGER, FROZEN, PEFT
from fused_lora.bench.host import parts
from fused_lora.bench.results import ResultsFile, Row
from fused_lora.bench.shapes import FORWARD, STEP
from fused_lora.bench.table import markdown

from ..files import NOT_MEASURED, Files, source

KERNELS = {parts.DECODE: "decode", parts.TILE: "tile", parts.DESCRIPTORS: "tile, by descriptors"}
# parts -> what they are called on the page
_ALONE = {
    parts.VALIDATION: "validation", parts.CHOICE: "choice of a backend", parts.VIEWS: "three transposed views",
    parts.OPERATOR: "the operator, by PyTorch's dispatcher", parts.BACKEND: "what the operator calls",
    parts.JIT: "`JITFunction.run`",
}  # fmt: skip
_PLAIN = {
    parts.GEMMS: "eager's three GEMM calls", EAGER: "LoRA as one writes it, in a module",
    parts.LINEAR: "`F.linear`", parts.MODULE: "an `nn.Module` that does nothing",
}  # fmt: skip
_STEPS = {
    FROZEN: "the bare linear, W frozen", parts.FULL: "the bare linear, W trained", EAGER: "LoRA as one writes it",
    PEFT: "PEFT's layer",
}  # fmt: skip
_COUNTED = {
    "launches": "kernels launched", "jit_runs": "of them through Triton's JIT", "descriptors": "descriptors made",
    "operators": "operators dispatched", "allocations": "tensors allocated",
}  # fmt: skip


Line = list[str]


def tables(files: Files) -> str:
    return "\n".join(_machine(name, file) for name, file in files["host"].items()) or f"{NOT_MEASURED}.\n"


def _machine(name: str, file: ResultsFile) -> str:
    driver = "a stub of the driver" if file.settings["driver"] == "stub" else "its own driver"
    ratios = ", ".join(f"`{ratio}` {'–' if value is None else value}" for ratio, value in parts.ratios(file).items())
    steps = [parts.rows_of(file, STEP, kernel) for kernel in KERNELS]
    kernels = [f"{title} {_sizes(rows)}" for title, rows in zip(KERNELS.values(), steps, strict=True)]
    counted = [f"{title}, {pass_}" for title in KERNELS.values() for pass_ in (FORWARD, STEP)]
    native = {"forward": FORWARD, "forward and backward": STEP}
    extension = [parts.rows_of(file, pass_, parts.NATIVE) for pass_ in native.values()]
    return "\n".join((
        f"### {file.environment.device}, {driver}\n",
        f"{source(name, file)} Medians in µs. {ratios}.\n",
        "A call without gradients:\n",
        markdown(["", *kernels], _forward(file)),
        "What a call does that is not the first of its kind:\n",
        markdown(["", *counted], _counted(file)),
        "A training step of one layer, forward and backward:\n",
        markdown(["", *kernels], _lines({
            parts.LAYER: "**the layer**", parts.LAUNCHER: "of which Triton's launcher", **_STEPS,
        }, steps)),
        f"The compiled extension on the CPU, {_sizes(extension[0])} in float32, arithmetic included:\n",
        markdown(["", *native], _lines({
            parts.LAYER: "**the layer**", parts.LINEAR: "`F.linear`", EAGER: _STEPS[EAGER], FROZEN: _STEPS[FROZEN],
        }, extension)),
    ))  # fmt: skip


def _sizes(rows: Mapping[str, Row]) -> str:
    """The sizes in the label of these rows' group."""
    return next(iter(rows.values())).shape.partition(" ")[2]


def _forward(file: ResultsFile) -> list[Line]:
    paths = [parts.path(file, kernel) for kernel in KERNELS]
    rows = [parts.rows_of(file, FORWARD, kernel) for kernel in KERNELS]
    return [
        *([name, *(f"{path[name]:.1f}" for path in paths)] for name in parts.PATH),
        *_lines({parts.LAYER: "**the layer**, all of these"}, rows),
        *_lines({part: f"not in it: {name}" for part, name in _ALONE.items()}, rows),
        *_lines({part: f"beside it: {name}" for part, name in _PLAIN.items()}, rows),
    ]


def _counted(file: ResultsFile) -> list[Line]:
    counted = [file.settings["counted"][f"{kernel} {pass_}"] for kernel in KERNELS for pass_ in (FORWARD, STEP)]
    return [[name, *(str(counts[key]) for counts in counted)] for key, name in _COUNTED.items()]


def _lines(names: Mapping[str, str], columns: Iterable[Mapping[str, Row]]) -> list[Line]:
    """A line for each part that a column has."""
    columns = list(columns)
    found = {part: [column.get(part) for column in columns] for part in names}
    return [
        [names[part], *("–" if row is None else f"{row.median:.1f}" for row in rows)]
        for part, rows in found.items() if any(rows)
    ]  # fmt: skip
