"""Entries of a file of tuned choices: a problem's class, and how to compute it. Checked field by field."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from .configs import (
    MAX_SPLIT,
    MIN_DOT,
    DecodeConfig,
    Problem,
    ReductionConfig,
    ReductionProblem,
    Schedule,
    ScheduleConfig,
    TileConfig,
    next_power_of_2,
)


@dataclass(frozen=True)
class Tiled:
    """How ``lora_matmul.py`` computes."""

    tile: TileConfig
    schedule: ScheduleConfig


@dataclass(frozen=True)
class Reduced:
    """How ``adapter_grad.py`` computes. parts: of M."""

    config: ReductionConfig
    parts: int


Choice = Tiled | DecodeConfig | Reduced
AnyProblem = TypeVar("AnyProblem", bound=Problem | ReductionProblem)


def class_of(problem: AnyProblem) -> AnyProblem:
    """What shares an entry: all alike but for M, rounded up to a power of two, and R, to one from 16."""
    return dataclasses.replace(
        problem, M=next_power_of_2(max(problem.M, 1)), R=max(next_power_of_2(problem.R), MIN_DOT)
    )


_ITEMSIZES = (2, 4)
_WARPS = (1, 2, 4, 8, 16)
_MOST_STAGES, _LARGEST_BLOCK, _MOST_PARTS, _LARGEST_SIZE = 8, 512, 128, 1 << 40
_SPLITS = ("SPLIT", "SPLIT_H")


@dataclass(frozen=True)
class Entry:
    """problem: a class.  ms, heuristic_ms: a call's, by this choice and by the rule's, when it was tuned."""

    device: str
    capability: tuple[int, int]
    problem: Problem | ReductionProblem
    choice: Choice
    ms: float
    heuristic_ms: float

    @property
    def key(self) -> tuple[str, tuple[int, int], Problem | ReductionProblem]:
        return self.device, self.capability, self.problem

    @property
    def kernel(self) -> str:
        """The module that computes."""
        return _KERNELS[type(self.choice)]

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in dataclasses.asdict(self.problem).items())
        return f"{self.kernel} {sizes} on {self.device}"

    def as_json(self) -> dict[str, Any]:
        config: Any
        if isinstance(self.choice, Tiled):
            schedule = self.choice.schedule
            config = dataclasses.asdict(self.choice.tile) | {
                "schedule": schedule.kind.name, "split": schedule.split, "descriptors": schedule.descriptors,
            }  # fmt: skip
        elif isinstance(self.choice, Reduced):
            config = dataclasses.asdict(self.choice.config) | {"parts": self.choice.parts}
        else:
            config = dataclasses.asdict(self.choice)
        return {
            "device": self.device,
            "capability": list(self.capability),
            "kernel": self.kernel,
            "problem": dataclasses.asdict(self.problem),
            "config": config,
            "ms": self.ms,
            "heuristic_ms": self.heuristic_ms,
        }

    @classmethod
    def from_json(cls, data: Any) -> Entry:
        """Raises ValueError for all that ``as_json`` would not give, and for sizes that no kernel takes."""
        data = _object("an entry", data)
        names = [entry_field.name for entry_field in dataclasses.fields(cls) if entry_field.name != "choice"]
        _same_names("an entry", data, {*names, "kernel", "config"})
        device, capability, kernel = data["device"], data["capability"], data["kernel"]
        if not isinstance(device, str):
            raise ValueError(f"device must be a name, got {_shown(device)}")
        if not isinstance(capability, list) or len(capability) != 2 or not all(type(n) is int for n in capability):
            raise ValueError(f"capability must be two whole numbers, got {_shown(capability)}")
        for name in ("ms", "heuristic_ms"):
            if type(data[name]) not in (int, float) or not 0 <= data[name] < float("inf"):
                raise ValueError(f"{name} must be a time in milliseconds, got {_shown(data[name])}")
        choice = _choice(kernel, _renamed(_object("config", data["config"])))
        check(choice)
        problem = _problem(ReductionProblem if isinstance(choice, Reduced) else Problem, data["problem"])
        return cls(device, (capability[0], capability[1]), problem, choice, data["ms"], data["heuristic_ms"])


# what older files call a field -> its name
_RENAMED = {"form": "schedule", "SPLIT_THIN": "SPLIT_H"}
_KERNELS: dict[type, str] = {Tiled: "lora_matmul", DecodeConfig: "decode", Reduced: "adapter_grad"}
Record = TypeVar("Record")


def _renamed(config: dict[str, Any]) -> dict[str, Any]:
    """config with the new names. An older name stays where the new one is there too: it is refused as unknown."""
    return {name if _RENAMED.get(name, name) in config else _RENAMED[name]: value for name, value in config.items()}


def _choice(kernel: Any, config: dict[str, Any]) -> Choice:
    if kernel == _KERNELS[Tiled]:
        name, names = config.pop("schedule", None), [kind.name for kind in Schedule]
        if name not in names:
            raise ValueError(f"schedule must be one of {', '.join(names)}, got {_shown(name)}")
        schedule = {"kind": Schedule[name]}
        schedule |= {part: config.pop(part) for part in ("split", "descriptors") if part in config}
        return Tiled(_record("config", TileConfig, config), _record("config", ScheduleConfig, schedule))
    if kernel == _KERNELS[DecodeConfig]:
        return _record("config", DecodeConfig, config)
    if kernel == _KERNELS[Reduced]:
        parts = config.pop("parts", None)
        return Reduced(_record("config", ReductionConfig, config), parts)
    raise ValueError(f"kernel must be one of {', '.join(_KERNELS.values())}, got {_shown(kernel)}")


def check(choice: Choice) -> None:
    """Raises ValueError for numbers that no kernel takes, on any GPU."""
    config: Any = choice
    if isinstance(choice, Tiled):
        config, schedule = choice.tile, choice.schedule
        if schedule.kind == Schedule.PLAIN:
            raise ValueError("schedule must compute the adapter, got PLAIN")
        _whole("split", schedule.split, 1, MAX_SPLIT if schedule.kind == Schedule.PRODUCE else 1)
    elif isinstance(choice, Reduced):
        config = choice.config
        _whole("parts", choice.parts, 1, _MOST_PARTS)
    for name, value in dataclasses.asdict(config).items():
        if name.startswith("BLOCK_") or name == "ROWS":
            _whole(name, value, MIN_DOT, _LARGEST_BLOCK)
            if value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")
        elif name == "num_warps" and value not in _WARPS:
            raise ValueError(f"num_warps must be one of {', '.join(map(str, _WARPS))}, got {value}")
        elif type(value) is int:
            _whole(name, value, 1, MAX_SPLIT if name in _SPLITS else _MOST_STAGES if name == "num_stages" else 64)


def _problem(kind: type[AnyProblem], data: Any) -> AnyProblem:
    data = _object("problem", data)
    for name in ("itemsize", "adapter_itemsize"):
        if name in data and data[name] not in _ITEMSIZES:
            raise ValueError(f"{name} must be one of 2, 4, got {_shown(data[name])}")
    if data.get("tensor_cores") is False and data.get("itemsize") == 2:
        raise ValueError("tensor_cores must be true for an itemsize of 2, got false")
    problem = _record("problem", kind, data)
    for name, value in dataclasses.asdict(problem).items():
        if type(value) is int:
            _whole(name, value, 1, _LARGEST_SIZE)
    if problem != class_of(problem):
        raise ValueError(f"M and R must be powers of two, R from {MIN_DOT}, got {problem.M} and {problem.R}")
    return problem


def _record(what: str, kind: type[Record], data: dict[str, Any]) -> Record:
    """A dataclass of whole numbers and truth values; what has a default may be left out."""
    known = {part.name: part for part in dataclasses.fields(kind)}  # type: ignore[arg-type]
    optional = {name for name, part in known.items() if part.default is not dataclasses.MISSING}
    _same_names(what, data, set(known), optional)
    for name, value in data.items():
        if type(value).__name__ != known[name].type:
            raise ValueError(f"{name} must be of type {known[name].type}, got {_shown(value)}")
    return kind(**data)


def _object(what: str, data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{what} must be an object, got {_shown(data)}")
    return dict(data)


def _same_names(what: str, data: dict[str, Any], names: set[str], optional: Iterable[str] = ()) -> None:
    missing, unknown = names - data.keys() - set(optional), data.keys() - names
    if missing or unknown:
        wrong = f"lacks {', '.join(sorted(missing))}" if missing else f"has {', '.join(map(_shown, sorted(unknown)))}"
        raise ValueError(f"{what} must have the fields {', '.join(sorted(names))}, and {wrong}")


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
