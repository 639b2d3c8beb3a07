"""Modules of which an adapter trains parameters of its own: ``modules_to_save``, and biases beside no A and B.

The base's parameters are never trained. Each adapter holds a copy of the module, and while it is active the copy's
forward is called instead: so the base comes back bit for bit, and for one thread alone where one alone asks.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import validation
from ..switching import Adapted


@dataclass(frozen=True)
class Part:
    """What an adapter trains of a module.

    names: of parameters, biases for instance; None means the whole, persistent buffers included.
    root: the path that ``modules_to_save`` named, the module's own or one above it; None where biases are trained.
    """

    names: tuple[str, ...] | None = None
    root: str | None = None

    def of(self, module: nn.Module) -> dict[str, Tensor]:
        """name -> tensor, the module's own, of what is trained and saved."""
        state = state_of(module)
        return state if self.names is None else {name: state[name] for name in self.names}


class Trained(Adapted):
    """The mixin; :func:`adopt` makes a module one, in place: it keeps its identity, its hooks and its names.

    Attributes such as ``weight`` stay the base's; an adapter's are in ``adapters.<name>``.
    """

    _parts: dict[str, Part]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        computing = self._computing
        if not computing or (self._switch.used and self._switch.off()):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        # not called as a module: this one's hooks are running already
        return computing[0].forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made as needed, so it is told by the one that it was made of
        reduced = super().__reduce_ex__(protocol)
        return _blank, (_base(type(self)),), *reduced[2:]

    def install(self, name: str, part: Part, clone: nn.Module) -> None:
        """Put ``clone``, a :func:`copy_of` this module, here as adapter ``name``, not active."""
        self.adapters[name] = clone.train(self.training)  # type: ignore[attr-defined]
        self._parts[name] = part

    def part(self, name: str) -> Part:
        return self._parts[name]

    def trained_parameters(self, name: str) -> list[nn.Parameter]:
        found = self._parts[name].of(self.adapters[name]).values()
        return [parameter for parameter in found if isinstance(parameter, nn.Parameter)]

    def check_together(self, names: Sequence[str]) -> None:
        if len(names) > 1:
            raise ValueError(f"only one active adapter may train modules_to_save or biases, got {list(names)}")

    def unmerge(self) -> None:
        """Nothing: the copy is called, merged or not."""

    def delete_adapter(self, name: str) -> None:
        super().delete_adapter(name)
        del self._parts[name]

    def check_finite(self) -> None:
        for name in self._active:
            for key, tensor in self._parts[name].of(self.adapters[name]).items():
                if not validation.is_finite(tensor):
                    raise ValueError(f"adapter {name!r} must be finite, got NaN or infinity in {key!r}")

    def replaced(self) -> dict[str, Tensor]:
        return self._parts[self._active[0]].of(self) if self._active else {}  # type: ignore[arg-type]

    @torch.no_grad()
    def unload(self) -> nn.Module:
        for key, base in self.replaced().items():
            base.data = self._parts[self._active[0]].of(self.adapters[self._active[0]])[key].data
        _undo(self)
        return self  # type: ignore[return-value]


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers themselves, without an adapted module's adapters."""
    return {
        key: value
        for key, value in module.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor) and not (key.startswith("adapters.") and isinstance(module, Adapted))
    }


def copy_of(module: nn.Module, part: Part, shared: dict[int, nn.Parameter]) -> nn.Module:
    """A copy of ``module`` with Parameters of its own for what is trained, and the very Parameters of the rest.

    shared: base Parameter's id -> its copy; parameters that are one in the base are one in all copies of an adapter.
    """
    # deepcopy takes what the memo holds for an object as its copy
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    for parameter in part.of(module).values():
        if isinstance(parameter, nn.Parameter):
            if id(parameter) not in shared:
                shared[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            memo[id(parameter)] = shared[id(parameter)]
    if part.names is not None and all("." not in key for key in part.names):
        # a bias of the module itself: what is below it stays the very same modules
        memo.update({id(child): child for child in module.children()})
    if isinstance(module, Trained):
        # the copy is of the module without its adapters
        memo.update({id(adapter): adapter for adapter in module.adapters.children()})
    clone = copy.deepcopy(module, memo)
    if isinstance(clone, Trained):
        _undo(clone)
    return clone


def adopt(module: nn.Module) -> Trained:
    """Turn ``module`` itself into a :class:`Trained` one without adapters."""
    if not isinstance(module, Trained):
        module.__class__ = _trained_class(type(module))  # type: ignore[arg-type]  # mypy: a class hashes
        assert isinstance(module, Trained)
        module._adapt()
        module._parts = {}
    return module


def _undo(module: Trained) -> None:
    for attribute in ("adapters", "_active", "_computing", "_switch", "_parts"):
        delattr(module, attribute)
    module.__class__ = _base(type(module))


def _base(cls: type) -> type:
    return cls.__bases__[1]


@functools.cache
def _trained_class(base: Any) -> type[nn.Module]:
    return type(f"Trained{base.__name__}", (Trained, base), {"__module__": base.__module__, "__doc__": Trained.__doc__})


def _blank(base: type[nn.Module]) -> nn.Module:
    """For copying and pickling: an adopted ``base`` whose state is still to come."""
    cls = _trained_class(base)  # type: ignore[arg-type]
    return cls.__new__(cls)
