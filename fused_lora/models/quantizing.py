"""``quantize_base``: the frozen linear layers of a model, put into four or eight bits by bitsandbytes or torchao."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import validation
from ..instances import become, check_forward
from ..layer import FusedLoRALinear
from ..quantized import KINDS, Kind, kind_of
from ..quantized.layer import quantized_class
from ..renamed import refused
from .config import ALL_LINEAR, LoRAConfig
from .encoder import settle_fast_paths
from .selection import linear_layers, output_head, tied

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@refused(
    bits="pass the kind: 'nf4', 'int8' or 'fp8'",
    load_in_4bit="pass the kind 'nf4'",
    load_in_8bit="pass the kind 'int8' or 'fp8'",
)
def quantize_base(
    model: nn.Module,
    kind: str,
    *,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    exclude_modules: str | Sequence[str] | None = None,
    compute_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Keep the weights of ``model``'s linear layers in fewer bits, before or after ``apply_lora``; returns ``model``.

    Layers are changed in place, and adapters are not touched: they go on over what is left of the weight. It is frozen
    then. Layers that are quantized already are left as they are.

    Args:
        kind: "nf4" (bitsandbytes, in blocks of 64, their scales in 8 bits), "int8" (bitsandbytes, LLM.int8) or "fp8"
            (torchao, e4m3, one scale a row).
        target_modules, exclude_modules: as in :class:`LoRAConfig`; "all-linear" leaves out the output head.
        compute_dtype: of "nf4": what the products are made in, float16, bfloat16 or float32; None means the weight's.

    Raises:
        ImportError: the library is missing, or too old.
        TypeError, ValueError: naming argument, rule and value. Nothing is changed.
    """
    way = _WAYS.get(kind)
    if way is None:
        raise ValueError(f"kind must be one of {', '.join(map(repr, _WAYS))}, got {kind!r}")
    if compute_dtype is not None and (kind != "nf4" or compute_dtype not in _DTYPES):
        raise ValueError(f"compute_dtype must be None, or for 'nf4' a float of 16 or 32 bits, got {compute_dtype!r}")
    if (problem := way.kind.problem()) is not None:
        raise ImportError(problem)
    layers = _chosen(model, kind, LoRAConfig(target_modules=target_modules, exclude_modules=exclude_modules))
    # all are made before the first is put in
    made = [(layer, way.make(layer, compute_dtype)) for layer in layers.values()]
    for layer, like in made:
        _become(layer, like, way.kind)
    settle_fast_paths(model)
    return model


def _chosen(model: nn.Module, kind: str, config: LoRAConfig) -> dict[str, Any]:
    """path -> layer that is to be quantized; every rule is checked here."""
    candidates = linear_layers(model)
    head = output_head(model) if config.target_modules == ALL_LINEAR else None
    chosen = {path: layer for path, layer in candidates.items() if layer is not head and config.targets(path)}
    if not chosen:
        raise ValueError(f"target_modules must match a linear layer, got {config.target_modules!r}")
    names = tied(model)
    layers: dict[str, Any] = {}
    for path, layer in chosen.items():
        if kind_of(layer) is not None:
            continue
        if type(layer) not in (nn.Linear, FusedLoRALinear):
            if config.target_modules == ALL_LINEAR:
                continue
            raise ValueError(f"{path} must be an nn.Linear to be quantized, got a {type(layer).__name__}")
        check_forward(layer, path)
        weight = layer.weight
        validation.check_whole(weight, f"{path}.weight")
        if weight.dtype not in _DTYPES:
            raise TypeError(f"{path}.weight must be float16, bfloat16 or float32 to be quantized, got {weight.dtype}")
        if weight.device.type == "meta":
            raise ValueError(f"{path}.weight must have values to be quantized, got one on meta")
        if getattr(layer, "merged", False):
            raise ValueError(f"{path} must be unmerged to be quantized; call unmerge first")
        if kind == "nf4" and weight.device.type == "cpu" and layer.in_features % 64:
            # bitsandbytes 0.50 reads a block's scale by the row there
            raise ValueError(
                f"{path} must have in_features in multiples of 64 for 'nf4' on a CPU, got {layer.in_features}"
            )
        if id(weight) in names:
            listed = " and ".join(names[id(weight)])
            raise ValueError(f"{path}.weight must be its own to be quantized, and {listed} are one tensor")
        layers[path] = layer
    return layers


@dataclass(frozen=True)
class _Way:
    """make: of a layer and a compute dtype, a quantized layer of the library's, of the same sizes and weight."""

    kind: Kind
    make: Callable[[Any, torch.dtype | None], nn.Module]


def _nf4(layer: Any, compute_dtype: torch.dtype | None) -> nn.Module:
    bnb: Any = importlib.import_module("bitsandbytes")
    made = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=compute_dtype or layer.weight.dtype,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    made.weight = bnb.nn.Params4bit(layer.weight.detach().cpu(), requires_grad=False, quant_type="nf4")
    made.weight = made.weight.to(layer.weight.device)
    made.quant_state = made.weight.quant_state
    # else inference on such a CPU packs the weight anew, and rounds its scales
    made.support_avx512bf16_for_cpu = False
    return made


def _int8(layer: Any, _: torch.dtype | None) -> nn.Module:
    bnb: Any = importlib.import_module("bitsandbytes")
    made = bnb.nn.Linear8bitLt(
        layer.in_features, layer.out_features, bias=False, has_fp16_weights=False, threshold=6.0, device="meta"
    )
    weight = bnb.nn.Int8Params(layer.weight.detach().cpu(), requires_grad=False, has_fp16_weights=False)
    made.weight = weight.to(layer.weight.device)
    return made


def _fp8(layer: Any, _: torch.dtype | None) -> nn.Module:
    torchao: Any = importlib.import_module("torchao.quantization")
    made = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    made.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
    torchao.quantize_(made, torchao.Float8WeightOnlyConfig())
    return made


_WAYS = {
    "nf4": _Way(KINDS["4-bit"], _nf4),
    "int8": _Way(KINDS["8-bit"], _int8),
    "fp8": _Way(KINDS["torchao"], _fp8),
}


def _become(layer: Any, like: Any, kind: Kind) -> None:
    """Make the layer of the class of ``like``, with its weight, and of ours where it has adapters."""
    base: Any = type(like)
    for name, value in vars(like).items():
        if name not in vars(layer):
            vars(layer)[name] = value
    # how the library reads its state dicts
    layer._load_state_dict_pre_hooks.update(like._load_state_dict_pre_hooks)
    become(layer, quantized_class(kind.name, base) if isinstance(layer, FusedLoRALinear) else base)
    layer._parameters["weight"] = weight = like.weight
    if hasattr(weight, "module"):
        # bitsandbytes' weights know their layers
        weight.module = layer
    if layer.bias is not None:
        layer.bias.requires_grad_(False)
