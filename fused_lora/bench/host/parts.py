"""The parts of a call that are timed, as results files name them, and what follows from their times."""

from __future__ import annotations

from typing import Any

# nested: each holds those that come after it
LAYER, LORA_LINEAR, OPERATOR, BACKEND = "layer", "lora_linear", "operator", "launch.lora_matmul"
# the launch, through Triton's JIT and through its launcher alone
JIT, LAUNCHER = "JITFunction.run", "launcher"
# other parts of it, alone
VALIDATION, CHOICE, VIEWS, ALLOCATOR = "validation", "choice", "views", "allocator"
# forward and backward
STEP = "step"
# the like in plain PyTorch
GEMMS, LINEAR, MODULE, FULL, PEFT = "three GEMMs", "F.linear", "nn.Module", "full", "peft"

# of what a call without gradients is made
PATH = (
    "nn.Module and the layer",
    "validation, choice, views",
    "dispatcher and operator",
    "preparation of the launch",
    "allocator, two tensors",
    "launch",
)


def times(results: dict[str, Any], group: str) -> dict[str, float]:
    """Part -> median in µs."""
    return {row["part"]: row["us"]["median"] for row in results["rows"] if row["group"] == group}


def path(results: dict[str, Any], group: str) -> dict[str, float]:
    """What each of PATH takes of a call of the layer, in µs; their sum is the layer's.

    A warm call may go past the dispatcher and past Triton's JIT: the structure that was measured says whether it does.
    """
    us, structure = times(results, group), results["structure"][group]
    dispatcher = us[OPERATOR] - us[BACKEND] if structure["operators"] else 0.0
    launch = us[JIT if structure["jit_runs"] else LAUNCHER]
    shares = (
        us[LAYER] - us[LORA_LINEAR],
        us[LORA_LINEAR] - us[BACKEND] - dispatcher,
        dispatcher,
        us[BACKEND] - us[ALLOCATOR] - launch,
        us[ALLOCATOR],
        launch,
    )
    return dict(zip(PATH, shares, strict=True))
