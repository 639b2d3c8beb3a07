"""Whole models: put adapters into them, switch, combine, disable, and find what is trained."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from typing_extensions import Unpack

from .. import validation
from ..adapter import AdapterOptions, LoRAAdapter, features
from ..called import watch
from ..functional import concatenate_adapters
from ..layer import FusedLoRALinear
from ..quantized import weight_dtype
from ..renamed import renamed
from ..switching import adapted_modules, base_modules
from ..torch_internals import passes
from .config import ConfigFields, LoRAConfig
from .encoder import settle_fast_paths
from .modules_to_save import Part, adopt, copies_of
from .peft_config import PeftLoraConfig, config_of
from .pretrained import settle_pretrained
from .selection import Plan, plan

Model = TypeVar("Model", bound=nn.Module)


def apply_lora(
    model: Model,
    config: LoRAConfig | PeftLoraConfig | None = None,
    *,
    adapter: str = "default",
    impl: str = "auto",
    **fields: Unpack[ConfigFields],
) -> Model:
    """Freeze ``model``, add one adapter to the linear layers that the config names, make it active; returns ``model``.

    Layers are changed in place: they keep their identity, their hooks and their parameters' names, and a layer that
    has other adapters keeps those. A fresh adapter changes no output. A weight that is another module's too is warned
    of: the adapter acts on the one layer alone.

    Args:
        config: or its fields as keywords (``rank=8, target_modules=["q_proj"]``), or both: the keywords win. PEFT's
            ``LoraConfig`` is taken too, where it asks for a plain LoRA.
        adapter: the new adapter's name.
        impl: for every layer adapted now; see :func:`fused_lora.lora_linear`.

    Raises:
        TypeError, ValueError: naming argument, rule and value; the model is unchanged.
    """
    installation = _prepare(model, adapter, config_of(config, fields), impl)
    model.requires_grad_(False)
    install(model, adapter, installation, impl)
    set_adapter(model, adapter)
    return model


@renamed(name="adapter")
def add_adapter(
    model: Model,
    adapter: str,
    config: LoRAConfig | PeftLoraConfig | None = None,
    *,
    impl: str = "auto",
    **fields: Unpack[ConfigFields],
) -> Model:
    """Add a fresh adapter to the layers that the config names, without making it active; returns ``model``.

    Args:
        config, fields: as in :func:`apply_lora`.

    Raises:
        TypeError, ValueError: naming argument, rule and value (the name is taken, nothing matches); nothing is changed.
    """
    install(model, adapter, _prepare(model, adapter, config_of(config, fields), impl), impl)
    return model


@renamed(name="adapter")
def set_adapter(
    model: Model, adapter: str | Sequence[str] | Mapping[str, float] | None, *, trainable: bool = True
) -> Model:
    """Make ``adapter`` active wherever it is, and trainable, and no other; returns ``model``.

    Several are active at once: their changes add up, in one kernel call a layer. Allocates nothing.

    Args:
        adapter: a name, or several; None or () leaves the base model, which a model without adapters is already. A
            mapping has the strength of each, ``{"cats": 1.0, "dogs": 0.5}``: its scale is multiplied by that, in
            merging and training too, until adapters are set again. It is not saved. What an adapter trains beside A
            and B (``modules_to_save``, biases) counts as a whole.
        trainable: False freezes the active adapters too, for inference.

    Raises:
        ValueError: no layer has that adapter, or two of them train the same ``modules_to_save`` or bias, or a strength
            is not finite; nothing is changed.
    """
    strengths = validation.check_strengths(adapter)
    check_here(model, *strengths)
    modules = [module for _, module in adapted_modules(model)]
    chosen = [{name: strengths[name] for name in strengths if name in module.adapters} for module in modules]
    for module, here in zip(modules, chosen, strict=True):
        module.check_together(tuple(here))
    for module, here in zip(modules, chosen, strict=True):
        module.set_adapter(here, trainable=trainable)
    return model


@renamed(name="adapter")
def delete_adapter(model: Model, adapter: str) -> Model:
    """Remove ``adapter`` from every layer; where it was active, the others that were stay so. Returns ``model``."""
    check_here(model, adapter)
    for _, module in adapted_modules(model):
        if adapter in module.adapters:
            module.delete_adapter(adapter)
    settle_fast_paths(model)
    settle_pretrained(model)
    return model


def set_impl(model: Model, impl: str) -> Model:
    """Let every adapted layer compute by ``impl``; see :func:`fused_lora.lora_linear`. Returns ``model``.

    Raises:
        ValueError: there is no such ``impl``, or no adapted layer.
    """
    validation.check_impl(impl)
    layers = lora_layers(model)
    if not layers:
        raise ValueError("model must have adapted layers, got none; call apply_lora first, or fuse for PEFT's own")
    for _, layer in layers:
        layer.impl = impl
    return model


@renamed(name="adapter")
def add_weighted_adapter(
    model: Model, adapter: str, adapters: Sequence[str], weights: Sequence[float], combination_type: str = "cat"
) -> Model:
    """Add an adapter made of others, without making it active; returns ``model``. PEFT's names and results.

    Args:
        adapter: the new one's name.
        adapters: names; a layer combines those that it has, each of strength 1.
        weights: one finite number for each.
        combination_type: "cat" puts the ranks together: exactly ``Σ weight · scale · B A``, of all their ranks.
            "linear" sums the A and the B, each by ``sqrt(|weight · scale|)``: an approximation, of the same rank, which
            all must have.

    Raises:
        TypeError, ValueError: naming argument, rule and value; nothing is changed.
    """
    validation.check_adapter_name(adapter)
    chosen = validation.check_adapter_names(adapters)
    validation.check_new_adapter(adapter, adapter_names(model))
    check_here(model, *chosen)
    if combination_type not in ("cat", "linear"):
        raise ValueError(f"combination_type must be 'cat' or 'linear', got {combination_type!r}")
    if not chosen or len(chosen) != len(weights):
        raise ValueError(f"weights must be one for each of at least one adapter, got {weights!r} for {list(chosen)}")
    factors = {each: validation.check_weight(weight) for each, weight in zip(chosen, weights, strict=True)}
    built = {}
    for path, module in adapted_modules(model):
        here = [each for each in chosen if each in module.adapters]
        if not here:
            continue
        if not isinstance(module, FusedLoRALinear) or any(module.adapter(each).trains_bias for each in here):
            raise ValueError(f"adapters to combine must train A and B alone, got {here}, which train more in {path!r}")
        built[path] = _combine(path, module, {each: factors[each] for each in here}, combination_type)
    install(model, adapter, Installation(built, {}), "auto")
    return model


def _combine(path: str, layer: FusedLoRALinear, weights: Mapping[str, float], combination_type: str) -> LoRAAdapter:
    parts = [(layer.adapter(name), weight) for name, weight in weights.items()]
    with torch.no_grad():
        if combination_type == "cat":
            A, B, scale = concatenate_adapters([(a.lora_A, a.lora_B, weight * a.options.scale) for a, weight in parts])
            B = B * scale
        else:
            ranks = [adapter.rank for adapter, _ in parts]
            if len(set(ranks)) > 1:
                raise ValueError(f"combination_type 'linear' needs one rank, got {ranks} in {path!r}; take 'cat'")
            scales = [weight * a.options.scale for a, weight in parts]
            factors = [(math.sqrt(abs(scale)), math.copysign(1.0, scale)) for scale in scales]
            As = [root * sign * a.lora_A for (a, _), (root, sign) in zip(parts, factors, strict=True)]
            Bs = [root * a.lora_B for (a, _), (root, _) in zip(parts, factors, strict=True)]
            A, B = torch.stack(As).sum(0), torch.stack(Bs).sum(0)
    return LoRAAdapter.of(A.clone(), B.clone(), AdapterOptions(rank=A.shape[0], dropout=parts[0][0].dropout))


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within it ``model`` is exactly its base, merged layers included. May be nested; an exception restores too.

    In this thread alone: others that compute with ``model`` keep its adapters, and so do threads that this one starts.
    Where activation checkpointing computes a forward again, it is off as it was in that forward, on any thread.
    """
    switches = [module._switch for _, module in adapted_modules(model)]
    within = frozenset(each for each, _ in passes(sys._getframe(1)))
    for switch in switches:
        switch.turn(off=True, within=within)
    try:
        yield
    finally:
        for switch in switches:
            switch.turn(off=False)


def lora_layers(model: nn.Module) -> list[tuple[str, FusedLoRALinear]]:
    """(path, layer) of every FusedLoRALinear in ``model``."""
    return [(path, module) for path, module in base_modules(model) if isinstance(module, FusedLoRALinear)]


def adapter_names(model: nn.Module) -> list[str]:
    return sorted({name for _, module in adapted_modules(model) for name in module.adapters})


def check_here(model: nn.Module, *adapters: str) -> None:
    """ValueError unless the model has adapters of these names."""
    known = adapter_names(model)
    for name in adapters:
        if not known:
            validation.check_is_ours(name, base_modules(model))
        validation.check_known_adapter(name, known)


def lora_parameters(model: nn.Module, adapter: str | None = None) -> list[nn.Parameter]:
    """What the active adapters train, or ``adapter`` does: what an optimizer wants.

    A and B of every layer, and the adapter's own copies of biases and of ``modules_to_save``.

    Raises:
        ValueError: there are none, or no layer has that adapter.
    """
    if adapter is not None:
        check_here(model, adapter)
    # a parameter that two modules share is trained once
    found = {
        parameter: None
        for _, module in adapted_modules(model)
        for name in (module.active_adapters if adapter is None else (adapter,))
        if name in module.adapters
        for parameter in module.trained_parameters(name)
    }
    if not found:
        raise ValueError("model must have an active adapter, got none; call apply_lora or set_adapter first")
    if adapter is None and not any(parameter.requires_grad for parameter in found):
        warnings.warn(
            "every parameter of the active adapters is frozen, so an optimizer trains nothing; "
            "set_adapter(model, name) makes an adapter's trainable",
            stacklevel=2,
        )
    return list(found)


# --------------------------------------------------------------------------------------------------
# Everything is made before the model is touched
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Installation:
    """adapters: path -> A and B for that layer.  copies: path -> what of that module is trained, and its copy."""

    adapters: Mapping[str, LoRAAdapter]
    copies: Mapping[str, tuple[Part, nn.Module]]


def _prepare(model: nn.Module, adapter: str, config: LoRAConfig, impl: str) -> Installation:
    validation.check_impl(impl)
    # what its patterns may cost is one model's
    config = dataclasses.replace(config)
    chosen = plan(model, adapter, config)
    _warn_of_rank(config, chosen)
    built = {
        path: LoRAAdapter.beside(
            linear,
            config.options_for(path),
            dtype=config.dtype_over(weight_dtype(linear)),
            trains_bias=config.bias != "none",
        )
        for path, linear in chosen.linears.items()
    }
    return Installation(built, copies_of(chosen.parts, tied=config.ensure_weight_tying))


def _warn_of_rank(config: LoRAConfig, chosen: Plan) -> None:
    usable = {path: min(features(linear)) for path, linear in chosen.linears.items()}
    if all(config.rank_of(path) > most for path, most in usable.items()):
        path, most = max(usable.items(), key=lambda item: item[1])
        message = f"rank {config.rank_of(path)} is more than any layer can use: the largest, {path!r}, uses {most}"
        warnings.warn(message, stacklevel=4)


def install(model: nn.Module, adapter: str, installation: Installation, impl: str) -> None:
    """Put what is made into the model's modules, which have no adapter of this name, without making it active."""
    modules = dict(base_modules(model))
    for path, built in installation.adapters.items():
        linear: Any = modules[path]
        layer = linear if isinstance(linear, FusedLoRALinear) else FusedLoRALinear.adopt(linear, impl=impl)
        layer.install(adapter, built)
    for path, (part, clone) in installation.copies.items():
        adopt(modules[path]).install(adapter, part, clone)
    settle_fast_paths(model)
    settle_pretrained(model)
    watch(model)
