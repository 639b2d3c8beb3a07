"""The parts of a call that are timed, as results files name them, and what follows from their times."""

from __future__ import annotations

from typing import Any

from ..baselines import EAGER
from ..shapes import FORWARD, STEP

# nested: each holds those that come after it
LAYER, LORA_LINEAR, OPERATOR, BACKEND = "layer", "lora_linear", "operator", "launch.lora_matmul"
# the launch, through Triton's JIT and through its launcher alone
JIT, LAUNCHER = "JITFunction.run", "launcher"
# other parts of it, alone
VALIDATION, CHOICE, VIEWS, ALLOCATOR = "validation", "choice", "views", "allocator"
# the like in plain PyTorch
GEMMS, LINEAR, MODULE, FULL, PEFT = "three GEMMs", "F.linear", "nn.Module", "full", "peft"
# groups: three kernels, and the compiled extension
DECODE, TILE, DESCRIPTORS, NATIVE = "decode", "tile", "descriptors", "native"

# of what a call without gradients is made
PATH = (
    "`nn.Module` and the layer",
    "validation, choice, views",
    "dispatcher and operator",
    "preparation of the launch",
    "allocator: two tensors",
    "launch",
)


def rows_of(results: dict[str, Any], pass_: str, group: str) -> dict[str, dict[str, Any]]:
    """Part -> row."""
    rows = (row for row in results["rows"] if row["pass"] == pass_ and row["shape"].split(" ")[0] == group)
    return {row["candidate"]: row for row in rows}


def path(results: dict[str, Any], group: str) -> dict[str, float]:
    """What each of PATH takes of a call without gradients, in µs; their sum is the layer's.

    A warm call may go past the dispatcher and past Triton's JIT: what was counted says whether it does.
    """
    us = {part: row["median"] for part, row in rows_of(results, FORWARD, group).items()}
    did = results["settings"]["counted"][f"{group} {FORWARD}"]
    dispatcher = us[OPERATOR] - us[BACKEND] if did["operators"] else 0.0
    launch = us[JIT if did["jit_runs"] else LAUNCHER]
    shares = (
        us[LAYER] - us[LORA_LINEAR],
        us[LORA_LINEAR] - us[BACKEND] - dispatcher,
        dispatcher,
        us[BACKEND] - us[ALLOCATOR] - launch,
        us[ALLOCATOR],
        launch,
    )
    return dict(zip(PATH, shares, strict=True))


def ratios(results: dict[str, Any]) -> dict[str, float | None]:
    """Host time over plain PyTorch's. Of a layer's two kernels the one further behind; None where nothing ran."""

    def ratio(pass_: str, groups: tuple[str, ...], baseline: str) -> float | None:
        rows = [rows_of(results, pass_, group) for group in groups]
        found = [row[LAYER]["ratios"][baseline]["median"] for row in rows if LAYER in row]
        return round(max(found), 3) if found else None

    return {
        "triton_forward": ratio(FORWARD, (DECODE, TILE), GEMMS),
        "triton_step": ratio(STEP, (DECODE, TILE), EAGER),
        "native_forward": ratio(FORWARD, (NATIVE,), LINEAR),
    }
