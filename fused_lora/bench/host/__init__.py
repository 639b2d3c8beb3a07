"""``fused-lora bench --host``: what a call costs its host, layer by layer, on a GPU or without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# for each of eight groups
SECONDS, QUICK_SECONDS = 8.0, 0.2
_ROOT = Path(__file__).parents[3]


def run(device_type: str, quick: bool, out: Path | None) -> int:
    """0, or 1 where the process that measures fails.

    device_type: "cuda", or "cpu" for Triton's driver over a stub of libcuda.
    The last line on stdout is a JSON object of ``parts.ratios``.

    Raises:
        RuntimeError: there is nothing to measure with; the message says what is missing.
    """
    from . import parts, stub

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        file = folder / "results.json"
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        # this package, wherever it was found
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        options = ["--seconds", str(QUICK_SECONDS if quick else SECONDS), "--out", str(file)]
        if device_type == "cpu":
            stub.compile_library(folder)
            options += ["--libcuda", str(folder)]
            environment |= {"TRITON_LIBCUDA_PATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", f"{__name__}.child", *options]
        # stdout is for the results
        if subprocess.run(command, env=environment, stdout=sys.stderr.fileno()).returncode != 0:
            print("fused-lora bench --host: the process that measures failed", file=sys.stderr)
            return 1
        results = json.loads(file.read_text(encoding="utf-8"))
    _show(results)
    _save(results, out, quick)
    print(json.dumps(parts.ratios(results)))
    return 0


def _show(results: dict[str, Any]) -> None:
    from . import parts

    print(f"{results['environment']['device']}, driver: {results['settings']['driver']}. Medians in µs, p20–p80.")
    for pass_, shape in dict.fromkeys((row["pass"], row["shape"]) for row in results["rows"]):
        group = shape.split(" ")[0]
        counted = results["settings"]["counted"].get(f"{group} {pass_}", {})
        did = ", ".join(f"{name} {count}" for name, count in counted.items())
        print(f"\n{pass_} {shape}" + (f"   in a warm call: {did}" if did else ""))
        rows = parts.rows_of(results, pass_, group)
        for part, row in rows.items():
            print(f"  {part:26} {row['median']:9.2f}  {row['p20']:.2f}–{row['p80']:.2f}")
        if parts.BACKEND in rows:
            print("  a call of the layer is")
            for name, us in parts.path(results, group).items():
                print(f"    {name.replace('`', ''):24} {us:9.2f}")
    if parts.LAYER not in parts.rows_of(results, "forward", parts.NATIVE):
        print("\nnative: the compiled extension is not built; build it with `make native`")


def _save(results: dict[str, Any], out: Path | None, quick: bool) -> None:
    from ..results import Environment, default_path, write_json

    default = None if quick else default_path(Environment(**results["environment"]))
    path = out or (None if default is None else default.parent / "host" / default.name)
    if path is not None:
        write_json(path, results)
        print(f"\nsaved: {path}")
