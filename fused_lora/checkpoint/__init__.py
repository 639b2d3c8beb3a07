"""Adapters on disk, in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors`` in one folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import validation
from ..adapter import LoRAAdapter
from ..called import warn_of_never_called
from ..instances import offload_of, value_of
from ..layer import FusedLoRALinear
from ..models.apply import Model, adapter_names, check_here, install, set_adapter
from ..models.modules_to_save import Trained
from ..renamed import refused
from ..switching import Adapted, adapted_modules
from .reading import read_folder
from .writing import CONFIG_FILE, WEIGHTS_FILE, base_under, contents, write_folder, writes_here

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "base_state_dict", "hotswap_adapter", "load_adapter", "save_adapter"]


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], adapter: str = "default") -> None:
    """Write adapter ``adapter`` of ``model``, alone, where PEFT, vLLM and :func:`load_adapter` read it.

    A and B, and what the adapter trains beside them. Of a Transformers model the folder says which it is, and for what
    task. ``model`` may be compiled or wrapped for data parallelism.

    Where the adapter is sharded (DTensor), every rank must call: all gather, and the first of the mesh writes.

    Whenever it is stopped, by a kill too, :func:`load_adapter` finds the old adapter or the new one, whole. (Other
    readers see one file of each between the two moves that end it, if the two have different configs.) What else is in
    the folder is left alone.

    Raises:
        ValueError: no layer has that adapter, or its layers differ in what the format holds once.
        OSError: the folder can't be written (NotADirectoryError: it is a file); it holds what it held.
    """
    model = _unwrapped(model)
    folder = validation.check_folder(folder)
    _check_here(model, folder, adapter)
    warn_of_never_called(model, "Their adapters are saved as they are.")
    config, tensors = contents(model, adapter)
    if writes_here(model):
        write_folder(folder, config, tensors, base_under(model, adapter))


@refused(
    adapter_name="did you mean 'adapter'?",
    device="A and B go where their layers' weights are: move the model",
    is_trainable="did you mean 'trainable'?",
)
def load_adapter(
    model: Model,
    folder: str | os.PathLike[str],
    adapter: str = "default",
    strict: bool = True,
    *,
    activate: bool = True,
    trainable: bool = True,
    impl: str = "auto",
    replace: bool = False,
) -> Model:
    """Read an adapter folder, ours or PEFT's, into ``model`` as ``adapter`` and make it active; returns ``model``.

    A plain model is adapted on the way: its base is frozen and the layers in the folder get the adapter. A fresh
    adapter of that name, which changes no output, is replaced. Values of A and B keep their precision: tensors of
    another dtype than the weight's are held in float32.

    Args:
        strict: refuse keys that the model has no place for, layers in the file that the config does not name, layers
            that the config names and the file lacks, and a folder that says it was saved over a base of another kind
            ("nf4"), as ours say where it is quantized. Without it they are left alone, and one warning lists them.
        activate: False leaves it to :func:`fused_lora.set_adapter`. An active adapter that it replaces is not active
            then, the others stay so.
        trainable: False freezes it, for inference, until adapters are set again.
        impl: for every layer adapted now; see :func:`fused_lora.lora_linear`.
        replace: drop an adapter of that name even where it may be trained: some B is not zero, or it trains
            ``modules_to_save`` or biases.

    Raises:
        OSError, ValueError: the folder is not what it claims, or does not fit the model, or an adapter of that name is
            here that is not fresh, and ``replace`` is False; nothing is changed.
    """
    validation.check_adapter_name(adapter)
    validation.check_impl(impl)
    validation.check_flag(replace, "replace")
    inner = _unwrapped(model)
    installation = read_folder(inner, validation.check_folder(folder), strict)
    before = adapted_modules(inner)
    if not replace:
        _check_fresh(before, adapter)
    if not before:
        inner.requires_grad_(False)
    for _, module in before:
        if adapter in module.adapters:
            module.delete_adapter(adapter)
    install(inner, adapter, installation, impl)
    if activate:
        set_adapter(inner, adapter, trainable=trainable)
    return model


def _check_fresh(modules: Iterable[tuple[str, Adapted]], adapter: str) -> None:
    """ValueError where an adapter of this name may hold what was trained, which replacing it would lose."""
    for path, module in modules:
        if adapter not in module.adapters:
            continue
        if not isinstance(module, FusedLoRALinear):
            what = "modules_to_save or biases"
        elif module.adapter(adapter).trains_bias:
            what = "a bias"
        elif validation.is_zero(module.adapter(adapter).lora_B):
            continue
        else:
            what = "a B that is not zero"
        raise ValueError(
            f"adapter {adapter!r} is here already, with {what} in {path or 'the model'!r}; load the folder under "
            "another name, or pass replace=True to drop it"
        )


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """``model.state_dict()`` of the base alone: its own names and, merged or not, its own values, which are shared.

    ``model`` may be compiled or wrapped for data parallelism. Sharded tensors are given as they are.
    """
    inner = _unwrapped(model)
    state = inner.state_dict()
    adapters: list[str] = []
    # a module of two names stands there under both
    for path, module in inner.named_modules(remove_duplicate=False):
        stem = f"{path}." if path else ""
        if isinstance(module, Adapted):
            adapters.append(f"{stem}adapters.")
        if isinstance(module, FusedLoRALinear) and module.merged:
            state.update({stem + name: tensor for name, tensor in module.base_state().items()})
        if offload_of(module) is not None:
            held = [stem + name for name in (*module._parameters, *module._buffers) if stem + name in state]
            state.update({key: value_of(module, key.removeprefix(stem)) for key in held})
    return {key: value for key, value in state.items() if not key.startswith(tuple(adapters))}


def hotswap_adapter(model: Model, folder: str | os.PathLike[str], adapter: str = "default") -> Model:
    """Put a folder's values into an adapter that is here, in place; returns ``model``.

    Every Parameter stays the one it is, with its shape and the layer's scale, so nothing is compiled again, no CUDA
    graph is captured again, and optimizers keep what they hold. A smaller rank is filled up with zeros; another scale
    is multiplied into B; a layer that the folder lacks gets a B of zeros. Dropout stays the adapter's.

    Raises:
        OSError, ValueError: as :func:`load_adapter`, or the adapter is merged, or can't hold what the folder has: a
            larger rank, other layers, other ``modules_to_save`` or biases; nothing is changed.
    """
    inner = _unwrapped(model)
    folder = validation.check_folder(folder)
    _check_here(inner, folder, adapter)
    read = read_folder(inner, folder, strict=True)
    modules: dict[str, Adapted] = {path: m for path, m in adapted_modules(inner) if adapter in m.adapters}
    others = [path for path in (*read.adapters, *read.copies) if path not in modules]
    if others:
        raise ValueError(f"adapter {adapter!r} must have the folder's layers to be swapped, it lacks {others[0]!r}")
    writes: list[tuple[Tensor, Tensor]] = []
    for path, module in modules.items():
        if isinstance(module, FusedLoRALinear):
            writes += _swap_pair(path, module, adapter, read.adapters.get(path))
        elif isinstance(module, Trained):
            part = module.part(adapter)
            if path not in read.copies or read.copies[path][0].names != part.names:
                raise ValueError(f"the folder must train what adapter {adapter!r} does, got a difference in {path!r}")
            new = part.of(read.copies[path][1])
            writes += [(old, new[key]) for key, old in module.trained(adapter).items()]
    with torch.no_grad():
        for old, value in writes:
            old.copy_(value)
    return model


def _swap_pair(path: str, layer: FusedLoRALinear, name: str, new: LoRAAdapter | None) -> list[tuple[Tensor, Tensor]]:
    """(tensor of the adapter, its new value): ``new`` in the old one's rank and scale."""
    old = layer.adapter(name)
    if layer.merged and name in layer.active_adapters:
        raise ValueError(f"adapter {name!r} must not be merged to be swapped, and {path!r} is; unmerge it first")
    if new is None:
        return [(old.lora_B, torch.zeros_like(old.lora_B)), *_pairs(old.bias, layer.bias)]
    if new.rank > old.rank:
        raise ValueError(f"rank of {path!r} must be at most the adapter's, {old.rank}, to be swapped, got {new.rank}")
    if (new.bias is None) != (old.bias is None):
        raise ValueError(f"the folder must train what adapter {name!r} does, got a difference in the bias of {path!r}")
    # the folder's own scale against the adapter's own; a strength stays as it is
    scale = old.options.scale
    if scale == 0.0 and new.scale != 0.0:
        raise ValueError(f"scale of {path!r} must not be 0 to be swapped, got alpha {old.alpha:g}")
    A, B = torch.zeros_like(old.lora_A), torch.zeros_like(old.lora_B)
    with torch.no_grad():
        A[: new.rank] = new.lora_A
        B[:, : new.rank] = new.lora_B if new.scale == scale else new.lora_B * (new.scale / scale)
    if not (validation.is_finite(A) and validation.is_finite(B)):
        raise ValueError(f"values of {path!r} must be finite in {A.dtype} with scale {scale:g}, got an infinity")
    return [(old.lora_A, A), (old.lora_B, B), *_pairs(old.bias, new.bias)]


def _pairs(old: Tensor | None, new: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    return [] if old is None or new is None else [(old, new)]


def _check_here(model: nn.Module, folder: Path, adapter: str) -> None:
    if str(folder) in (known := adapter_names(model)) and adapter not in known:
        raise ValueError(f"folder comes before the adapter's name, got {str(folder)!r}, an adapter here, as folder")
    check_here(model, adapter)


def _unwrapped(model: nn.Module) -> nn.Module:
    """What ``torch.compile`` or data parallelism wraps: the names on disk are the model's own."""
    validation.check_model(model)
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner
