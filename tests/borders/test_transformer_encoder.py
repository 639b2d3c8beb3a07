"""``nn.TransformerEncoder``: in evaluation it packs padded input and reads weights by name, past every adapter."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fused_lora import (
    add_adapter,
    apply_lora,
    delete_adapter,
    disable_adapters,
    load_adapter,
    merge,
    merge_and_unload,
    quantize_base,
    save_adapter,
    set_adapter,
    unmerge,
)

X = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
PAD = torch.zeros(2, 9, dtype=torch.bool)
PAD[1, 5:] = True


def encoder(layers=2):
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers).requires_grad_(False).eval()


def shaken(model):
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def slow(model, x=X, pad=PAD):
    """What the model computes with its fast path switched off by PyTorch's own switch: the truth."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            return model(x, src_key_padding_mask=pad)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def check(model, expected=None):
    """In evaluation, with and without gradients, the model computes what it does without fast paths; returns it."""
    expected = slow(model) if expected is None else expected
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            # the fast path puts zeros in the place of what is padded
            torch.testing.assert_close(model(X, src_key_padding_mask=PAD)[~PAD], expected[~PAD])
            torch.testing.assert_close(model(X), slow(model, pad=None))
    return expected


def takes_fast_path(model):
    with torch.profiler.profile() as profile, torch.no_grad():
        y = model(X, src_key_padding_mask=PAD)
    keys = {event.key for event in profile.key_averages()}
    assert ("aten::_transformer_encoder_layer_fwd" in keys) == ("aten::_nested_tensor_from_mask" in keys)
    assert not y.is_nested
    return "aten::_transformer_encoder_layer_fwd" in keys


def test_padded_input_in_every_state_of_the_adapters(tmp_path):
    model = encoder()
    base, before = check(model), [set(vars(module)) for module in model.modules()]
    assert takes_fast_path(model)
    shaken(apply_lora(model, rank=4))
    lora = check(model)
    assert (lora - base)[~PAD].abs().max() > 0.01
    torch.testing.assert_close(model.train()(X, src_key_padding_mask=PAD), lora)
    check(model.eval(), lora)
    with disable_adapters(model):
        check(model, base)
    check(merge(model), lora)
    check(unmerge(model), lora)
    check(set_adapter(model, None), base)
    check(set_adapter(model, "default"), lora)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        check(other, lora)
        check(merge_and_unload(other), lora)
        assert takes_fast_path(other)
    save_adapter(model, tmp_path)
    check(load_adapter(encoder(), tmp_path), lora)
    check(merge_and_unload(model), lora)
    assert takes_fast_path(model)
    assert [set(vars(module)) for module in model.modules()] == before


def test_a_single_adapted_layer_keeps_its_encoder_from_packing():
    for number in (0, 1):
        model = encoder()
        shaken(apply_lora(model, rank=4, target_modules=[f"layers.{number}.linear1"]))
        add_adapter(model, "other", rank=2, target_modules=["linear2"])
        check(model)
        delete_adapter(model, "default")
        check(model)
        delete_adapter(model, "other")
        assert takes_fast_path(model)


def test_each_of_two_encoders_stands_for_itself():
    model = nn.ModuleDict({"one": encoder(), "two": encoder()})
    shaken(apply_lora(model, rank=4, target_modules=r"one\..*linear1"))
    check(model["one"])
    assert takes_fast_path(model["two"])


def test_an_encoder_that_does_not_pack_is_left_so():
    model = nn.TransformerEncoder(encoder().layers[0], 2, enable_nested_tensor=False).eval()
    merge_and_unload(shaken(apply_lora(model, rank=4)))
    assert model.use_nested_tensor is False


def test_quantized_layers():
    pytest.importorskip("bitsandbytes")
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 64, dropout=0.0, batch_first=True), 2).eval()
    quantize_base(model, "nf4")
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=PAD), slow(model, x))


# --------------------------------------------------------------------------------------------------
# PEFT
# --------------------------------------------------------------------------------------------------


def peft_encoder(**options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["linear1", "linear2"], **options})
    return shaken(peft.get_peft_model(encoder(), config).eval())


def test_a_fused_encoder_computes_its_adapters_in_evaluation_too():
    from fused_lora.integrations.peft import fuse, unfuse

    model = peft_encoder()
    inner, expected = model.base_model.model, slow(model)
    base = encoder()
    # PEFT's own: nothing of the adapters is left
    with torch.no_grad():
        torch.testing.assert_close(model(X, src_key_padding_mask=PAD)[~PAD], slow(base)[~PAD])
    fuse(fuse(model))
    check(model, expected)
    with model.disable_adapter():
        check(model, slow(base))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        check(other, expected)
        assert takes_fast_path(unfuse(other))
    states = [set(vars(module)) for module in peft_encoder().modules()]
    unfuse(model)
    assert [set(vars(module)) for module in model.modules()] == states
    assert takes_fast_path(inner)
    check(fuse(model).merge_and_unload(), expected)


def test_a_fused_encoder_computes_what_is_left_to_peft():
    from fused_lora.integrations.peft import fuse

    model = fuse(peft_encoder(use_dora=True, target_modules=["layers.0.linear1"]))
    check(model)


def test_adapters_that_a_fused_encoder_gets_later():
    peft = pytest.importorskip("peft")
    from fused_lora.integrations.peft import fuse

    model = fuse(peft_encoder(target_modules=["layers.0.linear1"]))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["layers.1.linear2"]))
    model.set_adapter("other")
    shaken(model).eval()
    check(model)
