"""Modules of which an adapter trains parameters of its own: ``modules_to_save``, and biases beside no A and B.

The base's parameters are never trained. Each adapter holds a copy of the module, without its submodules. While it is
active, the copy's tensors are what any code reads by name (``self.embed.weight``). So the base comes back bit for bit,
and only for the thread that asks for it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import validation
from ..instances import become, bring_back, check_not_offloaded, drop_hooks, offload_of
from ..switching import Adapted


@dataclass(frozen=True)
class Part:
    """What an adapter trains of a module.

    names: of parameters, biases for instance; None means all that the module itself holds, persistent buffers included.
    Its submodules have Parts of their own.
    root: the path that ``modules_to_save`` named, the module's own or one above it; None where biases are trained.
    """

    names: tuple[str, ...] | None = None
    root: str | None = None

    def of(self, module: nn.Module) -> dict[str, Tensor]:
        """name -> tensor, the module's own, of what is trained and saved."""
        state = own_state(module)
        return state if self.names is None else {name: state[name] for name in self.names}


class Trained(Adapted):
    """The mixin; :func:`adopt` makes a module one, in place: it keeps its identity, its hooks and its names.

    Attributes such as ``weight`` are the active adapter's, as a forward has them, and the base's where no adapter is
    active. State dicts and ``named_parameters`` have both: the base's as ``weight``, an adapter's as
    ``adapters.<name>.weight``.
    """

    _parts: dict[str, Part]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        active = self._active_copy()
        if active is None or len(self._modules) > 1:  # type: ignore[attr-defined]
            # with submodules: this forward reads the copy's tensors by their names, and calls the very submodules
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        # without them: an LSTM, for one, reads its weights past their names
        return active(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Called for what ``nn.Module`` registers, as that is no plain attribute."""
        value = super().__getattr__(name)  # type: ignore[misc]
        if isinstance(value, Tensor):
            active = self._active_copy()
            if active is not None:
                return getattr(active, name)
        return value

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()  # type: ignore[misc]
        # a replica's parameters are set as tensors: as buffers, not as plain attributes, they come by __getattr__ too
        replica._buffers.update(dict.fromkeys(self._parameters))  # type: ignore[attr-defined]
        return replica

    def _active_copy(self) -> nn.Module | None:
        """The copy that computes here, None where the base does."""
        computing = self._modules["adapters"].computing  # type: ignore[attr-defined]
        if not computing or (self._switch.used and self._switch.off()):
            return None
        return computing[0]

    @property
    def _old_forward(self) -> Any:
        """Where accelerate puts this module's forward before it moves what the module holds."""
        return self._of_accelerate("_old_forward")

    @_old_forward.setter
    def _old_forward(self, forward: Any) -> None:
        vars(self).update(_old_forward=forward, _before_hook=own_state(self))  # type: ignore[arg-type]

    @_old_forward.deleter
    def _old_forward(self) -> None:
        del vars(self)["_old_forward"]

    @property
    def _hf_hook(self) -> Any:
        """Where accelerate puts its hook, once it has moved what it reads by name: the active copy's tensors.

        So the base's own are moved here, to where those went.
        """
        return self._of_accelerate("_hf_hook")

    @_hf_hook.setter
    def _hf_hook(self, hook: Any) -> None:
        inside = vars(self)
        inside["_hf_hook"] = hook
        for name, base in inside.pop("_before_hook", {}).items():
            tensors = inside["_parameters" if name in inside["_parameters"] else "_buffers"]
            moved = tensors[name]
            if moved is not base and not moved.is_meta:
                value = base.detach().to(moved.device)
                tensors[name] = nn.Parameter(value, requires_grad=False) if isinstance(base, nn.Parameter) else value

    @_hf_hook.deleter
    def _hf_hook(self) -> None:
        del vars(self)["_hf_hook"]

    def _of_accelerate(self, name: str) -> Any:
        if name not in vars(self):
            raise AttributeError(name)
        return vars(self)[name]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made as needed, so it is told by the one that it was made of
        reduced = super().__reduce_ex__(protocol)
        return _blank, (_base(type(self)),), *reduced[2:]

    def install(self, name: str, part: Part, clone: nn.Module) -> None:
        """Put ``clone``, one of :func:`copies_of`, here as adapter ``name``, not active."""
        self.adapters[name] = clone.train(self.training)  # type: ignore[attr-defined]
        self._parts[name] = part

    def part(self, name: str) -> Part:
        return self._parts[name]

    def trained(self, name: str) -> dict[str, Tensor]:
        """name -> tensor, of what adapter ``name`` trains: with its values, where accelerate offloaded them too."""
        clone = self.adapters[name]
        if (hook := offload_of(clone)) is not None:
            # a hook makes new Parameters in each forward, which no optimizer and no gradient would outlast
            bring_back(clone, hook)
            drop_hooks(clone)
        return self._parts[name].of(clone)

    def trained_parameters(self, name: str) -> list[nn.Parameter]:
        return [parameter for parameter in self.trained(name).values() if isinstance(parameter, nn.Parameter)]

    def check_together(self, names: Sequence[str]) -> None:
        if len(names) > 1:
            raise ValueError(f"only one active adapter may train modules_to_save or biases, got {list(names)}")

    def unmerge(self) -> None:
        """Nothing: the copy is called, merged or not."""

    def delete_adapter(self, name: str) -> None:
        super().delete_adapter(name)
        del self._parts[name]

    def check_finite(self) -> None:
        for name in self.active_adapters:
            check_not_offloaded(self, "replaced")  # type: ignore[arg-type]
            for key, tensor in self.trained(name).items():
                if not validation.is_finite(tensor):
                    raise ValueError(f"adapter {name!r} must be finite, got NaN or infinity in {key!r}")

    def replaced(self) -> dict[str, Tensor]:
        return {name: base for name, (base, _) in self.replacements().items()}

    def replacements(self) -> dict[str, tuple[Tensor, Tensor]]:
        """name -> the base's tensor, and the active adapter's that :meth:`unload` puts in its place."""
        if not self.active_adapters:
            return {}
        (name,) = self.active_adapters
        part, trained = self._parts[name], self.trained(name)
        return {name: (base, trained[name]) for name, base in part.of(self).items()}  # type: ignore[arg-type]

    @torch.no_grad()
    def unload(self) -> nn.Module:
        for base, trained in self.replacements().values():
            base.data = trained.data
        _undo(self)
        return self  # type: ignore[return-value]


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """The base's Parameters and persistent buffers themselves that ``module`` holds, not those of its submodules."""
    buffers = {name: b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set}
    return {name: tensor for name, tensor in {**module._parameters, **buffers}.items() if tensor is not None}


def copies_of(parts: Mapping[str, tuple[nn.Module, Part]], *, tied: bool = False) -> dict[str, tuple[Part, nn.Module]]:
    """path -> part, a fresh copy of the module.

    Parameters that are one in the base are one in the copies below one root of ``modules_to_save``. Other roots have
    copies of their own, as in PEFT, unless ``tied``.
    """
    shared: dict[tuple[str | None, int], nn.Parameter] = {}
    return {path: (part, _copy_of(module, part, shared, tied)) for path, (module, part) in parts.items()}


def _copy_of(
    module: nn.Module, part: Part, shared: dict[tuple[str | None, int], nn.Parameter], tied: bool
) -> nn.Module:
    """A copy of ``module`` without its submodules, with Parameters of its own for what is trained, and the very
    Parameters of the rest.

    shared: root and id of a base Parameter -> its copy.
    """
    # deepcopy takes what the memo holds for an object as its copy
    memo: dict[int, Any] = {id(kept): kept for kept in (*module.parameters(recurse=False), *module.children())}
    for parameter in part.of(module).values():
        if isinstance(parameter, nn.Parameter):
            key = (None if tied else part.root, id(parameter))
            if key not in shared:
                shared[key] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            memo[id(parameter)] = shared[key]
    # accelerate's hooks are the module's alone, and hold what it offloads of the whole model
    hook = vars(module).get("_hf_hook")
    memo[id(hook)] = hook
    clone = copy.deepcopy(module, memo)
    if isinstance(clone, Trained):
        _undo(clone)
    drop_hooks(clone)
    for name, hooks in vars(clone).items():
        # those of the module run for the copy too; the copy's own are for hooks that are registered on it later
        if "_hooks" in name and isinstance(hooks, dict):
            hooks.clear()
    clone._modules.clear()
    return clone


def adopt(module: nn.Module) -> Trained:
    """Turn ``module`` itself into a :class:`Trained` one without adapters."""
    if not isinstance(module, Trained):
        become(module, _trained_class(type(module)))  # type: ignore[arg-type]  # mypy: a class hashes
        assert isinstance(module, Trained)
        module._adapt()
        module._parts = {}
    return module


def _undo(module: Any) -> None:
    become(module, _base(type(module)))
    for attribute in ("adapters", "_switch", "_parts"):
        delattr(module, attribute)


def _base(cls: type) -> type:
    return cls.__bases__[1]


@functools.cache
def _trained_class(base: Any) -> type[nn.Module]:
    return type(f"Trained{base.__name__}", (Trained, base), {"__module__": base.__module__, "__doc__": Trained.__doc__})


def _blank(base: type[nn.Module]) -> nn.Module:
    """For copying and pickling: an adopted ``base`` whose state is still to come."""
    cls = _trained_class(base)  # type: ignore[arg-type]
    return cls.__new__(cls)
