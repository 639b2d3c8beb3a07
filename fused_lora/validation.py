"""Every error that a caller can meet, worded once: it names the argument, the rule and the value.

Nothing here changes anything; every public function calls its checks before its first effect.
"""

from __future__ import annotations

import difflib
import math
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

IMPLS = ("auto", "triton", "native", "eager")


def check_rank(rank: Any, name: str = "rank") -> int:
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral):
        raise TypeError(f"{name} must be an int of at least 1, got {rank!r}")
    if rank < 1:
        raise ValueError(f"{name} must be at least 1, got {rank}")
    return int(rank)


def _finite(value: Any, name: str) -> float:
    # numbers.Real is slow to ask, and a call of a layer asks twice
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{name} must be a finite number, got {value!r}")
    # a compiled call may have a symbolic number, which has no such test
    if not torch.compiler.is_compiling() and not _is_finite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    return float(value)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_alpha(alpha: Any, name: str = "alpha") -> float:
    return _finite(alpha, name)


def check_scale(scale: Any) -> float:
    return _finite(scale, "scale")


def check_strength(strength: Any, name: str = "strength") -> float:
    return _finite(strength, name)


def check_weight(weight: Any) -> float:
    return _finite(weight, "weights")


def check_dropout(dropout: Any, name: str = "dropout") -> float:
    value = _finite(dropout, name)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
    return value


def check_impl(impl: Any) -> str:
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    return impl


def check_init(init: Any) -> str:
    if init not in ("kaiming", "gaussian", "normal"):
        raise ValueError(f"init must be 'kaiming', 'gaussian' or 'normal', got {init!r}")
    return init


def check_flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


# fields of PEFT's LoraConfig that change nothing here
_IDLE_FIELDS = ("base_model_name_or_path", "fan_in_fan_out", "inference_mode", "peft_type", "task_type")
# fields of PEFT's LoraConfig that ask for more than a plain LoRA
_UNSUPPORTED_FIELDS = (
    "alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "kasa_config",
    "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_bias", "lora_ga_config",
    "megatron_config", "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora",
    "use_qalora", "velora_config",
)  # fmt: skip


def check_field_names(kind: str, names: Iterable[str], known: Sequence[str], elsewhere: Mapping[str, str]) -> None:
    """elsewhere: other libraries' names for the known ones."""
    for name in names:
        if name in known:
            continue
        near = [elsewhere[name]] if name in elsewhere else difflib.get_close_matches(name, known, n=1)
        if name in _UNSUPPORTED_FIELDS:
            hint = "PEFT's option of that name is not supported yet"
        elif name in _IDLE_FIELDS:
            hint = "PEFT's field of that name has no use here, leave it out"
        else:
            hint = f"did you mean {near[0]!r}?" if near else f"fields: {', '.join(known)}"
        raise TypeError(f"{kind} has no field {name!r}; {hint}")


def check_adapter_name(name: Any) -> str:
    """Adapters are submodules, so their names must be ones that a module can bear."""
    if not isinstance(name, str):
        raise TypeError(f"adapter name must be a str, got {name!r}")
    if not name or "." in name or "/" in name or "\\" in name:
        raise ValueError(f"adapter name must be non-empty, without '.', '/' and '\\', got {name!r}")
    if hasattr(nn.ModuleDict, name) or name == "training":
        raise ValueError(f"adapter name must not be an attribute of torch.nn.ModuleDict, got {name!r}")
    return name


def check_strengths(adapters: Any) -> dict[str, float]:
    """name -> strength, of one name, several, a mapping, or None for none."""
    if isinstance(adapters, Mapping):
        names = check_adapter_names([*adapters])
        return {name: check_strength(adapters[name], f"strength of adapter {name!r}") for name in names}
    return dict.fromkeys(check_adapter_names(adapters, "a mapping of them to strengths, "), 1.0)


def check_adapter_names(names: Any, also: str = "") -> tuple[str, ...]:
    """One name, several, or None for none, as a tuple."""
    if names is None:
        return ()
    if isinstance(names, str):
        return (names,)
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"adapter names must be a str, a list of them, {also}or None, got {names!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"adapter names must differ, got {names!r}")
    return tuple(names)


def check_known_adapter(name: Any, known: Any) -> None:
    if name not in known:
        listed = ", ".join(repr(n) for n in sorted(known)) or "none; call apply_lora, add_adapter or load_adapter first"
        raise ValueError(f"adapter {name!r} is not here; adapters: {listed}")


def check_model(model: Any) -> None:
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got the class {model.__name__}; make one: {model.__name__}(...)")
    raise TypeError(f"model must be an nn.Module, the first argument, got {model!r:.200}")


def check_folder(folder: Any) -> Path:
    if not isinstance(folder, (str, os.PathLike)):
        kind = type(folder).__name__
        raise TypeError(f"folder must be a path, the argument after the model, got a {kind}")
    return Path(folder)


def is_pefts(module: nn.Module) -> bool:
    """Whether it is a layer of PEFT's. Told by name, as PEFT may not be installed."""
    kinds = type(module).__mro__
    return any(kind.__name__ == "BaseTunerLayer" and kind.__module__ == "peft.tuners.tuners_utils" for kind in kinds)


def check_is_ours(adapter: Any, modules: Iterable[tuple[str, nn.Module]]) -> None:
    if any(is_pefts(module) for _, module in modules):
        raise ValueError(
            f"adapter {adapter!r} is not here: this model's adapters are PEFT's, and so are the functions for them: "
            "its own save_pretrained, load_adapter, set_adapter, delete_adapter"
        )


def check_no_pefts(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Adapters of ours over PEFT's would be adapters of its A and B."""
    for path, module in modules:
        if is_pefts(module):
            where = f"{path!r}, " if path else ""
            raise ValueError(
                f"model must have no adapters of PEFT's, got {where}a peft {type(module).__name__}; compute those by "
                "fused_lora.integrations.peft.fuse(model), or fold them in first: model = model.merge_and_unload()"
            )


def check_new_adapter(name: str, known: Any) -> None:
    if name in known:
        raise ValueError(f"adapter {name!r} is here already; delete it first or choose another name")


def check_whole(weight: Tensor, name: str = "weight") -> None:
    """An adapter beside a shard would be a rank's own, and its gradient nobody else's."""
    if is_dtensor(weight):
        raise ValueError(
            f"{name} must be whole while an adapter is added or loaded, got a DTensor; "
            "do it before fully_shard or parallelize_module"
        )


def check_has_values(tensors: Mapping[str, Tensor]) -> None:
    """A tensor on meta has none: of a model made there, or of a block that accelerate offloads as a whole."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{name!r} must have values to be saved, got a tensor on meta; load them, or remove hooks")


def is_dtensor(value: Any) -> bool:
    """Without importing torch.distributed, which a process that has no DTensor may do without."""
    return type(value) not in (Tensor, nn.Parameter) and any(kind.__name__ == "DTensor" for kind in type(value).__mro__)


def whole(tensor: Any) -> Tensor:
    """The tensor itself; of a DTensor, what the ranks of its mesh hold together: every one of them must come here."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def is_finite(tensor: Tensor) -> bool:
    # a finite sum has finite terms, and needs no memory; one that is not may be of too many large ones
    return tensor.is_meta or any(bool(whole(torch.isfinite(part).all())) for part in (tensor.sum(), tensor))


def is_zero(tensor: Tensor) -> bool:
    """Whether every value is zero; a tensor on meta has none that is not."""
    return tensor.is_meta or not bool(whole(tensor.detach().any()))


def check_not_merged(merged: bool) -> None:
    if merged:
        raise ValueError("a layer must be unmerged before it is parallelized, got a merged one; call unmerge first")


def check_own_weight(layer: nn.Module) -> None:
    if "weight" not in layer._parameters:
        raise ValueError(
            "weight must be a Parameter to merge into, got one that is computed from others at every call, as by "
            "weight_norm, spectral_norm, prune or parametrize; remove that first"
        )


def check_base_output(y: Any, x: Tensor, N: int, kind: str) -> None:
    """What a subclass's own forward returned, to which a low-rank product is to be added."""
    if not isinstance(y, Tensor):
        raise TypeError(
            f"the forward of a {kind} must return a Tensor for an adapter to be added, got {type(y).__name__}; "
            "exclude_modules leaves such layers out"
        )
    if y.shape != (*x.shape[:-1], N):
        raise ValueError(
            f"the forward of a {kind} must return (..., N) = {(*x.shape[:-1], N)} for an adapter to be added, got "
            f"{tuple(y.shape)}; exclude_modules leaves such layers out"
        )


def check_operands(x: Any, weight: Any, lora_A: Any, lora_B: Any, bias: Any) -> bool:
    """Kinds, dimensions and shapes, then devices, of ``lora_linear``'s tensors; whether one is a DTensor."""
    distributed = False
    if not (_is_plain(x) and _is_plain(weight) and _is_plain(lora_A) and _is_plain(lora_B) and _is_plain(bias)):
        distributed = _check_kinds(x=x, weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias)
    if weight.dim() != 2:
        raise ValueError(f"weight must be (N, K), got shape {tuple(weight.shape)}")
    N, K = weight.shape
    if K != N and x.shape[-1:] == lora_A.shape[-1:] == (N,) and lora_B.shape[:1] == (K,):
        raise ValueError(f"weight must be (N, K) = {(K, N)} for these lora_B and lora_A, got {(N, K)}; pass weight.t()")
    check_features(x, K)
    if lora_A.dim() != 2 or lora_A.shape[1] != K or lora_A.shape[0] < 1:
        raise ValueError(f"lora_A must be (R, K) with R >= 1 and K = {K}, got shape {tuple(lora_A.shape)}")
    if lora_B.shape != (N, lora_A.shape[0]):
        raise ValueError(f"lora_B must be (N, R) = {(N, lora_A.shape[0])}, got shape {tuple(lora_B.shape)}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias must be (N,) = {(N,)}, got shape {tuple(bias.shape)}")
    device = x.device
    for name, value in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B), ("bias", bias)):
        if value is not None and value.device != device:
            raise ValueError(f"{name} must be on x's device, {device}, got {value.device}")
    return distributed


def check_features(x: Tensor, K: int) -> None:
    if x.dim() < 1 or x.shape[-1] != K:
        check_no_ids(x)
        raise ValueError(f"x must be (..., K) with K = {K}, got shape {tuple(x.shape)}")


def check_no_ids(x: Tensor) -> None:
    if not x.dtype.is_floating_point and not x.dtype.is_complex:
        raise TypeError(f"x must be floating point, got {x.dtype}; token ids go through an embedding first")


def _is_plain(value: Any) -> bool:
    """Nothing that needs a closer look: the kinds that nearly every call has, told apart in a microsecond."""
    return value is None or (type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided)


def _check_kinds(**operands: Any) -> bool:
    """Whether one of the operands is a DTensor; what no implementation can read is refused by name."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    distributed = False
    for name, value in operands.items():
        if value is None and name == "bias":
            continue
        if not isinstance(value, Tensor):
            rule = "a Tensor or None" if name == "bias" else "a Tensor"
            raise TypeError(f"{name} must be {rule}, got {type(value).__name__}")
        if value.layout is not torch.strided:
            way_out = "pass x.values()" if value.is_nested else "call to_dense() on it"
            raise TypeError(f"{name} must be a dense Tensor, got layout {value.layout}; {way_out}")
        kind = type(value).__name__
        if is_dtensor(value):
            distributed = True
        elif is_traceable_wrapper_subclass(value) and kind != "AsyncCollectiveTensor":
            raise TypeError(
                f"{name} must be a Tensor or a DTensor, got {kind}, whose values the kernels can't read; "
                "dequantize it to a plain Tensor, or leave this layer to PEFT"
            )
    return distributed


def check_dtypes(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> None:
    """x and bias have the weight's dtype; adapters that or float32, and are rounded to the weight's."""
    dtype = weight.dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(
            f"weight must be float16, bfloat16, float32 or float64, got {dtype}; a quantized weight must be "
            "dequantized, or its layer left to PEFT"
        )
    if x.dtype != dtype:
        check_no_ids(x)
        raise TypeError(f"x must have weight's dtype, {dtype}, got {x.dtype}; cast x, or use torch.autocast")
    if bias is not None and bias.dtype != dtype:
        raise TypeError(f"bias must have weight's dtype, {dtype}, got {bias.dtype}")
    for name, adapter in (("lora_A", lora_A), ("lora_B", lora_B)):
        if adapter.dtype not in (dtype, torch.float32):
            raise TypeError(f"{name} must have weight's dtype, {dtype}, or torch.float32, got {adapter.dtype}")
