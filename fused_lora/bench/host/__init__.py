"""``fused-lora bench --host``: what a call costs its host, layer by layer, on a GPU or without one."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SECONDS, QUICK_SECONDS = 8.0, 0.5


def run(args: argparse.Namespace, device_type: str) -> int:
    """0, or 1 where the process that measures fails. Raises RuntimeError where there is nothing to measure with."""
    from . import stub

    root = Path(__file__).parents[3]
    path = args.out or (None if args.quick else default_folder(root))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        out = folder / "results.json"
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
        options = ["--seconds", str(QUICK_SECONDS if args.quick else SECONDS), "--out", str(out)]
        if device_type == "cpu":
            stub.compile_library(folder)
            options += ["--libcuda", str(folder)]
            environment |= {"TRITON_LIBCUDA_PATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", f"{__name__}.child", *options]
        if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode != 0:
            print("fused-lora bench: the process that measures failed; what it said is above", file=sys.stderr)
            return 1
        results = json.loads(out.read_text(encoding="utf-8"))
    show(results)
    if path is not None:
        save(results, path)
    print(json.dumps(results["ratios"]))
    return 0


def default_folder(root: Path) -> Path | None:
    return root / "benchmarks" / "results" / "host" if (root / "pyproject.toml").is_file() else None


def save(results: dict[str, Any], path: Path) -> None:
    from ..results import Environment, write_json

    environment = Environment(**results["environment"])
    file = path if path.suffix == ".json" else path / f"{environment.slug}-{environment.date}.json"
    write_json(file, results)
    print(f"saved: {file}")


def show(results: dict[str, Any]) -> None:
    from . import parts

    print(f"{results['environment']['device']}, driver: {results['driver']}. Medians in µs, and p20–p80")
    for group in dict.fromkeys(row["group"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["group"] == group]
        did = ", ".join(f"{count} {name}" for name, count in results["structure"].get(group, {}).items())
        print(f"\n{group}, {rows[0]['sizes']}" + (f": a call does {did}" if did else ""))
        for row in rows:
            print(f"  {row['part']:26} {row['us']['median']:9.2f}  {row['us']['p20']:.2f}–{row['us']['p80']:.2f}")
        if any(row["part"] == parts.BACKEND for row in rows):
            print("  the layer's path:")
            for name, us in parts.path(results, group).items():
                print(f"    {name:24} {us:9.2f}")
    print()
