"""Linear layers in four and eight bits, of every kind that is told from the others. Needs both libraries."""

import bitsandbytes as bnb
import torch
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

from fused_lora import quantized


def four_bit(K, N, bias=True, *, compute=None, blocksize=64, dtype=torch.float32, **options):
    layer = bnb.nn.Linear4bit(K, N, bias, compute_dtype=compute, **({"quant_type": "nf4"} | options))
    layer.weight.data = layer.weight.data.to(dtype)
    layer.weight.blocksize = blocksize
    return layer.to("cpu")


def eight_bit(K, N, bias=True, threshold=6.0):
    return bnb.nn.Linear8bitLt(K, N, bias, has_fp16_weights=False, threshold=threshold).to("cpu")


def torchao(K, N, bias=True, *, config, dtype=torch.float32):
    layer = nn.Linear(K, N, bias, dtype=dtype)
    quantize_(layer, config)
    return layer


KINDS = {
    "nf4": four_bit,
    "nf4 of bfloat16, scales plain": lambda *a: four_bit(*a, compress_statistics=False, dtype=torch.bfloat16),
    "fp4": lambda *a: four_bit(*a, quant_type="fp4"),
    "blocks of 128": lambda *a: four_bit(*a, blocksize=128),
    "in bfloat16": lambda *a: four_bit(*a, quant_storage=torch.bfloat16),
    "int8": eight_bit,
    "torchao int8": lambda *a: torchao(*a, config=Int8WeightOnlyConfig()),
    "torchao fp8": lambda *a: torchao(*a, config=Float8WeightOnlyConfig()),
    "torchao int4": lambda *a: torchao(*a, config=IntxWeightOnlyConfig(torch.int4, PerGroup(32))),
}


def values(layer, dtype=torch.float32):
    """(N, K) of what the layer's weight stands for."""
    return quantized.dequantize(quantized.kind_of(layer).packed(layer), dtype)


def stored(layer):
    """The bytes of all that is kept of the weight."""
    return [part.clone().reshape(-1).view(torch.uint8) for part in parts(layer)]


def parts(layer):
    """The plain tensors that are kept of the weight."""
    tensors = quantized.kind_of(layer).packed(layer).tensors
    return [part for tensor in tensors for part in quantized.kind.plain_parts(tensor)]


def net(make=four_bit, K=128, hidden=128, N=32):
    return nn.Sequential(make(K, hidden), nn.Tanh(), make(hidden, N))


def shaken(model):
    """With adapters that count."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
