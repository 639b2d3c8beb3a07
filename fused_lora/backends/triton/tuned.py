"""Tuned choices: a data file that ``fused-lora tune`` writes. It takes precedence over the rules of ``configs.py``.

The file is read once in a process: the one that ``FUSED_LORA_TUNED`` names (empty: none), else
``$XDG_CONFIG_HOME/fused_lora/tuned.json``, else ``~/.config/fused_lora/tuned.json``. ``docs/tuning.md`` shows one.

An entry counts for a GPU of its name and compute capability, and for problems of its class (:func:`class_of`). What is
malformed, or does not fit the GPU, is refused by name in one warning, and the rule decides as if it were not there.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .configs import DecodeConfig, Device, Problem, ReductionProblem, can_describe, fits, fits_reduction
from .decode_configs import fits_decode
from .entries import Choice, Entry, Reduced, Tiled, class_of

VARIABLE = "FUSED_LORA_TUNED"
FORMAT = "fused_lora tuned choices, 1"
# complaints about a file in one warning
_SHOWN = 5


@dataclass
class Table:
    """What a file holds. complaints: a line for each thing in it that was refused."""

    path: Path | None = None
    entries: dict[tuple[str, tuple[int, int], Problem | ReductionProblem], Entry] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    _refused: set[Entry] = field(default_factory=set)

    def choice(self, problem: Problem | ReductionProblem, device: Device) -> Choice | None:
        """The tuned choice for the problem on this GPU, if it has one and it fits."""
        if not self.entries:
            return None
        entry = self.entries.get((device.name, device.capability, class_of(problem)))
        if entry is None:
            return None
        why = why_not(entry.choice, problem, device)
        if why is None:
            return entry.choice
        if entry not in self._refused:
            self._refused.add(entry)
            _warn(f"{self.path}: {entry}: {entry.choice}: {why}; the rules' choice is used")
        return None

    def put(self, entry: Entry) -> None:
        self.entries[entry.key] = entry

    def remove(self, device: Device, problem: Problem | ReductionProblem) -> None:
        self.entries.pop((device.name, device.capability, class_of(problem)), None)

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "entries": [entry.as_json() for entry in self.entries.values()]}


def why_not(choice: Choice, problem: Problem | ReductionProblem, device: Device) -> str | None:
    """Why this GPU can't compute the problem by this choice, or None when it can."""
    if isinstance(problem, ReductionProblem):
        fitting = isinstance(choice, Reduced) and fits_reduction(choice.config, problem, device)
    elif isinstance(choice, Tiled):
        fitting = fits(choice.tile, problem, device)
        steps = -(-problem.Q // choice.tile.BLOCK_Q)
        if choice.schedule.split > steps:
            return f"split must be at most {steps}, the steps of BLOCK_Q along Q, got {choice.schedule.split}"
        if choice.schedule.descriptors and not can_describe(problem, device):
            return "no tensor descriptor loads its a and w"
    else:
        fitting = isinstance(choice, DecodeConfig) and fits_decode(choice, problem, device)
    memory = f"{device.shared_memory} bytes of shared memory for a program"
    return None if fitting else f"it does not fit the problem on this GPU, which has {memory}"


def read(path: Path, must_exist: bool = True) -> Table:
    """Whatever there is at path; what is wrong with it is in the table's complaints."""
    table = Table(path)
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        if must_exist:
            table.complaints.append("there is no such file")
        return table
    except (OSError, ValueError, RecursionError) as error:
        table.complaints.append(f"cannot be read: {type(error).__name__}: {error}")
        return table
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("entries"), list):
        table.complaints.append(f"must be a file of tuned choices with the format {FORMAT!r}")
        return table
    for index, item in enumerate(data["entries"]):
        try:
            table.put(Entry.from_json(item))
        except ValueError as error:
            table.complaints.append(f"entry {index}: {error}")
    return table


def default_path() -> Path | None:
    """Where a user's own choices are kept; None where there is no home."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    if not folder.is_absolute():
        try:
            folder = Path.home() / ".config"
        except RuntimeError:
            return None
    return folder / "fused_lora" / "tuned.json"


@functools.cache
def current() -> Table:
    """This process's table, empty where there is no file; complaints become one warning."""
    named = os.environ.get(VARIABLE)
    path = default_path() if named is None else Path(named) if named else None
    if path is None:
        return Table()
    table = read(path, must_exist=named is not None)
    if table.complaints:
        shown, more = table.complaints[:_SHOWN], len(table.complaints) - _SHOWN
        shown += [f"and {more} more"] if more > 0 else []
        _warn(f"{path}: {'; '.join(shown)}; the rules' choices are used instead")
    return table


def _warn(text: str) -> None:
    warnings.warn(f"fused_lora: tuned choices in {text}", RuntimeWarning, stacklevel=3)
