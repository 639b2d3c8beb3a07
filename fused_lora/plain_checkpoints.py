"""State dicts of a base model, loaded into a model with adapters: what they lack of adapters is not missing."""

from __future__ import annotations

import threading
from typing import Any

from torch import nn


class _Load(threading.local):
    """The ``load_state_dict`` under way in this thread, told by the list of missing keys that all of its modules share.

    absent: keys of adapters that modules so far did not find.  found: whether a module has found any.
    """

    def __init__(self) -> None:
        self.start([])

    def start(self, missing: list[str]) -> None:
        self.missing = missing
        self.absent: list[str] = []
        self.found = False


_load = _Load()


class LoadsPlainCheckpoints:
    """The part of a module with ``adapters`` that reads a state dict without them, with ``strict=True`` too.

    All or nothing: a state dict that holds adapters of one module of the model must hold those of all. A merged module
    is unmerged first, and stays so.
    """

    adapters: nn.ModuleDict

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        missing = rest[2]
        if missing is not _load.missing:
            _load.start(missing)
        inner = f"{prefix}adapters."
        if any(key.startswith(inner) for key in state_dict):
            _load.found = True
            missing += _load.absent
            _load.absent = []
        elif not _load.found:
            if self.adapters.merged and any(key.startswith(prefix) for key in state_dict):
                # it is the base that is read, and what unmerging would put back is the old one
                self.unmerge()  # type: ignore[attr-defined]
            # the adapters' modules read their own tensors; this is not the caller's dict, which PyTorch copies
            own = {inner + key: tensor for key, tensor in self.adapters.state_dict(keep_vars=True).items()}
            state_dict.update(own)
            _load.absent += own
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]
