"""What the pages say of results files: where they were measured, and that something was not."""

from __future__ import annotations

from collections.abc import Mapping

from fused_lora.bench.results import ResultsFile

# kind -> file name -> file, newest first
Files = Mapping[str, Mapping[str, ResultsFile]]
NOT_MEASURED = "**not measured**"


def source(name: str, file: ResultsFile) -> str:
    """Where a table's numbers come from."""
    return f"{file.environment}, measured on {file.environment.date} by `{file.command}`; from `{path_of(name, file)}`."


def path_of(name: str, file: ResultsFile) -> str:
    """Below benchmarks/results/."""
    from fused_lora.bench.results import FOLDERS

    return f"{FOLDERS[file.kind]}/{name}".lstrip("/")
