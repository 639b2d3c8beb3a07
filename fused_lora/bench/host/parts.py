"""The parts of a call that are timed, as results files name them, and what follows from their times."""

from __future__ import annotations

from ..baselines import EAGER
from ..results import ResultsFile, Row
from ..shapes import FORWARD, STEP

# nested: each holds those that come after it
LAYER, LORA_LINEAR, PLAN, LAUNCHER = "layer", "lora_linear", "plan", "launcher"
ALLOCATOR = "allocator"
# what only the first call of its kind goes through, or one that is watched
VALIDATION, CHOICE, VIEWS = "validation", "choice", "views"
OPERATOR, BACKEND, JIT = "operator", "launch.lora_matmul", "JITFunction.run"
# the same in plain PyTorch
GEMMS, LINEAR, MODULE, FULL = "three GEMMs", "F.linear", "nn.Module", "full"
# groups: three kernels, and the compiled extension
DECODE, TILE, DESCRIPTORS, NATIVE = "decode", "tile", "descriptors", "native"

# the parts of a call without gradients
PATH = (
    "`nn.Module` and the layer",
    "look-up of the call's plan",
    "preparation of the launch",
    "allocator: the output",
    "launch",
)


def rows_of(file: ResultsFile, pass_: str, group: str) -> dict[str, Row]:
    """Part -> row."""
    return {row.candidate: row for row in file.rows if row.pass_ == pass_ and row.shape.split(" ")[0] == group}


def path(file: ResultsFile, group: str) -> dict[str, float]:
    """What each of PATH takes of a call without gradients, in µs; their sum is the layer's."""
    us = {part: row.median for part, row in rows_of(file, FORWARD, group).items()}
    # a Triton whose launcher is not known is asked each time
    launch = us[JIT if file.settings["counted"][f"{group} {FORWARD}"]["jit_runs"] else LAUNCHER]
    shares = (
        us[LAYER] - us[LORA_LINEAR],
        us[LORA_LINEAR] - us[PLAN],
        us[PLAN] - us[ALLOCATOR] - launch,
        us[ALLOCATOR],
        launch,
    )
    return dict(zip(PATH, shares, strict=True))


def ratios(file: ResultsFile) -> dict[str, float | None]:
    """Host time over plain PyTorch's. Of a layer's two kernels the one further behind; None where nothing ran."""

    def ratio(pass_: str, groups: tuple[str, ...], baseline: str) -> float | None:
        rows = [rows_of(file, pass_, group) for group in groups]
        found = [row[LAYER].ratios[baseline].median for row in rows if LAYER in row]
        return round(max(found), 3) if found else None

    return {
        "triton_forward": ratio(FORWARD, (DECODE, TILE), GEMMS),
        "triton_step": ratio(STEP, (DECODE, TILE), EAGER),
        "native_forward": ratio(FORWARD, (NATIVE,), LINEAR),
    }
