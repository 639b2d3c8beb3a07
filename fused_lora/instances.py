"""What others keep on a module itself: a ``forward``, as accelerate's hooks do, and where they keep its weight.

A module that gets another class in place would go on with the forward of its old one. accelerate's hooks call theirs
by ``_old_forward``, and leave it as ``forward`` where they are removed; those are bound to the new class. Any other
forward is not ours to change, so that module is refused.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn


def become(module: nn.Module, kind: Any) -> None:
    """Give ``module`` another class, and what is bound to its old forward the new one.

    Raises:
        ValueError: :func:`check_forward`'s.
    """
    if type(module) is kind:
        return
    check_forward(module, type(module).__name__)
    inside = vars(module)
    if not _is_hooked(module):
        inside.pop("forward", None)
    module.__class__ = kind
    if "_old_forward" in inside:
        inside["_old_forward"] = types.MethodType(kind.forward, module)
        inside["forward"].__wrapped__ = inside["_old_forward"]


def check_forward(module: nn.Module, path: str) -> None:
    """ValueError where a forward was put on the instance that would hide the one of another class."""
    name = foreign_forward(module)
    if name is not None:
        raise ValueError(
            f"{path!r} must have the forward of its class, got another that was put on the instance ({name}), which "
            f"would hide the adapter; put it there afterwards"
        )


def foreign_forward(module: Any) -> str | None:
    """The attribute of a forward on the instance that is not the class's own; None without one."""
    name = "_old_forward" if _is_hooked(module) else "forward"
    forward: Any = vars(module).get(name)
    kind: Any = type(module)
    if forward is None:
        return None
    own = getattr(forward, "__self__", None) is module and forward.__func__ is kind.forward
    return None if own else name


def _is_hooked(module: nn.Module) -> bool:
    """Whether the forward on the instance is what ``accelerate.hooks.add_hook_to_module`` puts there."""
    forward = vars(module).get("forward")
    return (
        isinstance(forward, functools.partial)
        and forward.func.__qualname__ == "add_hook_to_module.<locals>.new_forward"
        and "_old_forward" in vars(module)
    )


def offloading(hook: Any) -> Any:
    """Of a hook of accelerate's, the part that puts tensors on meta between calls; None without one."""
    parts = getattr(hook, "hooks", (hook,))
    return next((part for part in parts if getattr(part, "offload", False) is True), None)


def offload_of(module: nn.Module) -> Any:
    """The hook by which accelerate puts this module's tensors on meta between calls; None without one."""
    return offloading(vars(module).get("_hf_hook"))


def device_of(module: Any) -> torch.device:
    """Where a layer's weight is when it computes."""
    hook = offload_of(module)
    return weight_of(module).device if hook is None else _device(hook)


def weight_of(layer: Any) -> Tensor:
    """The weight; where a hook computes it at every call, what that is done from, which follows ``.to()`` at once."""
    if "weight" not in vars(layer):
        return layer.weight
    return next((p for name, p in layer._parameters.items() if name.startswith("weight_")), layer.weight)


def value_of(module: nn.Module, name: str) -> Tensor:
    """The Parameter or buffer of this name; where accelerate keeps it elsewhere, its value on the execution device."""
    hook = offload_of(module)
    return getattr(module, name) if hook is None else kept_by(hook, name)


def kept_by(hook: Any, name: str) -> Tensor:
    return hook.weights_map[name].detach().to(_device(hook))


def bring_back(module: nn.Module, hook: Any) -> None:
    """Give what such a hook put on meta its values again, on the execution device."""
    stores: list[dict[str, Any]] = [module._parameters, module._buffers]
    for tensors in stores:
        for name, tensor in tensors.items():
            if tensor is not None and tensor.is_meta:
                value = kept_by(hook, name)
                whole = isinstance(tensor, nn.Parameter)
                tensors[name] = nn.Parameter(value, requires_grad=tensor.requires_grad) if whole else value


def drop_hooks(module: nn.Module) -> None:
    """Take accelerate's hook off this one module."""
    if _is_hooked(module):
        for attribute in ("forward", "_old_forward", "_hf_hook"):
            del vars(module)[attribute]


def _device(hook: Any) -> torch.device:
    return torch.device("cpu" if hook.execution_device is None else hook.execution_device)


def check_not_offloaded(module: nn.Module, what: str) -> None:
    """ValueError where accelerate keeps this module's weight elsewhere: it has no value to be changed here."""
    if offload_of(module) is not None:
        raise ValueError(
            f"a weight that accelerate offloads can't be {what}; call "
            "accelerate.hooks.remove_hook_from_submodules(model) first, which brings it back"
        )
