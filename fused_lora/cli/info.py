"""``fused-lora info``: versions, devices, and for each implementation whether it can run here, and why not."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from collections import Counter
from typing import Any

from .. import backends


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else _text(facts))
    return 0


def collect() -> dict[str, Any]:
    """Versions, devices, implementation -> device -> reason it can't run there, or None where it can; tuned choices."""
    import torch

    from ..backends.triton import tuned

    table = tuned.current()
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    names = {"cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"}
    for device in devices[1:]:
        major, minor = torch.cuda.get_device_capability(device)
        names[device] = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
    return {
        "versions": {
            name: _version(name) for name in ("fused_lora", "torch", "triton", "safetensors", "peft", "transformers")
        }
        | {"python": platform.python_version()},
        "devices": names,
        "implementations": {
            impl: {device: backends.why_not(impl, torch.device(device), torch.float32) for device in devices}
            for impl in backends.BACKENDS
        },
        "tuned": {
            "file": None if table.path is None else str(table.path),
            "entries": dict(Counter(entry.device for entry in table.entries.values())),
        },
        "auto": {device: backends.choose("auto", torch.device(device), torch.float32) for device in devices},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _text(facts: dict[str, Any]) -> str:
    lines = ["Versions"]
    lines += [f"  {name:<13} {version or 'not installed'}" for name, version in facts["versions"].items()]
    lines.append("Devices")
    lines += [f"  {device:<13} {name}" for device, name in facts["devices"].items()]
    for device in facts["devices"]:
        lines.append(f"Implementations on {device} (impl='auto' takes {facts['auto'][device]!r})")
        for impl, reasons in facts["implementations"].items():
            why = reasons[device]
            lines.append(f"  {impl:<13} {'can run' if why is None else f'cannot run: {why}'}")
    lines.append(f"Tuned choices in {facts['tuned']['file'] or 'no file'}")
    lines += [f"  {count:<13} for {device}" for device, count in facts["tuned"]["entries"].items()] or ["  none"]
    return "\n".join(lines)
