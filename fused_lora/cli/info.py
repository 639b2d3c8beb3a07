"""``fused-lora info``: versions, devices, and for each implementation whether it can run here, and why not."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import backends
from ..backends import environment, measured, native
from ..torch_internals import GUARDS_PROBLEM

if TYPE_CHECKING:
    import torch


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
        "measured": {
            f"{major}.{minor}": {name: value for name, value in table._asdict().items() if name != "rows"}
            | {"choices": _choices(table, [name for name in measured.BACKENDS if name in table.backends])}
            for (major, minor), table in measured.tables().items()
        },
        "slow": {"checks": GUARDS_PROBLEM, "launches": _why_slow_launches()},
        "generations": {device: _generation(torch.device(device)) for device in devices[1:]},
        "native kernels": {device: _native_kernels(torch.device(device)) for device in devices[1:]},
    }


def _choices(table: measured.Table, able: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Pass -> what serves which numbers of tokens, of the backends that are able."""
    found = {}
    for pass_, gradients in (("without gradients", False), ("with gradients", True)):
        asked = measured.EXAMPLE._replace(gradients=gradients)
        found[pass_] = [one._asdict() for one in measured.served(table, asked.adapter_dtype, asked, able)]
    return found


def _generation(device: torch.device) -> dict[str, Any]:
    """A GPU's compute capability, the one whose table counts for it, and what is chosen of what can run on it."""
    capability = environment.capability(device)
    nearest = measured.nearest(capability, measured.tables())
    able = backends.able(device, measured.EXAMPLE.adapter_dtype)
    return {
        "own": "{}.{}".format(*capability),
        "table": None if nearest is None else "{}.{}".format(*nearest),
        "choices": {} if nearest is None else _choices(measured.tables()[nearest], able),
    }


def _native_kernels(device: torch.device) -> list[dict[str, Any]]:
    """Which kernels of the compiled extension serve which numbers of tokens, and why others don't; empty without it."""
    asked = measured.EXAMPLE
    if native.why_not(device, asked.adapter_dtype) is not None:
        return []
    found: list[dict[str, Any]] = []
    for M in measured.TOKENS:
        why = native.why_not_hopper(device, M, asked.K, asked.N, asked.R, asked.adapter_dtype)
        if not found or found[-1]["why"] != why:
            found.append({"first": M, "last": M, "kernels": "portable" if why else "hopper", "why": why})
        found[-1]["last"] = M
    return found


def _why_slow_launches() -> str | None:
    """Why launches that repeat go through Triton's JIT, or None where they go straight to its launcher."""
    if not environment.TRITON_INSTALLED:
        return "Triton is not installed"
    if environment.interpreting():
        return "Triton interprets"
    from ..backends.triton import straight

    return straight.WHY_SLOW


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
        takes = facts["auto"][device] if device == "cpu" else "what was measured, below"
        lines.append(f"Implementations on {device} (impl='auto' takes {takes})")
        for impl, reasons in facts["implementations"].items():
            why = reasons[device]
            lines.append(f"  {impl:<13} {'can run' if why is None else f'cannot run: {why}'}")
    checks, launches = facts["slow"]["checks"], facts["slow"]["launches"]
    lines += [
        "Calls that repeat",
        f"  {'checks':<13} " + ("are done once" if checks is None else f"are done in every call: {checks}"),
        f"  {'launches':<13} "
        + ("go straight to Triton's launcher" if launches is None else f"go through Triton's JIT: {launches}"),
    ]
    lines += _measured(facts)
    for device, found in facts["native kernels"].items():
        lines.append(f"Kernels of the compiled extension on {device}, for the same layer")
        lines += [
            f"  M {one['first']} to {one['last']}: {one['kernels']}" + (f" ({one['why']})" if one["why"] else "")
            for one in found
        ] or ["  none"]
    lines.append(f"Tuned choices in {facts['tuned']['file'] or 'no file'}")
    lines += [f"  {count:<13} for {device}" for device, count in facts["tuned"]["entries"].items()] or ["  none"]
    return "\n".join(lines)


def _measured(facts: dict[str, Any]) -> list[str]:
    """What impl='auto' takes on GPUs, and by which files."""
    asked = measured.EXAMPLE
    lines = [f"Measured choices of impl='auto', for {asked.K}x{asked.N}, rank {asked.R}, bfloat16"]
    for generation, about in facts["measured"].items():
        lines.append(f"  {generation}: {about['gpu']}, {about['date']}, {about['file']}; time: {about['clock']}")
        lines += _told(about["choices"])
    if not facts["measured"]:
        lines.append("  nothing was measured on a GPU: the Triton kernels run where they can")
    for device, of in facts["generations"].items():
        whose = "its own" if of["table"] == of["own"] else f"that of {of['table']}: {of['own']} has no file"
        if of["table"] is not None:
            lines += [f"  {device} takes, of what can run on it, by a table that is {whose}", *_told(of["choices"])]
    return lines


def _told(choices: dict[str, list[dict[str, Any]]]) -> list[str]:
    return [
        f"    {pass_:<18} " + "; ".join(f"M {one['first']} to {one['last']}: {one['backend']}" for one in found)
        for pass_, found in choices.items()
    ]
