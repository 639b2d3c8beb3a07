"""Which parts of an adapter go to which modules of a model. Every rule is checked here, before anything changes."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import quantized, validation
from ..adapter import is_conv1d
from ..instances import check_forward, offload_of
from ..layer import FusedLoRALinear
from ..subclasses import check_subclass, has_own_forward, is_subclass, why_no_product
from ..switching import Adapted, base_modules
from .config import ALL_LINEAR, LoRAConfig, ends_of, selector
from .modules_to_save import Part, Trained, own_state


@dataclass(frozen=True)
class Plan:
    """linears: path -> layer that gets A and B.  parts: path -> module, what of it is trained."""

    linears: dict[str, nn.Linear]
    parts: dict[str, tuple[nn.Module, Part]]


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """path -> layer that can take A and B: ``nn.Linear`` and its subclasses, Transformers' ``Conv1D``, a layer of
    ``quantized``, or fused already.

    A subclass is left out where an adapter would silently not be trained (``nn.MultiheadAttention``'s out_proj), or
    where its forward does not return the layer's N features.
    """
    modules: Iterable[tuple[str, Any]] = base_modules(model)
    return {path: module for path, module in modules if _is_linear(module) and why_no_product(module) is None}


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, Trained):
        return False
    return isinstance(module, nn.Linear) or is_conv1d(module) or quantized.kind_of(module) is not None


def plan(model: nn.Module, adapter: str, config: LoRAConfig) -> Plan:
    """What ``apply_lora`` is to change.

    Raises:
        TypeError, ValueError: nothing matches, a name is taken, or a module can't take what it should.
    """
    validation.check_adapter_name(adapter)
    modules = dict(base_modules(model))
    validation.check_no_pefts(modules.items())
    check_initialized(modules)
    saved = _saved(modules, config)
    if config.ensure_weight_tying:
        saved = with_tied(model, saved)
    candidates = linear_layers(model)
    head = output_head(model) if config.target_modules == ALL_LINEAR else None
    chosen = {
        path: layer
        for path, layer in candidates.items()
        if layer is not head and config.targets(path) and saved.isdisjoint(_to(path))
    }
    if not chosen:
        raise ValueError(_nothing_matches(model, config, list(candidates)))
    if not isinstance(config.target_modules, str):
        _warn_of_idle("target_modules", config.target_modules, chosen, modules, candidates)
    _warn_of_idle_patterns(config, chosen, modules, candidates)
    for path, layer in chosen.items():
        validation.check_whole(layer.weight, f"{path}.weight")
        if is_subclass(layer):
            check_subclass(layer, path)
        if not has_own_forward(layer):
            quantized.check(layer, path)
    if config.ensure_weight_tying:
        _check_untied(model, chosen)
    parts = {path: part for root in sorted(saved) for path, part in parts_below(modules, root).items()}
    if config.bias == "all":
        parts |= biases(modules, {*chosen, *parts})
    for path, module in [*chosen.items(), *((path, module) for path, (module, _) in parts.items())]:
        if isinstance(module, Adapted) and adapter in module.adapters:
            raise ValueError(f"adapter {adapter!r} is in {path!r} already; delete it first or choose another name")
    check_kinds(chosen, parts)
    _check_offloads(modules, [*chosen, *parts])
    _warn_of_ties(model, chosen, {} if config.ensure_weight_tying else parts)
    _warn_of_mamba(model, chosen)
    return Plan(chosen, parts)


def check_initialized(modules: dict[str, nn.Module]) -> None:
    for path, module in modules.items():
        if any(p is not None and nn.parameter.is_lazy(p) for p in module._parameters.values()):
            raise ValueError(
                f"model must be initialized to be adapted, got a {type(module).__name__} at {path!r}; "
                "call it once first"
            )


def parts_below(modules: dict[str, nn.Module], root: str) -> dict[str, tuple[nn.Module, Part]]:
    """The modules at and below ``root`` that hold parameters or buffers themselves, which are to be trained.

    A container keeps its class: what it holds is copied, not itself.
    """
    found: dict[str, tuple[nn.Module, Part]] = {}
    for path, module in base_modules(modules[root]):
        whole = ".".join(filter(None, (root, path)))
        # one that stands elsewhere too is known by its first path
        if whole in modules and (own_state(module) or isinstance(module, Adapted)):
            found[whole] = (module, Part(None, root))
    if not found:
        raise ValueError(f"modules_to_save must name modules with parameters, got {root!r}, which has none")
    return found


def biases(modules: dict[str, nn.Module], without: set[str]) -> dict[str, tuple[nn.Module, Part]]:
    """Every bias that is not at or below the paths of ``without``."""
    found: dict[str, tuple[nn.Module, Part]] = {}
    for path, module in modules.items():
        if without.isdisjoint(_to(path)) and module._parameters.get("bias") is not None:
            found[path] = (module, Part(("bias",)))
    return found


def tied(model: nn.Module) -> dict[int, list[str]]:
    """id of a base Parameter -> its names, for those that have several: one tensor of two modules."""
    names: dict[int, list[str]] = {}
    for path, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    return {key: listed for key, listed in names.items() if len(listed) > 1}


def with_tied(model: nn.Module, roots: set[str]) -> set[str]:
    """These paths of ``modules_to_save``, and those of the modules outside that have a weight of theirs."""
    groups = [{name.rpartition(".")[0] for name in names} for names in tied(model).values()]
    groups = [paths for paths in groups if any(not roots.isdisjoint(_to(path)) for path in paths)]
    if not groups:
        warnings.warn("ensure_weight_tying: no module of modules_to_save has a tied weight", stacklevel=5)
    return roots.union(path for paths in groups for path in paths if roots.isdisjoint(_to(path)))


def _check_untied(model: nn.Module, linears: dict[str, nn.Linear]) -> None:
    names = tied(model)
    for path, layer in linears.items():
        if id(layer.weight) in names:
            raise ValueError(
                f"ensure_weight_tying: {' and '.join(names[id(layer.weight)])} are one tensor, and an adapter acts on "
                f"{path!r} alone; name it in modules_to_save, or leave it out of target_modules"
            )


def places(model: nn.Module) -> dict[nn.Module, list[str]]:
    """module -> its paths, for each that several modules hold, or one under several names."""
    found: dict[nn.Module, list[str]] = {}
    for path, module in base_modules(model):
        for name, child in module._modules.items():
            if child is not None:
                found.setdefault(child, []).append(f"{path}.{name}" if path else name)
    return {module: listed for module, listed in found.items() if len(listed) > 1}


def check_kinds(linears: dict[str, nn.Linear], parts: dict[str, tuple[nn.Module, Part]]) -> None:
    """ValueError where a module can't hold what it should: A and B, or a copy, and never both."""
    whole = {path for path, (_, part) in parts.items() if part.names is None}
    both = [path for path in linears if not whole.isdisjoint(_to(path))]
    if both:
        raise ValueError(f"modules_to_save must leave out layers with A and B, got {both[0]!r}")
    for path, layer in linears.items():
        if not isinstance(layer, FusedLoRALinear):
            check_forward(layer, path)
    for path, (module, _) in parts.items():
        if not isinstance(module, Trained):
            check_forward(module, path)
        if offload_of(module) is not None:
            raise ValueError(f"modules_to_save and biases must leave out what accelerate offloads, got {path!r}")
        if isinstance(module, FusedLoRALinear):
            raise ValueError(f"modules_to_save and biases must leave out layers with A and B of others, got {path!r}")
        if not isinstance(module, Trained) and hasattr(module, "adapters"):
            raise ValueError(f"{path!r} must not have an attribute 'adapters' of its own to be trained")
        if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            raise ValueError(f"{path!r} must not be a {type(module).__name__} with parameters of its own")


def _check_offloads(modules: dict[str, nn.Module], paths: Iterable[str]) -> None:
    """ValueError where accelerate moves a module together with all that is below it: new adapters it does not know."""
    for path in paths:
        for around in dict.fromkeys(("", *_to(path))):
            hook = offload_of(modules[around])
            if hook is not None and hook.place_submodules:
                raise ValueError(
                    f"{path!r} must not be offloaded by accelerate as a part of {around!r}: put the adapters in before"
                )


def _saved(modules: dict[str, nn.Module], config: LoRAConfig) -> set[str]:
    """The topmost paths that modules_to_save names."""
    chosen = selector(config.modules_to_save)
    found = {path for path in modules if chosen(path)}
    if config.modules_to_save:
        if not found:
            tails = sorted({path.rpartition(".")[2] for path in modules if path})
            raise ValueError(
                f"modules_to_save must name modules, got {list(config.modules_to_save)!r}; "
                f"modules here: {_near(config.modules_to_save, tails)}"
            )
        _warn_of_idle("modules_to_save", config.modules_to_save, found, modules, modules)
    return {path for path in found if found.isdisjoint(_above(path))}


def _warn_of_idle(
    field: str, names: Iterable[str], chosen: Iterable[str], modules: dict[str, nn.Module], fitting: Iterable[str]
) -> None:
    """Of names that chose nothing.  fitting: paths of what the field could choose."""
    used = {end for path in chosen for end in ends_of(path)}
    idle = [name for name in names if name not in used]
    if not idle:
        return
    others = {end: module for path, module in modules.items() for end in ends_of(path)}
    unfit = [f"{name!r} is a {_kind(others[name])}" for name in idle if name in others and name not in fitting]
    what = "module" if field == "modules_to_save" else "linear layer"
    message = f"{field}: no {what} is called {', '.join(map(repr, idle))}"
    message += f" ({', '.join(unfit)})" if unfit else ""
    tails = sorted({path.rpartition(".")[2] for path in fitting if path})
    warnings.warn(f"{message}; {what}s here: {_near(idle, tails)}", stacklevel=5)


def _warn_of_idle_patterns(
    config: LoRAConfig, chosen: Collection[str], modules: dict[str, nn.Module], candidates: dict[str, nn.Linear]
) -> None:
    """Of what chooses no layer: it may be misspelt, and PEFT warns of it too."""
    for field, idle in config.idle_patterns(chosen).items():
        if idle:
            listed = ", ".join(map(repr, idle))
            names = ", ".join(map(repr, [*chosen][:10]))
            warnings.warn(f"{field}: no adapted layer matches {listed}; adapted layers: {names}", stacklevel=4)
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        if not any(config.excludes(path) for path in candidates):
            warnings.warn(f"exclude_modules: no linear layer matches {excluded!r}", stacklevel=4)
    elif excluded is not None:
        _warn_of_idle("exclude_modules", excluded, candidates, modules, candidates)


# model types whose CUDA kernels read the weight of out_proj; PEFT refuses to adapt it there
_MAMBA = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}


def _warn_of_mamba(model: nn.Module, linears: dict[str, nn.Linear]) -> None:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    paths = [path for path in linears if path.rpartition(".")[2] == "out_proj"]
    if kind in _MAMBA and paths:
        warnings.warn(
            f"the CUDA kernels of a {kind} model read the weight of out_proj by name: there the adapter of "
            f"{paths[0]!r} does not count. PEFT refuses it; leave it out by exclude_modules=['out_proj']",
            stacklevel=5,
        )


def _warn_of_ties(model: nn.Module, linears: dict[str, nn.Linear], parts: dict[str, tuple[nn.Module, Part]]) -> None:
    names = tied(model)
    if not names:
        return
    for path, layer in linears.items():
        if id(layer.weight) in names:
            listed = " and ".join(names[id(layer.weight)])
            message = f"{listed} are one tensor: the adapter acts on {path} alone, and can't be merged"
            warnings.warn(message, stacklevel=4)
    for path, (module, part) in parts.items():
        for tensor in part.of(module).values():
            if id(tensor) in names:
                listed = " and ".join(names[id(tensor)])
                warnings.warn(f"{listed} are one tensor: the adapter trains a copy for {path} alone", stacklevel=4)


def _above(path: str) -> list[str]:
    """The paths of the modules around this one, the model's own left out."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _to(path: str) -> list[str]:
    return [*_above(path), path]


def output_head(model: nn.Module) -> nn.Module | None:
    """A Transformers model's output embedding: usual practice leaves it out of "all-linear"."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def _nothing_matches(model: nn.Module, config: LoRAConfig, candidates: list[str]) -> str:
    message = f"target_modules must match a linear layer, got {config.target_modules!r}"
    others = [f"{p} ({_kind(m)})" for p, m in base_modules(model) if p and config.targets(p) and p not in candidates]
    if others and config.target_modules != ALL_LINEAR:
        message += f"; it matches {', '.join(others[:5])}, which can't take an adapter"
    if config.exclude_modules is not None:
        message += f" without {config.exclude_modules!r}"
    if config.modules_to_save:
        message += f" beside modules_to_save={list(config.modules_to_save)!r}"
    wanted = [config.target_modules] if isinstance(config.target_modules, str) else list(config.target_modules)
    tails = sorted({path.rpartition(".")[2] for path in candidates})
    if not candidates:
        return message + "; the model has no linear layer"
    if isinstance(config.target_modules, str) and (named := _as_names(config.target_modules, candidates)):
        return f"{message}; a str is a regular expression for a layer's whole path: pass a list of names, {named}"
    return message + f"; linear layers here: {_near(wanted, tails, candidates)}"


def _as_names(pattern: str, candidates: Iterable[str]) -> list[str]:
    """The names that a regular expression like "q_proj|v_proj" lists, if layers have them."""
    ends = {end for path in candidates for end in ends_of(path)}
    return [name for name in pattern.strip("()").split("|") if name in ends]


def _near(wanted: Iterable[str], tails: list[str], paths: Sequence[str] = ()) -> str:
    names = dict.fromkeys([*tails, *paths])
    near = [name for want in wanted for name in difflib.get_close_matches(want, names, n=3, cutoff=0.4)]
    return ", ".join(map(repr, near or tails[:10]))


def _kind(module: nn.Module) -> str:
    return f"{type(module).__name__}, another adapter's" if isinstance(module, Trained) else type(module).__name__
