"""A frozen weight in four or eight bits, as other libraries keep it: told, and made a weight again for one call.

``KINDS`` is all that is known of them. No library is imported here: who has such a weight has imported it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..instances import weight_of
from .bitsandbytes import EightBit, FourBit, is_repacked
from .kind import Kind as Kind
from .kind import Packed as Packed
from .torchao import TorchAO

KINDS: dict[str, Kind] = {kind.name: kind for kind in (FourBit(), EightBit(), TorchAO())}


def kind_of(layer: nn.Module) -> Kind | None:
    """How the weight of a linear layer is kept; None where it is plain, or the layer is no linear one."""
    if type(layer) is nn.Linear and type(layer._parameters.get("weight")) is nn.Parameter:
        # by far the most, and some ask at every call
        return None
    # a layer of ours, whose class is made for the kind
    known: Kind | None = getattr(type(layer), "kind", None)
    return known or next((kind for kind in KINDS.values() if kind.holds(layer)), None)


def multiplies_itself(layer: Any, x: Tensor) -> bool:
    """Whether a layer of bitsandbytes' has this inference by a product of its own, which costs less than to dequantize.

    On a CPU with AVX512-BF16, in evaluation and without a gradient, it packs a 4-bit weight anew and multiplies it
    directly. Of 2048 x 2048 that takes 0.4 ms for a row and 1.9 ms for 16, to dequantize and multiply takes 1.7 ms for
    either. A weight that is packed so stays so until it is trained with.
    """
    return (
        x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and KINDS["4-bit"].holds(layer)
        and layer.support_avx512bf16_for_cpu
        and not layer.training
        and (is_repacked(layer.weight) or (x.numel() < _ROWS * x.shape[-1] and _can_be_repacked(layer)))
    )


_ROWS = 16


def _can_be_repacked(layer: Any) -> bool:
    state = getattr(layer.weight, "quant_state", None)
    return state is not None and layer.out_features % 32 == 0 and layer.in_features % state.blocksize == 0


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight, a new (N, K) of that dtype."""
    return KINDS[packed.recipe[0]].dequantize(packed.recipe, packed.tensors, dtype)


def base_of(layers: Iterable[nn.Module]) -> str:
    """How the weights of these layers are kept, in words: "nf4", "nf4, plain"; "" where all are plain."""
    words = {"plain" if (kind := kind_of(layer)) is None else kind.tell(layer) for layer in layers}
    return ", ".join(sorted(words)) if words != {"plain"} else ""


def weight_dtype(layer: Any) -> torch.dtype:
    """The dtype that a linear layer's weight has in products; float32 where x or its own forward decides it."""
    kind, dtype = kind_of(layer), weight_of(layer).dtype
    if kind is None:
        return dtype if _is_computable(dtype) else torch.float32
    return kind.compute_dtype(layer) or torch.float32


def _is_computable(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize >= 2


def check(layer: Any, name: str) -> None:
    """TypeError where the layer's weight is of no dtype that can be computed with. name: the layer's, for the message.

    Raises:
        ValueError: it is quantized, or is to be, but not as it must be.
    """
    kind, weight = kind_of(layer), layer.weight
    if kind is not None:
        why = kind.why_not(layer)
        if why is not None:
            raise ValueError(f"{name}: {why}")
    elif weight is not None and not _is_computable(weight.dtype):
        raise TypeError(f"{name}.weight must be float16, bfloat16, float32 or float64, got {weight.dtype}")
