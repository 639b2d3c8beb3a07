"""Names in an adapter folder: PEFT's prefix before them, and what wrappers of modules put between them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from torch import nn

PREFIX = "base_model.model."
# the name of an adapter may stand before ".weight", as some writers leave it there
PAIR = re.compile(r"(?:(?P<path>.+)\.)?lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
# torch.compile, FSDP and activation checkpointing keep the module that they wrap under such a name. A pattern may
# have its dot escaped
_WRAPPED = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?:\\?\.|$)")


def unwrapped_name(name: str) -> str:
    """A path, or a pattern of paths, without the names of wrappers: "_orig_mod.head" is the model's own "head"."""
    shorter = _WRAPPED.sub("", name)
    return name if shorter == name else shorter.removesuffix(".")


def without_prefix(keys: Iterable[str]) -> list[str]:
    """The keys without PEFT's prefix, which all have or none.

    Raises:
        ValueError: some have it, or none is of A or B as PEFT names them.
    """
    listed = list(keys)
    foreign = [key for key in listed if not key.startswith(PREFIX)]
    if not foreign:
        return [key[len(PREFIX) :] for key in listed]
    if len(foreign) < len(listed) or not any(PAIR.fullmatch(key) for key in listed):
        raise ValueError(f"keys must be {PREFIX}<layer>.lora_A.weight or the like, got {foreign[0]!r}")
    return listed


def renaming(
    model: nn.Module, names: list[str], modules: dict[str, nn.Module]
) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """(the model's name for one of the file, the file's for one of the model).

    They differ where a Transformers model with a head reads what was saved from the bare one, or the other way round:
    ``base_model_prefix`` stands before all but the head's names, as in its own checkpoints.
    """
    prefix = getattr(model, "base_model_prefix", None)
    paths = [match["path"] for name in names if (match := PAIR.fullmatch(name)) and match["path"]]
    if isinstance(prefix, str) and prefix and paths and paths[0] not in modules:

        def with_prefix(name: str) -> str:
            return f"{prefix}.{name}"

        def without(name: str) -> str:
            return name.removeprefix(f"{prefix}.")

        if with_prefix(paths[0]) in modules:
            return with_prefix, without
        if without(paths[0]) in modules:
            return without, with_prefix
    return (lambda name: name), (lambda name: name)
