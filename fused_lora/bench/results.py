"""The one schema of all results files: where and how it was measured, and a row for each candidate of each group."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

FORMAT = "fused_lora results, 1"
DRY = ", kernels interpreted"
FROZEN = "frozen"
UNITS = ("ms", "us", "bytes", "registers", "layers")
# what a file holds -> its folder in benchmarks/results/
FOLDERS = {
    "layers": "", "models": "models", "scaling": "scaling", "native": "native", "peft": "peft",
    "overhead": "overhead", "distributed": "distributed", "codegen": "codegen", "host": "host",
    "quantized": "quantized", "zoo": "zoo",
}  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """compute_capability: a GPU's, as "9.0"; older files have none."""

    device: str
    torch_version: str
    triton_version: str | None
    cuda_version: str | None
    python_version: str
    threads: int
    date: str
    compute_capability: str | None = None

    @classmethod
    def here(cls, device: torch.device, dry: bool = False) -> Environment:
        """dry: kernels are interpreted, and times mean nothing."""
        on_gpu = device.type == "cuda"
        return cls(
            device=torch.cuda.get_device_name(device) if on_gpu else _cpu_name() + (DRY if dry else ""),
            torch_version=torch.__version__,
            triton_version=_version("triton"),
            cuda_version=torch.version.cuda if on_gpu else None,
            python_version=platform.python_version(),
            threads=torch.get_num_threads(),
            date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            compute_capability="{}.{}".format(*torch.cuda.get_device_capability(device)) if on_gpu else None,
        )

    @property
    def file_name(self) -> str:
        """The file's name: device and date, so that no file takes another's place."""
        device = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")
        return f"{device}-{self.date}.json"

    def __str__(self) -> str:
        versions = {"torch": self.torch_version, "triton": self.triton_version, "CUDA": self.cuda_version}
        parts = [f"{name} {version}" for name, version in versions.items() if version is not None]
        return ", ".join([self.device, f"{self.threads} thread{'' if self.threads == 1 else 's'}", *parts])


@dataclass(frozen=True)
class Spread:
    median: float
    p20: float
    p80: float

    def __post_init__(self) -> None:
        if not 0 <= self.p20 <= self.median <= self.p80 < math.inf:
            raise ValueError(f"a spread must have 0 <= p20 <= median <= p80, got {self.p20}, {self.median}, {self.p80}")

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = list(values)
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        return cls(statistics.median(values), fifths[0], fifths[-1])


@dataclass(frozen=True)
class Row:
    """What was measured of one candidate: ``pass_`` (as ``shapes.PASSES`` has them) of a shape in a dtype.

    median, p20, p80: of ``rounds`` samples, in ``unit``; what is counted once has them alike.  impl: of ours, where the
    candidate does not name it.  repeat: of the whole measurement.
    ratios: by candidate, of the times within each round, so what slowed both down cancels.
    tflops and gb_per_s count useful work, as ``shapes.Shape`` does. roofline: the share of what the GPU can do at most
    (``roofline.py``). saved_bytes: kept for the backward, without parameters. peak_bytes: memory that it takes at most,
    on top of what was there (``measure.peak_bytes``). inputs: copies of them, taken in turn.
    On a GPU these times are the device's. wall_ms: what a user waits for one call of many in a row. host_ms: what the
    host needs to issue one. host_hidden: whether the device's time holds nothing of the host's. The three are None on a
    CPU, where all times are one, and in files of times between two device events right behind a flush of the cache.
    extra: columns that one kind of file alone has.
    """

    pass_: str
    shape: str
    dtype: str
    candidate: str
    rounds: int
    median: float
    p20: float
    p80: float
    unit: str = "ms"
    impl: str | None = None
    repeat: int = 0
    ratios: dict[str, Spread] = field(default_factory=dict)
    tflops: float | None = None
    gb_per_s: float | None = None
    roofline: float | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    inputs: int = 1
    wall_ms: float | None = None
    host_ms: float | None = None
    host_hidden: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Spread(self.median, self.p20, self.p80)
        if self.unit not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {self.unit!r}")
        for name in ("pass_", "shape", "dtype", "candidate"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be text, got {getattr(self, name)!r}")

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Row:
        ratios = {name: Spread(**ratio) for name, ratio in data.pop("ratios", {}).items()}
        return cls(pass_=data.pop("pass"), **data, ratios=ratios)

    def as_json(self) -> dict[str, Any]:
        """Without what is not defined here."""
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.name not in ("ratios", "extra")}
        data = dataclasses.asdict(self)
        return {name.rstrip("_"): data[name] for name in data if data[name] != defaults.get(name, {})}

    @property
    def group(self) -> tuple[str, str, str]:
        return self.pass_, self.shape, self.dtype

    @property
    def ratio(self) -> Spread | None:
        """To the frozen baseline."""
        return self.ratios.get(FROZEN)

    @property
    def host_share(self) -> float | None:
        """The host's share of the wall time: near 1 the device waits for the host."""
        return None if self.wall_ms is None or self.host_ms is None else self.host_ms / self.wall_ms


@dataclass
class ResultsFile:
    """kind: one of FOLDERS.  command: what measures it anew.  settings: what all rows have in common.

    complete: whether the last run measured all that it set out to.  checks: what ``make gpu`` found, by part.
    """

    kind: str
    command: str
    environment: Environment
    rows: list[Row] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    complete: bool = True
    checks: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in FOLDERS:
            raise ValueError(f"kind must be one of {', '.join(FOLDERS)}, got {self.kind!r}")

    @classmethod
    def open(cls, path: Path | None, kind: str, command: str, environment: Environment) -> ResultsFile:
        """The file at path, to go on with, or an empty one.

        Raises ValueError for a file that was measured elsewhere, or is something else: nothing is overwritten.
        """
        if path is None or not path.exists():
            return cls(kind, command, environment)
        found = cls.load(path)
        if (found.kind, found.environment) != (kind, environment):
            raise ValueError(
                f"{path} must hold {kind} of this environment, {environment!r}, "
                f"got {found.kind} of {found.environment!r}"
            )
        return found

    @classmethod
    def load(cls, path: Path) -> ResultsFile:
        """Raises ValueError for a file that holds something else."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            rows = [Row.from_json(row) for row in data.pop("rows")]
            return cls(environment=Environment(**data.pop("environment")), rows=rows, **data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} must be a results file of this program, got something else: {error!r}") from error

    def add(self, rows: list[Row]) -> None:
        """Add a group's rows, in place of those that it had."""
        new = {row.group for row in rows}
        self.rows = [row for row in self.rows if row.group not in new] + rows

    def save(self, path: Path) -> None:
        """A row takes a line."""
        head = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "rows"}
        head["environment"] = dataclasses.asdict(self.environment)
        rows = ",\n".join("  " + json.dumps(row.as_json(), ensure_ascii=False) for row in self.rows)
        text = json.dumps({"format": FORMAT, **head}, indent=1, ensure_ascii=False).removesuffix("\n}")
        _write(path, f'{text},\n "rows": [\n{rows}\n ]\n}}\n')


def write_json(path: Path, data: object) -> None:
    _write(path, json.dumps(data, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    """All or nothing: a reader, or an interrupted run, never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def default_path(kind: str, environment: Environment) -> Path | None:
    """``benchmarks/results/[<kind>/]<device>-<date>.json`` of the checkout that this runs from; None if installed."""
    root = Path(__file__).parents[2]
    if not (root / "pyproject.toml").is_file():
        return None
    return root / "benchmarks" / "results" / FOLDERS[kind] / environment.file_name


def load_all(folder: Path, kind: str) -> dict[str, ResultsFile]:
    """File name -> the newest file of each device that is in folder, newest first.

    Raises ValueError for a file that is of another kind or is not named after its device and date.
    """
    files = {path.name: ResultsFile.load(path) for path in sorted((folder / FOLDERS[kind]).glob("*.json"))}
    newest: dict[str, str] = {}
    for name in sorted(files, key=lambda name: files[name].environment.date):
        file = files[name]
        if (file.kind, file.environment.file_name) != (kind, name):
            raise ValueError(f"{name} must be of {kind} and named {file.environment.file_name}, got one of {file.kind}")
        newest[file.environment.device] = name
    return {name: files[name] for name in reversed(newest.values())}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """The model where Linux tells it, else the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        if match is not None:
            return match[1].strip()
    return platform.machine()
