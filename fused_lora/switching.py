"""What every adapted module has: adapters by name, which of them are active, and who has switched them off."""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import validation
from .plain_checkpoints import LoadsPlainCheckpoints
from .renamed import renamed
from .torch_internals import graph_task, passes


class _Here(threading.local):
    """What one thread knows of a switch. Attributes are set in ``__init__``: so a compiler guards on this thread's.

    entries: for each ``disable_adapters`` that this thread is in, the passes of autograd that it was entered in.
    """

    def __init__(self) -> None:
        self.off = False
        self.entries: list[frozenset[object]] = []


class Switch:
    """Switches a module's adapters off, in the thread that asks alone; nestable. A copy starts switched on.

    Activation checkpointing computes a forward again in the backward, later, and a GPU's on another thread: it is off
    then as it was in that forward, whatever the thread is in. So a forward that is off is noted with the passes that
    may repeat it.

    ``used`` is whether any thread has them off, or a forward that had may be repeated: all that a forward reads else.

    Args:
        off: they are off for every thread, for good.
    """

    def __init__(self, *, off: bool = False) -> None:
        self.used = self._always = off
        self._threads = 0
        self._lock = threading.Lock()
        self._here = _Here()
        self._off_in: weakref.WeakSet[object] = weakref.WeakSet()

    def __reduce__(self) -> tuple[type[Switch], tuple[()]]:
        return Switch, ()

    def off(self) -> bool:
        """Whether they are off here."""
        if self._always:
            return True
        here = self._here
        if torch.compiler.is_compiling():
            return here.off
        if graph_task() == -1 and not here.off:
            self._settle()
            return False
        return self._off_in_passes(here.entries)

    def _off_in_passes(self, entries: list[frozenset[object]]) -> bool:
        forwards = []
        repeats = False
        for each, is_backward in passes(sys._getframe(2)):
            if is_backward:
                # entered within: the forward was, too
                entries = [entry for entry in entries if each in entry]
                repeats = each in self._off_in
                break
            forwards.append(each)
        if not repeats and not entries:
            return False
        with self._lock:
            self._off_in.update(f for f in forwards if repeats or any(f not in entry for entry in entries))
        return True

    def turn(self, *, off: bool, within: frozenset[object] = frozenset()) -> None:
        """Within: the passes of autograd that this is called in."""
        here = self._here
        if off:
            here.entries.append(within)
        else:
            here.entries.pop()
        if here.off == bool(here.entries):
            return
        here.off = bool(here.entries)
        with self._lock:
            self._threads += 1 if off else -1
        self._settle()

    def _settle(self) -> None:
        with self._lock:
            self.used = self._always or self._threads > 0 or len(self._off_in) > 0


class Adapters(nn.ModuleDict):
    """The adapters of a module by name, and which of them are active.

    active: their names, in order.
    computing: the modules of these names. It follows every change of either, so that a forward that reads it computes
        what is here. Looking the names up in the forward would be right too, but a compiled call would guard them, and
        compile again for each.
    merged: whether the active ones are part of the weight now.
    """

    active: tuple[str, ...]
    computing: tuple[nn.Module, ...]
    merged: bool

    def __init__(self) -> None:
        super().__init__()
        # past nn.Module, which looks at each value set whether it is a parameter or a module
        vars(self).update(active=(), computing=(), merged=False)

    def activate(self, names: Sequence[str]) -> None:
        """Make the adapters of these names, which are here, the active ones."""
        vars(self).update(active=tuple(names), computing=tuple(self._modules[name] for name in names))

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._check_not_merged(name)
        super().add_module(name, module)
        self.activate(self.active)

    def __setattr__(self, name: str, value: Any) -> None:
        self._check_not_merged(name)
        super().__setattr__(name, value)
        if self._is_active(name):
            self.activate(self.active)

    def __delitem__(self, name: str) -> None:
        self._check_idle(name)
        super().__delitem__(name)

    def __delattr__(self, name: str) -> None:
        self._check_idle(name)
        super().__delattr__(name)

    def clear(self) -> None:
        for name in self:
            self._check_idle(name)
        super().clear()

    def _is_active(self, name: str) -> bool:
        # nn.Module sets attributes before there are names
        return name in vars(self).get("active", ())

    def warn_of_training_merged(self) -> None:
        """Warn where a forward in training mode would give the active adapters gradients if they were not merged."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if any(parameter.requires_grad for module in self.computing for parameter in module.parameters()):
            names = ", ".join(map(repr, self.active))
            warnings.warn(
                f"adapter {names} is merged into the weight, so this forward in training mode gives it no gradients; "
                "call fused_lora.unmerge(model) before training, or model.eval() where no training is meant",
                stacklevel=3,
            )

    def _check_not_merged(self, name: str) -> None:
        if self._is_active(name) and self.merged:
            raise ValueError(f"adapter {name!r} is merged into the weight; unmerge before another takes its place")

    def _check_idle(self, name: str) -> None:
        if self._is_active(name):
            raise ValueError(f"adapter {name!r} is active; delete it by delete_adapter, or set another one first")

    def _replicate_for_data_parallel(self) -> Adapters:
        replica = super()._replicate_for_data_parallel()
        replica.__class__ = _Replica
        return replica

    def _get_name(self) -> str:
        return "ModuleDict"


class _Replica(Adapters):
    """A copy that ``nn.DataParallel`` makes for one call: it writes the copied adapters into ``_modules``."""

    @property
    def computing(self) -> tuple[nn.Module, ...]:  # type: ignore[override]
        return tuple(self._modules[name] for name in self.active)  # type: ignore[misc]


class Adapted(LoadsPlainCheckpoints):
    """The part of a module that has adapters: a mixin before the module's class.

    ``adapters`` holds a submodule for each name; those not active are neither computed nor trained.
    """

    adapters: Adapters
    _switch: Switch

    def _adapt(self) -> None:
        self.adapters = Adapters()
        self._switch = Switch()

    def _replicate_for_data_parallel(self) -> Any:
        # a replica computes on a thread of its own, for the one that makes it here
        replica = super()._replicate_for_data_parallel()  # type: ignore[misc]
        replica._switch = Switch(off=self.disabled)
        return replica

    def trained_parameters(self, name: str) -> list[nn.Parameter]:
        """What adapter ``name`` trains in this module."""
        raise NotImplementedError

    def check_together(self, names: Sequence[str]) -> None:
        """ValueError where these adapters, all here, can't be active at once."""
        raise NotImplementedError

    def unmerge(self) -> None:
        raise NotImplementedError

    def check_finite(self) -> None:
        """ValueError where :meth:`unload` would leave a NaN or an infinity."""
        raise NotImplementedError

    def replaced(self) -> dict[str, Tensor]:
        """The base's tensors, by name, that :meth:`unload` gives other values."""
        raise NotImplementedError

    def unload(self) -> nn.Module:
        """Turn this module itself into one of the class that it had, with what the active adapters make of it; adapters
        are dropped."""
        raise NotImplementedError

    @property
    def active_adapters(self) -> tuple[str, ...]:
        """The names of the active adapters, in order."""
        return self.adapters.active

    @property
    def strengths(self) -> dict[str, float]:
        """How much each active adapter counts here, in order."""
        return dict.fromkeys(self.active_adapters, 1.0)

    @property
    def disabled(self) -> bool:
        """Whether this thread is within ``disable_adapters``."""
        return self._switch.used and self._switch.off()

    @renamed(names="adapter")
    def set_adapter(self, adapter: str | Sequence[str] | Mapping[str, float] | None, *, trainable: bool = True) -> None:
        """Make these adapters active and trainable, and the others not; None or () leaves the base. Unmerges first.

        See :func:`fused_lora.set_adapter`.

        Raises:
            ValueError: a name is not here, or stands there twice, or they can't be active together; nothing is changed.
        """
        chosen = validation.check_strengths(adapter)
        for name in chosen:
            validation.check_known_adapter(name, self.adapters)
        self.check_together(tuple(chosen))
        self._activate(chosen)
        for name in self.adapters:
            for parameter in self.trained_parameters(name):
                parameter.requires_grad_(trainable and name in chosen)

    def _activate(self, strengths: Mapping[str, float]) -> None:
        if [*strengths.items()] != [*self.strengths.items()]:
            self.unmerge()
        self.adapters.activate(tuple(strengths))

    @renamed(name="adapter")
    def delete_adapter(self, adapter: str) -> None:
        """Remove an adapter; where it was active, the others that were stay so."""
        validation.check_known_adapter(adapter, self.adapters)
        if adapter in self.active_adapters:
            self._activate({name: strength for name, strength in self.strengths.items() if name != adapter})
        del self.adapters[adapter]


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every module once, as ``named_modules`` gives them, without what is inside adapters."""
    validation.check_model(model)
    seen: set[nn.Module] = set()

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if module in seen:
            return
        seen.add(module)
        yield path, module
        for name, child in module._modules.items():
            if child is not None and not (name == "adapters" and isinstance(module, Adapted)):
                yield from walk(f"{path}.{name}" if path else name, child)

    return walk("", model)


def adapted_modules(model: nn.Module) -> list[tuple[str, Adapted]]:
    """(path, module) of every module of ``model`` that has adapters."""
    return [(path, module) for path, module in base_modules(model) if isinstance(module, Adapted)]
