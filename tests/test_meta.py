"""On the meta device, where tensors have shapes and no values, a layer does what ``nn.Linear`` does there."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fused_lora import FusedLoRALinear, apply_lora, disable_adapters, merge_and_unload, set_adapter, summary
from fused_lora.integrations import peft

DTYPES = [torch.float32, torch.bfloat16]


def runs_like(linear, layer, x):
    """Forward and backward, with the shapes and dtypes of ``linear``'s output and of all that is trained."""
    expected, y = linear(x), layer(x)
    assert (y.shape, y.dtype, y.device) == (expected.shape, expected.dtype, expected.device)
    y.sum().backward()
    assert (x.grad.shape, x.grad.dtype, x.grad.device.type) == (x.shape, x.dtype, "meta")
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert len(trained) >= 2
    assert all(p.grad.shape == p.shape and p.grad.dtype == p.dtype and p.grad.is_meta for p in trained)
    assert all(p.grad is None for p in layer.parameters() if not p.requires_grad)


def on_meta(*shape, dtype):
    return torch.randn(*shape, dtype=dtype, device="meta", requires_grad=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("rows", [(5,), (2, 3), (0,), ()], ids=str)
def test_a_layer(dtype, adapter_dtype, dropout, rows):
    layer = FusedLoRALinear(8, 6, rank=3, dropout=dropout, dtype=dtype, device="meta")
    layer.add_adapter("other", rank=2, dropout=dropout, dtype=adapter_dtype)
    layer.set_adapter("other")
    linear = nn.Linear(8, 6, dtype=dtype, device="meta")
    runs_like(linear, layer, on_meta(*rows, 8, dtype=dtype))
    layer.zero_grad()
    runs_like(linear, layer.eval(), on_meta(*rows, 8, dtype=dtype))
    layer.set_adapter(["default", "other"])
    layer.zero_grad()
    runs_like(linear, layer.train(), on_meta(*rows, 8, dtype=dtype))
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        runs_like(linear, layer, on_meta(*rows, 8, dtype=dtype))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fused_peft_model(dropout, dtype):
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(8, 6, dtype=dtype))
        model = get_peft_model(base, LoraConfig(r=2, lora_dropout=dropout, target_modules=["0"]))
    peft.fuse(model)
    assert [row.implementation for row in peft.summary(model).layers] == ["eager"]
    runs_like(nn.Linear(8, 6, dtype=dtype, device="meta"), model, on_meta(5, 8, dtype=dtype))


def test_a_model_there_is_adapted_switched_merged_unloaded_and_brought_here():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    apply_lora(model, rank=2, modules_to_save=["1"])
    x = torch.randn(3, 8, device="meta")
    assert model(x).shape == (3, 4)
    with disable_adapters(model):
        assert model(x).shape == (3, 4)
    set_adapter(model, None)
    set_adapter(model, "default")
    assert "0" in str(summary(model))
    here = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in here.parameters():
            parameter.normal_()
    assert here(torch.ones(3, 8)).isfinite().all()
    assert merge_and_unload(model.to("meta"))(x).shape == (3, 4)
