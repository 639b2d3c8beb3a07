"""bitsandbytes' weights of four bits (``Linear4bit``) and of eight (``Linear8bitLt``)."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..backends.four_bits import FourBits
from ..plans import watched
from .kind import Kind, Packed, Recipe, is_class

# compute capabilities of GPUs where ``make gpu`` measured our kernel ahead of bitsandbytes' own in every row of
# "dequantize"; a test holds this to the results files. None is measured yet, so everywhere the library's serves
OURS_IS_FASTER: frozenset[tuple[int, int]] = frozenset()
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# elements that are dequantized at once where a product of mixed dtypes makes float32 copies of its operands
_BLOCK = 1 << 18


class FourBit(Kind):
    """NF4 and FP4, in blocks of any size, their scales quantized again or not, packed in any dtype."""

    name = "4-bit"
    library = "bitsandbytes"
    at_least = (0, 50)
    keeps_dtype = True

    def holds(self, layer: nn.Module) -> bool:
        return is_class(type(layer), "bitsandbytes", ("Linear4bit", "LinearNF4", "LinearFP4"))

    def why_not(self, layer: Any) -> str | None:
        if getattr(layer.weight, "quant_state", None) is None:
            return _NOT_YET
        if layer.compute_dtype not in (None, *_DTYPES):
            return f"compute_dtype must be float16, bfloat16, float32 or None, got {layer.compute_dtype}"
        return self.problem()

    def tell(self, layer: Any) -> str:
        return layer.weight.quant_state.quant_type

    def compute_dtype(self, layer: Any) -> torch.dtype | None:
        return layer.compute_dtype

    def own_dtype(self, layer: Any) -> torch.dtype:
        return layer.weight.quant_state.dtype

    def packed(self, layer: Any) -> Packed:
        weight = layer.weight
        if is_repacked(weight):
            weight.data, weight.quant_state = _as_saved(weight.data, weight.quant_state)
        state = weight.quant_state
        constants = (self.name, state.blocksize, state.quant_type, tuple(state.shape))
        tensors = (weight.data, state.code, state.absmax)
        if not state.nested:
            return Packed(constants, tensors)
        scales = state.state2
        return Packed((*constants, scales.blocksize), (*tensors, scales.absmax, scales.code, state.offset))

    def dequantize(self, recipe: Recipe, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        ours = our_kernel_serves(tensors[0], dtype)
        return (by_our_kernel if ours else by_the_library)(recipe, tensors, dtype)

    def requantize(self, layer: Any, value: Tensor) -> nn.Parameter:
        bnb: Any = importlib.import_module("bitsandbytes")
        old = layer.weight
        settings = {name: getattr(old, name) for name in _SETTINGS}
        return bnb.nn.Params4bit(value.cpu(), requires_grad=False, **settings).to(old.device)

    def exchange(self, layer: Any, weight: nn.Parameter) -> nn.Parameter:
        # the module has it too, for a weight that loses it
        layer.quant_state = weight.quant_state  # type: ignore[attr-defined]
        return super().exchange(layer, weight)


def by_the_library(recipe: Recipe, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """With double quantization in three launches, by way of all absmax in float32."""
    _, blocksize, quant_type, shape, *nested = recipe
    data, _, absmax, *second = tensors
    operators = torch.ops.bitsandbytes
    if nested:
        scales, code, offset = second
        absmax = operators.dequantize_blockwise.default(absmax, scales, code, nested[0], torch.float32) + offset
    return operators.dequantize_4bit.default(data, absmax, blocksize, quant_type, shape, dtype)


def by_our_kernel(recipe: Recipe, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """The same bits in one launch."""
    # here, not at the top: Triton may be missing
    from ..backends.triton.launch_dequantize import dequantize_4bit

    _, blocksize, _, shape, *nested = recipe
    data, code, absmax, *second = tensors
    absmax2, code2, offset = second or (None, None, None)
    bits = FourBits(data, code, absmax, blocksize, absmax2, code2, offset, *nested)
    return dequantize_4bit(bits, torch.empty(shape, dtype=dtype, device=data.device))


def our_kernel_serves(data: Tensor, dtype: torch.dtype) -> bool:
    """Where it was measured to be faster, by ``OURS_IS_FASTER``. A compiler, and modes, see the library's operator."""
    return (
        data.is_cuda
        and not torch.compiler.is_compiling()
        and torch.cuda.get_device_capability(data.device) in OURS_IS_FASTER
        and not watched()
        and backends.why_not("triton", data.device, dtype) is None
    )


class EightBit(Kind):
    """LLM.int8()'s weights: int8 with one scale a row. Here x is not quantized."""

    name = "8-bit"
    library = "bitsandbytes"
    at_least = (0, 50)
    keeps_dtype = True

    def holds(self, layer: nn.Module) -> bool:
        return is_class(type(layer), "bitsandbytes", ("Linear8bitLt",))

    def why_not(self, layer: Any) -> str | None:
        if layer.state.has_fp16_weights:
            return "its weight must be kept in 8 bits, got has_fp16_weights=True"
        return _NOT_YET if layer.weight.dtype != torch.int8 else self.problem()

    def tell(self, layer: Any) -> str:
        return "int8"

    def own_dtype(self, layer: Any) -> torch.dtype:
        # the library quantizes from float16, whatever it was
        return torch.float16 if layer.bias is None else layer.bias.dtype

    def packed(self, layer: Any) -> Packed:
        # the library moves them from the weight to the state in its first forward
        state, weight = layer.state, layer.weight
        scales = state.SCB if state.SCB is not None else weight.SCB
        return Packed((self.name,), (weight.data, scales.to(weight.device)))

    def dequantize(self, recipe: Recipe, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        data, scales = tensors
        scales = scales.unsqueeze(1) * (1 / 127)
        if dtype == torch.float32 or not data.is_cpu or torch.compiler.is_compiling():
            return data.to(dtype).mul_(scales)
        out = torch.empty(data.shape, dtype=dtype, device=data.device)
        rows = max(1, _BLOCK // max(1, data.shape[1]))
        for start in range(0, data.shape[0], rows):
            block = slice(start, start + rows)
            out[block] = data[block] * scales[block]
        return out

    def requantize(self, layer: Any, value: Tensor) -> nn.Parameter:
        bnb: Any = importlib.import_module("bitsandbytes")
        kept = bnb.nn.Int8Params(value.cpu(), requires_grad=False, has_fp16_weights=False)
        return kept.to(layer.weight.device)

    def exchange(self, layer: Any, weight: nn.Parameter) -> nn.Parameter:
        had: Any = layer.weight
        _, had.SCB = self.packed(layer).tensors
        # another layer may have the same state
        layer.state = state = copy.copy(layer.state)
        state.reset_grads()
        state.CB, state.SCB = weight.data, weight.SCB  # type: ignore[attr-defined]
        # else the library takes both from the weight, which may come back
        had.CB = weight.CB = None  # type: ignore[attr-defined]
        return super().exchange(layer, weight)


_SETTINGS = ("blocksize", "compress_statistics", "quant_type", "quant_storage", "module")
_NOT_YET = (
    "its weight must be quantized, got one that is not yet: bitsandbytes does it when the layer is moved to a "
    "device, as by model.to('cpu') or model.cuda()"
)


def is_repacked(weight: Any) -> bool:
    """Whether inference on a CPU has packed it in another way, for a product of its own."""
    return getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)


def _as_saved(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """The library's own way back, which it takes before it saves."""
    functional: Any = importlib.import_module("bitsandbytes.functional")
    return functional._convert_weight_packed_for_cpu_inverse(data, state)
