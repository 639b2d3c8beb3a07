"""What is asked of a model. Each check makes its models anew, so that none sees what another left."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn

from fused_lora import (
    FusedLoRALinear,
    load_adapter,
    lora_parameters,
    merge,
    merge_and_unload,
    save_adapter,
    summary,
    unmerge,
)
from fused_lora.integrations.peft import fuse
from fused_lora.models.apply import lora_layers

from .compared import (
    ALPHA,
    DIFFERS,
    OK,
    RANK,
    ROUNDED,
    WARNED,
    Compared,
    Finding,
    brief,
    gradients_of,
    names_layer,
    no_fast_path,
    peft_layers,
    some,
)
from .entry import CHECKS, Entry


def fresh(of: Compared) -> Finding:
    """A fresh adapter changes nothing."""
    return of.outputs_agree(of.fresh(), of.entry.output(of.entry.base()).detach())


def gradients(of: Compared) -> Finding:
    """Outputs and gradients are the formula's, and every adapted layer that the output depends on has gradients, or is
    named by a warning or by ``summary``."""
    model = of.adapted()
    found = of.against(of.results(model), of.rounded)
    if found.verdict == DIFFERS:
        return found
    if not (of.exact["y"] - of.entry.output(of.entry.base()).detach()).abs().max() > 10 * of.budget["y"]:
        return Finding(DIFFERS, "the adapters have no effect")
    dead = [
        path
        for path, pair in gradients_of(model).items()
        if path in of.needed and not all(gradient is not None and gradient.any() for gradient in pair)
    ]
    if not dead:
        return found
    of.warned.clear()
    with of.listening(), tempfile.TemporaryDirectory() as folder:
        torch.optim.SGD(lora_parameters(model), lr=0.0).step()
        save_adapter(model, folder)
    silent = [path for path in dead if not _warned_of(of, path) and not _never_called(model, path)]
    if silent:
        return Finding(DIFFERS, f"no gradient and no word: {some(silent)}")
    return Finding(WARNED, f"never called, as a warning says: {some(dead)}")


def like_peft(of: Compared) -> Finding:
    """Outputs and gradients are PEFT's, of the same A and B in the same layers."""
    with no_fast_path():
        expected = of.results(of.theirs())
    return of.against(of.results(of.adapted()), expected)


def fused_peft(of: Compared) -> Finding:
    """PEFT's model computes fused what it did."""
    with no_fast_path():
        expected = of.results(of.theirs())
    model = of.theirs()
    with of.listening():
        fuse(model)
    return of.against(of.results(model), expected)


def saved(of: Compared) -> Finding:
    """A folder brings a fresh base to the same outputs, in ours and in PEFT."""
    model = of.adapted()
    of.warned.clear()
    with of.listening(), tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        warned = [message for message in of.warned if "PEFT" in message]
        ours = load_adapter(of.entry.base(), folder)
        theirs: nn.Module | Exception
        try:
            theirs = peft.PeftModel.from_pretrained(of.entry.base(), folder).eval()
        except Exception as error:
            theirs = error
    expected = of.entry.output(model).detach()
    found = of.outputs_agree(ours, expected)
    if found.verdict != OK:
        return Finding(DIFFERS, f"loaded again, {found.note or 'the output has other bits'}")
    if isinstance(theirs, Exception):
        return Finding(WARNED if warned else DIFFERS, f"PEFT does not read the folder: {brief(theirs)}")
    with no_fast_path():
        other = of.outputs_agree(theirs, expected)
    if other.verdict != DIFFERS:
        return found
    note = f"in PEFT {other.note}"
    return Finding(WARNED, f"{note}, as a warning says") if warned else Finding(DIFFERS, note)


def merged(of: Compared) -> Finding:
    """Merging keeps the outputs, in place and in a copy without adapters; unmerging brings back every bit."""
    model = of.adapted()
    expected, weights = of.entry.output(model).detach(), _weights(model)
    of.warned.clear()
    with of.listening():
        plain = merge_and_unload(copy.deepcopy(model))
        merge(model)
    left = [path for path, module in plain.named_modules() if isinstance(module, FusedLoRALinear)]
    if left:
        return Finding(DIFFERS, f"still adapted after merge_and_unload: {some(left)}")
    found = [of.outputs_agree(each, expected) for each in (model, plain)]
    unmerge(model)
    if any(not torch.equal(weights[path], weight) for path, weight in _weights(model).items()):
        return Finding(DIFFERS, "unmerge does not bring back the weights")
    verdicts = [each.verdict for each in found]
    if DIFFERS not in verdicts:
        return Finding(ROUNDED if ROUNDED in verdicts else OK)
    worse = found[verdicts.index(DIFFERS)]
    named = [path for path in of.pairs if _warned_of(of, path)]
    return Finding(WARNED, f"{worse.note}; a warning names {some(named)}") if named else worse


ASKED: dict[str, Callable[[Compared], Finding]] = dict(
    zip(CHECKS, (fresh, gradients, like_peft, fused_peft, saved, merged), strict=True)
)


def examine(entry: Entry) -> dict[str, Any]:
    """How many linear layers there are and are adapted, each check's verdict, its note where it has one, and where
    PEFT's "all-linear" chooses other layers."""
    of = Compared(entry)
    linears = sum(isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D" for m in entry.base().modules())
    found: dict[str, Any] = {"linears": linears, "adapted": 0, "checks": {}, "notes": {}, "all_linear": ""}
    try:
        found["adapted"] = len(of.pairs)
    except ValueError as error:
        return found | {"checks": dict.fromkeys(CHECKS, DIFFERS), "notes": {"fresh": brief(error)}}
    for name, check in ASKED.items():
        try:
            finding = check(of)
        except Exception as error:
            finding = Finding(DIFFERS, brief(error))
        found["checks"][name] = finding.verdict
        if finding.note:
            found["notes"][name] = finding.note
    return found | {"all_linear": _all_linear(of)}


def _warned_of(of: Compared, path: str) -> bool:
    return any(names_layer(message, path) for message in of.warned)


def _never_called(model: nn.Module, path: str) -> bool:
    """Whether summary says so of this layer."""
    rows = [row for row in summary(model).layers if row.path == path]
    return any("never called" in f"{row.implementation} {row.why}" for row in rows)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {path: layer.weight.detach().clone() for path, layer in lora_layers(model)}


def _all_linear(of: Compared) -> str:
    """Where PEFT's own "all-linear", which it has for Transformers' models only, chooses other layers than ours."""
    base = of.entry.base()
    if of.entry.targets != "all-linear" or not hasattr(base, "get_output_embeddings"):
        return ""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    try:
        with of.listening():
            theirs = peft_layers(peft.get_peft_model(base, config))
    except Exception as error:
        return f"PEFT's all-linear raises {brief(error)}"
    more, less = theirs.keys() - of.pairs.keys(), of.pairs.keys() - theirs.keys()
    said = [f"PEFT's all-linear adapts {some(more)} too"] if more else []
    return "; ".join([*said, *([f"PEFT's all-linear leaves out {some(less)}"] if less else [])])
