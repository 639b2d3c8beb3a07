"""Results on disk: where and when they were measured, then one row for each candidate of each group."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

DRY = ", kernels interpreted"


@dataclass(frozen=True)
class Environment:
    device: str
    torch_version: str
    triton_version: str | None
    cuda_version: str | None
    python_version: str
    threads: int
    date: str

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
        )

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")


@dataclass(frozen=True)
class Row:
    """Times in milliseconds with their 20th and 80th percentiles; ratios are medians over rounds.

    tflops and gb_per_s count useful work, as ``shapes.Shape`` does. saved_bytes: kept for the backward, without
    parameters. peak_bytes: memory that the work takes at most, on top of what was there (``measure.peak_bytes``).
    roofline: the share of what the GPU can do at most (``roofline.py``). inputs: copies of them, taken in turn.
    On a GPU these times are the device's. wall_ms: what a user waits for one call of many in a row. host_ms: what the
    host needs to issue one. host_hidden: whether the device's time holds nothing of the host's.
    None: not defined here. The last three are None on a CPU too, where all times are one, and in files of times between
    two device events with the host only a flush of the cache ahead.
    """

    work: str
    shape: str
    dtype: str
    candidate: str
    rounds: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    ratio_to_frozen: float | None
    ratio_p20: float | None
    ratio_p80: float | None
    ratio_to_parametrize: float | None
    tflops: float | None
    gb_per_s: float | None
    saved_bytes: int | None
    peak_bytes: int | None
    roofline: float | None = None
    inputs: int = 1
    wall_ms: float | None = None
    host_ms: float | None = None
    host_hidden: bool | None = None

    @property
    def group(self) -> tuple[str, str, str]:
        return self.work, self.shape, self.dtype

    @property
    def host_share(self) -> float | None:
        """Of what a user waits, how much the host needs: near 1 the device waits for the host."""
        return None if self.wall_ms is None or self.host_ms is None else self.host_ms / self.wall_ms


@dataclass
class Results:
    """complete: whether the last run measured all that it set out to.  checks: what ``make gpu`` found, by part."""

    environment: Environment
    rows: list[Row] = field(default_factory=list)
    complete: bool = True
    checks: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None, environment: Environment) -> Results:
        """Those in the file at path, to go on with, or none yet.

        Raises ValueError for a file that was measured elsewhere, or is something else: nothing is overwritten.
        """
        if path is None or not path.exists():
            return cls(environment)
        found = cls.load(path)
        if found.environment != environment:
            raise ValueError(f"{path} must be of this environment, {environment}, got one of {found.environment}")
        return found

    @classmethod
    def load(cls, path: Path) -> Results:
        """Raises ValueError for a file that holds something else."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            rows = [Row(**row) for row in data["rows"]]
            return cls(Environment(**data["environment"]), rows, data.get("complete", True), data.get("checks", {}))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} must be a results file of this program, got something else: {error!r}") from error

    def add(self, rows: list[Row]) -> None:
        """Add a group's rows, in place of those that it had."""
        new = {row.group for row in rows}
        self.rows = [row for row in self.rows if row.group not in new] + rows

    def save(self, path: Path) -> None:
        write_json(path, dataclasses.asdict(self))


def write_json(path: Path, data: object) -> None:
    """All or nothing: a reader, or an interrupted run, never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def default_path(environment: Environment) -> Path | None:
    """``benchmarks/results/<device>-<date>.json`` of the checkout that this runs from; None where it is installed."""
    root = Path(__file__).parents[2]
    if not (root / "pyproject.toml").is_file():
        return None
    return root / "benchmarks" / "results" / f"{environment.slug}-{environment.date}.json"


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
