"""Whole models: put adapters into their linear layers, switch, disable, merge, and tell what is where."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from . import validation
from .config import ALL_LINEAR, LoRAConfig, selects
from .layer import FusedLoRALinear


def apply_lora(
    model: nn.Module, config: LoRAConfig | None = None, *, adapter: str = "default", impl: str = "auto", **fields: Any
) -> nn.Module:
    """Freeze ``model``, add one adapter to the linear layers that the config names, make it active; returns ``model``.

    Layers are changed in place: they keep their identity, their hooks and their parameters' names, and a layer that
    has other adapters keeps those. A fresh adapter changes no output.

    Args:
        config: or its fields as keywords (``rank=8, target_modules=["q_proj"]``), or both: the keywords win.
        adapter: the new adapter's name.
        impl: for every layer adapted now; see :func:`fused_lora.lora_linear`.

    Raises:
        TypeError, ValueError: naming argument, rule and value; the model is unchanged.
    """
    LoRAConfig.check_field_names(fields)
    config = dataclasses.replace(config or LoRAConfig(), **fields)
    layers = _plan(model, adapter, config, impl)
    model.requires_grad_(False)
    _add(model, layers, adapter, config, impl)
    set_adapter(model, adapter)
    return model


def add_adapter(model: nn.Module, name: str, config: LoRAConfig | None = None, *, impl: str = "auto") -> nn.Module:
    """Add a fresh adapter to the layers that the config names, without making it active; returns ``model``.

    Raises:
        TypeError, ValueError: naming argument, rule and value (``name`` is taken, nothing matches); nothing is changed.
    """
    config = config or LoRAConfig()
    _add(model, _plan(model, name, config, impl), name, config, impl)
    return model


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make adapter ``name`` active wherever it is, and trainable, and no other; None leaves the base model.

    Raises:
        ValueError: no layer has that adapter; nothing is changed.
    """
    if name is not None:
        validation.check_known_adapter(name, adapter_names(model))
    for _, layer in lora_layers(model):
        layer.set_adapter(name if name is not None and name in layer.adapters else None)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove adapter ``name`` from every layer; where it was active, no adapter is."""
    validation.check_known_adapter(name, adapter_names(model))
    for _, layer in lora_layers(model):
        if name in layer.adapters:
            layer.delete_adapter(name)


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within it ``model`` is exactly its base, merged layers included. May be nested; an exception restores too."""
    layers = [layer for _, layer in lora_layers(model)]
    before = [layer.disabled for layer in layers]
    try:
        for layer in layers:
            layer.disabled = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer.disabled = disabled


def merge(model: nn.Module) -> None:
    """Fold every layer's active adapter into its weight; see :meth:`FusedLoRALinear.merge`. All layers or none."""
    merged: list[FusedLoRALinear] = []
    try:
        for path, layer in lora_layers(model):
            if not layer.merged:
                merged.append(layer)
                _merge_layer(path, layer)
    except BaseException:
        for layer in merged:
            layer.unmerge()
        raise


def _merge_layer(path: str, layer: FusedLoRALinear) -> None:
    try:
        layer.merge()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def unmerge(model: nn.Module) -> None:
    """Restore every weight bit for bit."""
    for _, layer in lora_layers(model):
        layer.unmerge()


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merge, then turn every layer back into a plain ``nn.Linear`` without adapters; returns ``model``."""
    merge(model)
    for _, layer in lora_layers(model):
        layer.unload()
    return model


def lora_layers(model: nn.Module) -> list[tuple[str, FusedLoRALinear]]:
    """(path, layer) of every FusedLoRALinear in ``model``."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, FusedLoRALinear)]


def adapter_names(model: nn.Module) -> list[str]:
    return sorted({name for _, layer in lora_layers(model) for name in layer.adapters})


def lora_parameters(model: nn.Module, adapter: str | None = None) -> list[nn.Parameter]:
    """A and B of the active adapter of every layer, or of ``adapter``: what an optimizer wants.

    Raises:
        ValueError: there are none, or no layer has that adapter.
    """
    if adapter is not None:
        validation.check_known_adapter(adapter, adapter_names(model))
    found: list[nn.Parameter] = []
    for _, layer in lora_layers(model):
        name = layer.active_adapter if adapter is None else adapter
        if name is not None and name in layer.adapters:
            found += layer.adapters[name].parameters()
    if not found:
        raise ValueError("model must have an active adapter, got none; call apply_lora or set_adapter first")
    return found


# --------------------------------------------------------------------------------------------------
# Choosing layers, and changing them once everything is known to be right
# --------------------------------------------------------------------------------------------------


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """path -> layer that can take an adapter: exactly ``nn.Linear``, or fused already.

    Subclasses are left alone: their weight is not what ``F.linear`` expects (quantized), or is read past their forward
    (``nn.MultiheadAttention``'s out_proj), and an adapter would silently not be trained.
    """
    return {
        path: module
        for path, module in model.named_modules()
        if type(module) is nn.Linear or isinstance(module, FusedLoRALinear)
    }


def _plan(model: nn.Module, adapter: str, config: LoRAConfig, impl: str) -> dict[str, nn.Linear]:
    """The layers that get the adapter; every rule is checked here, before anything changes."""
    validation.check_adapter_name(adapter)
    validation.check_impl(impl)
    candidates = linear_layers(model)
    head = _output_head(model) if config.target_modules == ALL_LINEAR else None
    chosen = {path: layer for path, layer in candidates.items() if layer is not head and config.targets(path)}
    if not chosen:
        raise ValueError(_nothing_matches(model, config, list(candidates)))
    if not isinstance(config.target_modules, str):
        idle = [name for name in config.target_modules if not any(selects([name], path) for path in chosen)]
        if idle:
            warnings.warn(f"target_modules: no linear layer is called {', '.join(map(repr, idle))}", stacklevel=4)
    for path, layer in chosen.items():
        validation.check_whole(layer.weight, f"{path}.weight")
        if isinstance(layer, FusedLoRALinear) and adapter in layer.adapters:
            raise ValueError(f"adapter {adapter!r} is in {path!r} already; delete it first or choose another name")
        if not layer.weight.is_floating_point() or layer.weight.dtype.itemsize < 2:
            raise TypeError(f"{path}.weight must be float16, bfloat16, float32 or float64, got {layer.weight.dtype}")
    return chosen


def _add(model: nn.Module, layers: dict[str, nn.Linear], adapter: str, config: LoRAConfig, impl: str) -> None:
    for path, linear in layers.items():
        layer = linear if isinstance(linear, FusedLoRALinear) else FusedLoRALinear.adopt(linear, impl=impl)
        layer.add_adapter(
            adapter,
            rank=config.rank_of(path),
            alpha=config.alpha_of(path),
            dropout=config.dropout,
            use_rslora=config.use_rslora,
            init=config.init,
            dtype=config.dtype_over(layer.weight.dtype),
        )
    for module in model.modules():
        # its inference fast path reads the weights of its linears past their forward
        if isinstance(module, nn.TransformerEncoderLayer) and lora_layers(module):
            module.activation_relu_or_gelu = 0


def _output_head(model: nn.Module) -> nn.Module | None:
    """A Transformers model's output embedding: usual practice leaves it out of "all-linear"."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def _nothing_matches(model: nn.Module, config: LoRAConfig, candidates: list[str]) -> str:
    message = f"target_modules must match a plain nn.Linear, got {config.target_modules!r}"
    others = [
        f"{p} ({type(m).__name__})" for p, m in model.named_modules() if p and config.targets(p) and p not in candidates
    ]
    if others and config.target_modules != ALL_LINEAR:
        message += f"; it matches {', '.join(others[:5])}, which can't take an adapter"
    if config.exclude_modules is not None:
        message += f" without {config.exclude_modules!r}"
    wanted = [config.target_modules] if isinstance(config.target_modules, str) else list(config.target_modules)
    tails = sorted({path.rpartition(".")[2] for path in candidates})
    near = [name for want in wanted for name in difflib.get_close_matches(want, tails + candidates, n=3, cutoff=0.4)]
    listed = near or tails[:10]
    return message + (
        f"; linear layers here: {', '.join(map(repr, listed))}" if listed else "; the model has no linear layer"
    )
