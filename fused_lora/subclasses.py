"""Adapters beside subclasses of ``nn.Linear``: their class, their state and their own forward stay."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from . import validation
from .adapter import by_dropout, is_conv1d
from .composed import plus_adapter
from .layer import CLASSES, STATE, FusedLoRALinear
from .parameters import holding, sharing
from .quantized import kind_of, weight_dtype


class FusedLoRASubclass(FusedLoRALinear):
    """What a subclass of ``nn.Linear`` with nn.Linear's own forward becomes, in place: it computes in the fused kernel.

    ``apply_lora`` makes it, and ``FusedLoRALinear.from_linear``.
    """

    made_of_class: type[nn.Linear]
    carries_all = True

    def __init__(self, *args: Any, **options: Any) -> None:
        raise TypeError("FusedLoRASubclass must be made of a subclass of nn.Linear, by apply_lora or from_linear")

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made as needed, so a pickle names the class that it was made of
        reduced = super().__reduce_ex__(protocol)
        return _blank, (self.made_of_class,), *reduced[2:]

    @property
    def plain_class(self) -> type[nn.Module]:
        return self.made_of_class

    @property
    def scale(self) -> Any:
        """The subclass's own attribute where it has one, which its forward may read; else as of a FusedLoRALinear."""
        if "scale" in vars(self):
            return vars(self)["scale"]
        if "scale" in self._parameters or "scale" in self._buffers:
            # nn.Module then looks there
            raise AttributeError("scale")
        return super().scale

    @torch.no_grad()
    def to_linear(self) -> Any:
        """A layer of the subclass that computes what this layer computes now, with a weight and a bias of its own."""
        layer = sharing(self, type(self))
        for name in ("weight", "bias"):
            if layer._parameters.get(name) is not None:
                layer._parameters[name] = nn.Parameter(layer._parameters[name].detach().clone())
        return layer.unload()


class FusedLoRABeside(FusedLoRASubclass):
    """One with a forward of its own: that one computes the base's part, and the low-rank product is added beside it."""

    @property
    def weight_dtype(self) -> torch.dtype:
        return weight_dtype(self)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if not torch.compiler.is_compiling():
            self._called.ever = True
        if self.disabled:
            return self._plain(x, *self._base(), *args, **kwargs)
        adapters = self.active_modules()
        if not adapters or self.merged:
            return self._plain(x, self.weight, self.bias, *args, **kwargs)
        hooked = any(adapter.hooked for adapter in adapters)
        trained = next((adapter for adapter in adapters if adapter.trains_bias), None)
        # an adapter that is called adds its bias itself
        bias = self.bias if trained is None else None if hooked else trained.bias
        y = self._plain(x, self.weight, bias, *args, **kwargs)
        validation.check_base_output(y, x, self.out_features, self.made_of_class.__name__)
        if hooked:
            for each in adapters:
                y = y + each(x).to(y.dtype)
            return y
        for dropout, product in by_dropout(adapters, self.training).items():
            y = plus_adapter(y, x, product, dropout)
        return y

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self if weight is self.weight and bias is self.bias else holding(self, weight, bias)
        # past ours, to the subclass's own
        return super(FusedLoRALinear, layer).forward(x, *args, **kwargs)

    def _sum(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = super()._sum()
        self._check_sum(weight)
        return weight, bias

    def _check_sum(self, weight: Tensor) -> None:
        """ValueError unless the subclass's forward, given W + scale · B A, adds the low-rank product and nothing else.

        A forward may scale the weight, or have a nonlinearity: then no sum of weights is what the layer computes.
        """
        name, dtype = self.made_of_class.__name__, self.weight.dtype
        if weight_dtype(self) != dtype:
            raise ValueError(f"a {name} must have a weight of 16 bits or more to merge into, got {dtype}")
        if weight.is_meta or validation.is_dtensor(weight):
            return
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 4, self.in_features, generator=generator).to(weight.device, dtype)
        product = torch.zeros(1, 4, self.out_features, dtype=dtype, device=x.device)
        for adapter in self.active_modules():
            product = plus_adapter(product, x, (adapter.lora_A, adapter.lora_B, adapter.scale), 0.0)
        before, after = (_in_eval(holding(self, w, self.bias), x) for w in (self.weight, weight))
        # what a merge rounds: each weight and each output once, and the sums of K terms
        size = x.abs() @ torch.maximum(weight.abs(), self.weight.abs()).t() + before.abs()
        allowed = 8 * torch.finfo(dtype).eps * size + 0.1 * product.abs().amax()
        if not bool(((after - before - product).abs() <= allowed).all()):
            raise ValueError(
                f"a {name} must compute with its weight as nn.Linear does to be merged, and its forward does something "
                "else with it; keep the adapter unmerged"
            )


def _in_eval(layer: nn.Module, x: Tensor) -> Tensor:
    modes = {module: module.training for module in layer.modules()}
    try:
        return super(FusedLoRALinear, layer.eval()).forward(x)  # type: ignore[misc]
    finally:
        for module, training in modes.items():
            module.training = training


# --------------------------------------------------------------------------------------------------
# Which subclasses take an adapter
# --------------------------------------------------------------------------------------------------


def is_subclass(module: nn.Module) -> bool:
    """Whether it is of a subclass of ``nn.Linear`` that nothing else here is for."""
    plain = isinstance(module, nn.Linear) and type(module) is not nn.Linear
    return plain and not isinstance(module, FusedLoRALinear) and kind_of(module) is None and not is_conv1d(module)


def has_own_forward(module: nn.Module) -> bool:
    kind: Any = type(module)
    return is_subclass(module) and kind.forward is not nn.Linear.forward


def why_no_product(module: Any) -> str | None:
    """Why no low-rank product can be added to what this subclass of ``nn.Linear`` returns, or None where it can."""
    if type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return "nn.MultiheadAttention reads its weight past its forward"
    if not has_own_forward(module) or nn.parameter.is_lazy(module.weight):
        return None
    try:
        like = _on_meta(module)
        y = like.forward(torch.empty(1, 1, module.in_features, dtype=weight_dtype(like), device="meta"))
    except Exception:
        # it may need a device, other arguments or other shapes: then its calls decide
        return None
    if not isinstance(y, Tensor):
        return f"its forward returns a {type(y).__name__}"
    if y.shape[-1:] != (module.out_features,):
        return f"its forward returns {y.shape[-1] if y.dim() else 'no'} features of {module.out_features}"
    return None


def _on_meta(module: nn.Module) -> Any:
    """A copy without values, whose forward costs nothing and leaves the module as it is."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    # deepcopy takes what the memo holds for an object as its copy
    memo: dict[int, Any] = {}
    for _, tensor in tensors:
        empty = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


def check_subclass(module: Any, path: str) -> None:
    """ValueError or TypeError where an adapter can't be held by this subclass; nothing is changed."""
    kind = type(module).__name__
    taken = sorted(name for name in _OURS if hasattr(module, name))
    if taken:
        raise ValueError(
            f"{path} must not have attributes that an adapted layer needs itself, got a {kind} with "
            f"{', '.join(map(repr, taken))}; exclude_modules leaves it out"
        )


# names that an adapted layer has and a plain one has not, but for those that the forward of either does without
_OURS = {
    name
    for kind in FusedLoRABeside.__mro__[: FusedLoRABeside.__mro__.index(nn.Linear)]
    for name in (*STATE, *vars(kind))
    if not name.startswith("__") and not hasattr(nn.Linear, name)
} - {"scale", "from_linear", "to_linear"}


@functools.cache
def _class_of(base: Any) -> type[FusedLoRASubclass]:
    kind = FusedLoRASubclass if base.forward is nn.Linear.forward else FusedLoRABeside
    members = {"__module__": __name__, "__doc__": kind.__doc__, "made_of_class": base}
    return type(f"FusedLoRA{base.__name__}", (kind, base), members)


def _blank(base: type[nn.Linear]) -> nn.Module:
    """For copying and pickling: a layer whose state is still to come."""
    cls = _class_of(base)  # type: ignore[arg-type]  # mypy: a class hashes
    return cls.__new__(cls)


def _class_for(linear: nn.Module) -> type[FusedLoRASubclass] | None:
    if not is_subclass(linear):
        return None
    check_subclass(linear, type(linear).__name__)
    base: Any = type(linear)
    return _class_of(base)


CLASSES.append(_class_for)
