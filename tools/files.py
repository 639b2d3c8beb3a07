"""What the pages say of results files: where they were measured, or that nothing was."""

from __future__ import annotations

from collections.abc import Mapping

from fused_lora.bench.results import FOLDERS, ResultsFile

# kind -> file name -> file, newest first
Files = Mapping[str, Mapping[str, ResultsFile]]
NOT_MEASURED = "**not measured**"


def source(name: str, file: ResultsFile) -> str:
    """Where a table's numbers come from."""
    env = file.environment
    return f"{env}, measured on {env.date} by `{file.command}`; from `{path_of(name, file)}`."


def path_of(name: str, file: ResultsFile) -> str:
    return "/".join(filter(None, ("benchmarks/results", FOLDERS[file.kind], name)))
