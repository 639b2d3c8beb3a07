"""What every adapted module has: adapters by name, which of them are active, and who has switched them off."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from . import validation
from .plain_checkpoints import LoadsPlainCheckpoints
from .renamed import renamed
from .torch_internals import graph_task


class _Here(threading.local):
    """What one thread knows of a switch. Attributes are set in ``__init__``: so a compiler guards on this thread's."""

    def __init__(self) -> None:
        self.depth = 0
        self.off = False
        # a device's backward runs on a thread of autograd's own, where checkpointing recomputes what another began
        self.in_autograd = graph_task() != -1


class Switch:
    """Switches a module's adapters off, in the thread that asks alone; nestable. A copy starts switched on.

    ``used`` is whether any thread has them off: all that a forward reads while none has.
    """

    def __init__(self) -> None:
        self.used = False
        self._threads = 0
        self._lock = threading.Lock()
        self._here = _Here()

    def __reduce__(self) -> tuple[type[Switch], tuple[()]]:
        return Switch, ()

    def off(self) -> bool:
        """Whether they are off here. Autograd's own threads follow whichever thread has them off: they wait for it."""
        here = self._here
        return here.off or (here.in_autograd and self.used)

    def turn(self, *, off: bool) -> None:
        here = self._here
        here.depth += 1 if off else -1
        if here.off == (here.depth > 0):
            return
        here.off = here.depth > 0
        with self._lock:
            self._threads += 1 if off else -1
            self.used = self._threads > 0


class Adapted(LoadsPlainCheckpoints):
    """The part of a module that has adapters: a mixin before the module's class.

    ``adapters`` holds a submodule for each name; those not active are neither computed nor trained.
    """

    adapters: nn.ModuleDict
    _active: tuple[str, ...]
    _computing: tuple[nn.Module, ...]
    _switch: Switch

    def _adapt(self) -> None:
        self.adapters = nn.ModuleDict()
        self._switch = Switch()
        self._active = self._computing = ()

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
        return self._active

    @property
    def strengths(self) -> dict[str, float]:
        """How much each active adapter counts here, in order."""
        return dict.fromkeys(self._active, 1.0)

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
        self._active = tuple(strengths)
        # what forward reads: a compiled call guards the shapes that it finds there, and not the names
        self._computing = tuple(self.adapters._modules[name] for name in strengths)  # type: ignore[misc]

    @renamed(name="adapter")
    def delete_adapter(self, adapter: str) -> None:
        """Remove an adapter; where it was active, the others that were stay so."""
        validation.check_known_adapter(adapter, self.adapters)
        if adapter in self._active:
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
