"""PEFT models computed by :func:`fused_lora.lora_linear`: ``fuse(peft_model)``, and everything of PEFT keeps working.

``fuse`` changes the class of every ``peft.tuners.lora.Linear`` to a subclass with another ``forward``; no module is
replaced, no Parameter is touched, nothing is remembered. At each call a layer looks at what PEFT has made of it, and
where that is more than ``lora_linear`` computes, it runs PEFT's own forward. ``summary`` says which, and why.

Where the numbers differ from PEFT's:

- float32 adapters over a 16-bit base are rounded to the base's dtype, as autocast would do, and x is not copied to
  float32; PEFT computes its LoRA branch in float32. The gradients of A and B come back in float32 in both.
- The dropout mask has the same rate and scaling, but other random bits, and is not stored. On a CPU without the
  compiled extension it is some thirty small operations, which ``nn.Dropout``'s outruns where x is small: there
  ``impl="auto"`` takes that one, as PEFT does.

A fused model answers as PEFT's own: by ``isinstance``, by the names of its classes, and in a pickle, which holds PEFT's
classes and loads where we are not installed. So it loads unfused: fuse it again. A copy stays fused.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from peft import LoraModel
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import backends, quantized, validation
from ..adapter import is_conv1d
from ..backends import LayerPass
from ..composed import plus_adapter
from ..functional import concatenate_adapters, lora_linear
from ..instances import become, check_forward, foreign_forward
from ..models.encoder import needs_forward, settle_fast_paths
from ..models.overview import BY_SIZE, LayerRow, Summary, kept
from ..quantized import Packed
from ..quantized.linear import quantized_lora_linear, takes
from ..torch_internals import autocast_dtype

Model = TypeVar("Model", bound=nn.Module)

# captured: whatever is patched later, a layer that is left to PEFT runs what PEFT shipped
_PEFT_FORWARD = lora.Linear.forward
# a Parameter of another class (a quantized, sharded or lazy one) means more than its values;
# torch.func.functional_call puts plain tensors in the Parameters' places
_PLAIN = (nn.Parameter, Tensor)
_LINEAR, _DROPOUT = (nn.Linear,), (nn.Dropout, nn.Identity)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# elements of x from which plain PyTorch makes our mask in no more time than nn.Dropout's (benchmarks/test_peft.py)
_LEAST_DROPPED = 1 << 16


class _Remade:
    """What ``copy`` calls for the copy of a fused module, to which it gives the state. In a pickle it is a call that
    makes a module of PEFT's.

    A ``__deepcopy__`` would do for copies, but PEFT's models find what they lack in the modules that they hold, so
    that a whole model would be copied by the method of its part.
    """

    def __init__(self, ours: type[nn.Module], impl: str) -> None:
        self.ours, self.impl = ours, impl

    def __call__(self) -> nn.Module:
        made = self.ours.__new__(self.ours)
        made.__dict__["impl"] = self.impl
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (object.__new__, _PEFTS[self.ours])


class _PassesForPefts:
    """A module of ours whose copies are ours, and whose pickle is of PEFT's."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state: Any = super().__reduce_ex__(2)[2]
        own = dict(state)
        return _Remade(type(self), own.pop("impl")), (), own  # type: ignore[arg-type]


class _Fused(_PassesForPefts):
    """A layer of PEFT's with another forward. :func:`fuse` makes instances, by changing the class of PEFT's."""

    impl = "auto"
    # of nn.Module and of PEFT's LoraLayer, whose subclass it becomes part of
    _modules: Any
    _disable_adapters: bool
    merged_adapters: list[str]
    active_adapters: list[str]
    lora_variant: Any
    scaling: Any

    def _by_peft(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's own forward."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(self, _Fused):
            # by a wrapper of this forward, which outlived ``unfuse``
            return type(self).forward(self, x, *args, **kwargs)
        # adapter_names, alora_offsets and whatever else PEFT passes on is PEFT's to understand
        if args or kwargs or quantized.multiplies_itself(self._modules["base_layer"], x):
            return self._by_peft(x, *args, **kwargs)
        call = _call_of(self)
        if isinstance(call, str) or not _takes(call, x):
            return self._by_peft(x)
        weight, bias, lora_A, lora_B, scale, dropout_p, compute = call
        if isinstance(weight, Packed):
            return quantized_lora_linear(
                x, weight, lora_A, lora_B, scale, bias, compute_dtype=compute, dropout_p=dropout_p, impl=self.impl
            )
        if dropout_p > 0.0 and self.impl == "auto" and _mask_is_slow(x):
            return plus_adapter(F.linear(x, weight, bias), x, (lora_A, lora_B, scale), dropout_p)
        return lora_linear(x, weight, lora_A, lora_B, scale, bias, dropout_p=dropout_p, impl=self.impl)

    def extra_repr(self) -> str:
        return f"fused, impl={self.impl!r}"


class FusedLinear(_Fused, lora.Linear):
    """Of a plain base."""

    def _by_peft(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _PEFT_FORWARD(self, x, *args, **kwargs)


class FusedLoraModel(_PassesForPefts, LoraModel):
    """PEFT's model, which fuses the layers that later adapters bring."""

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, *args, **kwargs)
        _change_classes(model, self.__dict__["impl"])


_PEFTS: dict[type, type[nn.Module]] = {FusedLinear: lora.Linear, FusedLoraModel: LoraModel}
for _ours, _pefts in _PEFTS.items():
    # what PEFT reports as the kind of a model, and prints; repr of the class itself still tells ours
    _ours.__name__ = _pefts.__name__

# PEFT's layers over quantized bases: told by name, as their modules import the libraries
_OVER_QUANTIZED = {("bnb", "Linear4bit"), ("bnb", "Linear8bitLt"), ("torchao", "TorchaoLoraLinear")}


@functools.cache
def _ours_for(pefts: Any) -> type[Any] | None:
    """The class that a module of PEFT's gets; None where it keeps its own. A subclass has a forward of its own."""
    found = next((ours for ours, theirs in _PEFTS.items() if theirs is pefts), None)
    module = pefts.__module__.rpartition(".")
    if found is None and module[0] == "peft.tuners.lora" and (module[2], pefts.__name__) in _OVER_QUANTIZED:
        members = {"__module__": __name__, "__qualname__": f"Fused{pefts.__name__}", "_by_peft": pefts.forward}
        found = type(pefts.__name__, (_Fused, pefts), members)
        _PEFTS[found] = pefts
    return found


def fuse(model: Model, *, impl: str = "auto") -> Model:
    """Let PEFT's LoRA layers in ``model`` compute through :func:`fused_lora.lora_linear`; returns ``model``.

    In place, with PEFT's own modules and Parameters: optimizers, hooks and references stay right, and checkpoints are
    the same. Fusing again does nothing to a layer that is fused already. Adapters that a ``PeftModel`` gets later are
    fused as they come; for layers that come another way, fuse again (``summary`` shows them). An
    ``nn.TransformerEncoder`` with adapters in it is kept off its fast path, which would skip them, as it does in PEFT.

    Args:
        model: what ``get_peft_model`` made, or any module with ``peft.tuners.lora.Linear`` layers in it.
        impl: as for :func:`fused_lora.lora_linear`.

    Raises:
        ValueError: the model has no such layer, or another forward was put on one; nothing is changed.
    """
    validation.check_impl(impl)
    if not fuses(model):
        others = sorted({type(module).__name__ for module in model.modules() if isinstance(module, BaseTunerLayer)})
        raise ValueError(
            "model must have layers of peft.tuners.lora.Linear, got "
            + (
                f"one with {', '.join(others)} layers of PEFT's"
                if others
                else "one without layers of PEFT's; get_peft_model makes them"
            )
        )
    for path, module in model.named_modules():
        if _ours_for(type(module)) is not None:  # type: ignore[arg-type]  # mypy: a class hashes
            check_forward(module, path)
    _change_classes(model, impl)
    return model


def fuses(model: nn.Module) -> bool:
    """Whether the model has a layer for :func:`fuse`, fused yet or not."""
    kinds: set[Any] = {type(module) for module in model.modules()}
    return any(issubclass(kind, lora.Linear) or issubclass(_ours_for(kind) or object, _Fused) for kind in kinds)


def unfuse(model: Model) -> Model:
    """Undo :func:`fuse`: PEFT's layers compute by PEFT's code again; returns ``model``."""
    for module in model.modules():
        if type(module) in _PEFTS:
            module.__class__ = _PEFTS[type(module)]
            del module.__dict__["impl"]
    settle_fast_paths(model)
    return model


def _change_classes(model: nn.Module, impl: str) -> None:
    for module in model.modules():
        kind: Any = type(module)
        ours = kind if kind in _PEFTS else _ours_for(kind)
        if ours is not None:
            become(module, ours)
            module.__dict__["impl"] = impl
    # the encoder's fast path would skip the adapters, those that PEFT's own code computes too
    settle_fast_paths(model, lambda module: isinstance(module, BaseTunerLayer) or needs_forward(module))


# --------------------------------------------------------------------------------------------------
# What a layer computes now, or why that is PEFT's to compute
# --------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """Operands of ``lora_linear``: those of one adapter, or of several as one.

    compute: the dtype that it computes in, whatever x's and autocast's are; None where those decide.
    """

    weight: Tensor | Packed
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scale: float
    dropout_p: float
    compute: torch.dtype | None


def _call_of(layer: Any) -> _Call | str:
    """What ``layer`` computes as it is now, or why ``lora_linear`` can't.

    Read anew at every call: PEFT replaces Parameters, mutates scalings, and merges through ``.data``.
    """
    if not isinstance(layer, _Fused):
        return "not fused"
    if layer._disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return "its adapters are merged into the weight"
    if _has_any_global_hook():
        return "hooks are registered for all modules"
    modules: Any = layer._modules
    base = modules["base_layer"]
    kind, transposed = quantized.kind_of(base), is_conv1d(base)
    if (why := _more_than((type(base),) if transposed or kind is not None else _LINEAR, base)) is not None:
        return f"its base_layer {why}"
    weight, bias, compute = base.weight, base.bias, None
    if kind is not None:
        if (why := kind.why_not(base)) is not None:
            return f"its base_layer: {why}"
        weight, compute = kind.packed(base), kind.compute_dtype(base)
    elif weight.dtype not in _DTYPES or (bias is not None and bias.dtype != weight.dtype):
        return f"its base_layer has a weight of {weight.dtype}, a bias of {bias if bias is None else bias.dtype}"
    else:
        compute = weight.dtype
    every_A, every_B, every_dropout = (modules[name]._modules for name in ("lora_A", "lora_B", "lora_dropout"))
    adapters = []
    dropout_p = 0.0
    for name in layer.active_adapters:
        if name not in every_A:
            continue
        lora_A, lora_B, dropout = every_A[name], every_B[name], every_dropout[name]
        if name in layer.lora_variant:
            return f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__}"
        why = _more_than(_LINEAR, lora_A) or _more_than(_LINEAR, lora_B) or _more_than(_DROPOUT, dropout)
        if why is not None:
            return f"lora_A, lora_B or lora_dropout of adapter {name!r} {why}"
        A, B, scale = lora_A.weight, lora_B.weight, layer.scaling[name]
        if lora_A.bias is not None or lora_B.bias is not None:
            return f"adapter {name!r} has a bias of its own (lora_bias)"
        if type(weight) not in (*_PLAIN, Packed) or type(A) not in _PLAIN or type(B) not in _PLAIN:
            return f"a weight is a {type(weight).__name__}, {type(A).__name__} or {type(B).__name__}, not a Parameter"
        if A.dtype != B.dtype or A.dtype not in (compute or A.dtype, torch.float32):
            return f"adapter {name!r} is {A.dtype} and {B.dtype} over {compute}"
        if type(dropout) is nn.Dropout and dropout.training and dropout.p > 0.0:
            if dropout.p >= 1.0 or dropout.inplace:
                return f"lora_dropout of adapter {name!r} is {dropout}"
            dropout_p = dropout.p
        if isinstance(scale, Tensor):
            # 0-d, so that PEFT can hot-swap it in a compiled model, where a number would be a constant
            B, scale = B * scale.to(B.dtype), 1.0
        adapters.append((A, B, scale))
    if not adapters:
        return "none of its adapters is active"
    if len(adapters) > 1 and dropout_p > 0.0:
        return "several adapters are active, each with a dropout mask of its own"
    return _Call(weight.t() if transposed else weight, bias, *concatenate_adapters(adapters), dropout_p, compute)


def _more_than(kinds: tuple[type[nn.Module], ...], module: nn.Module) -> str | None:
    """How calling ``module`` is more than the arithmetic of ``kinds``, or None where it is not."""
    if type(module) not in kinds:
        return f"is a {type(module).__name__}"
    inside = module.__dict__
    if "forward" in inside:
        return "has another forward on the instance"
    if (
        inside["_forward_hooks"] or inside["_forward_pre_hooks"]
        or inside["_backward_hooks"] or inside["_backward_pre_hooks"]
    ):  # fmt: skip
        return "has hooks"
    return None


def _takes(call: _Call, x: Tensor) -> bool:
    """Whether ``lora_linear`` computes this call on ``x``, here and now."""
    if type(x) not in _PLAIN:
        return False
    compute = autocast_dtype(x.device)
    if isinstance(call.weight, Packed):
        return takes(x.dtype) and call.lora_A.dtype in (call.compute or compute or x.dtype, torch.float32)
    if compute is None:
        return x.dtype == call.weight.dtype
    return torch.float64 not in (x.dtype, call.weight.dtype) and call.lora_A.dtype in (compute, torch.float32)


def _mask_is_slow(x: Tensor) -> bool:
    """Whether ``nn.Dropout`` makes its mask sooner than we ours. Not asked under a compiler, into whose graph a size of
    x would go."""
    few = x.is_cpu and not torch.compiler.is_compiling() and x.numel() < _LEAST_DROPPED
    return few and backends.choose("auto", x.device, x.dtype) == "eager"


# --------------------------------------------------------------------------------------------------
# Telling it
# --------------------------------------------------------------------------------------------------


def summary(model: nn.Module) -> Summary:
    """Which of PEFT's layers in ``model`` are fused as they are now, and why others are not: ``print(summary(model))``.

    A layer that runs PEFT's code shows as "peft". What depends on the single call can't be seen here: PEFT's code
    also runs for a batch of mixed adapters (``adapter_names``), for an x of another dtype than the base's outside
    autocast, and for tensor subclasses.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, lora.LoraLayer)}
    in_layers = {id(module) for layer in layers.values() for module in layer.modules()}  # type: ignore[attr-defined]
    in_adapters = {id(p) for layer in layers.values() for p in _adapter_parameters(layer)}
    return Summary.of(
        model,
        tuple(_row(path, layer) for path, layer in layers.items()),
        in_adapters,
        adapted={id(p) for layer in layers.values() for p in layer.parameters()},  # type: ignore[attr-defined]
        trained=(n for n, p in model.named_parameters() if p.requires_grad and id(p) not in in_adapters),
        not_adapted=(
            path for path, module in model.named_modules()
            if (isinstance(module, nn.Linear) or is_conv1d(module)) and id(module) not in in_layers
        ),
    )  # fmt: skip


def _adapter_parameters(layer: Any) -> list[nn.Parameter]:
    return [p for name in layer.adapter_layer_names for p in getattr(layer, name).parameters()]


def _row(path: str, layer: Any) -> LayerRow:
    names = [name for name in layer.active_adapters if name in layer.r]
    implementation, why = "peft", _why_peft(layer)
    call = None if why is not None else _call_of(layer)
    if isinstance(call, _Call):
        (R, K), N, base = call.lora_A.shape, call.lora_B.shape[0], layer.base_layer
        device, dtype = base.weight.device, quantized.weight_dtype(base)
        asked = LayerPass(True, 1, K, N, R, call.lora_A.dtype, call.dropout_p > 0.0)
        found = backends.runs(layer.impl, device, dtype, asked)
        implementation = " or ".join(found)
        if "eager" in found:
            why = backends.why_not("triton", device, dtype) or (
                BY_SIZE if layer.impl == "auto" else "impl='eager' was asked for"
            )
    return LayerRow(
        path, layer.out_features, layer.in_features, "+".join(names) or None,
        sum(layer.r[name] for name in names) or None, layer.lora_alpha[names[0]] if len(names) == 1 else None,
        sum(p.numel() for p in _adapter_parameters(layer)), implementation, why, *kept(layer.get_base_layer()),
    )  # fmt: skip


def kind_of(layer: Any) -> str:
    """Class of a layer of PEFT's, with the method that it is of: "lora.layer.Conv2d"."""
    return f"{type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__}"


def _why_peft(layer: Any) -> str | None:
    """Why a layer runs PEFT's code, or None where it is fused."""
    if not isinstance(layer, _Fused):
        return f"a layer of {kind_of(layer)}" if _ours_for(layer.__class__) is None else "not fused: call fuse again"
    call = "another forward was put on the instance" if foreign_forward(layer) is not None else _call_of(layer)
    return call if isinstance(call, str) else None
