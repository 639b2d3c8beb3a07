"""``nn.DataParallel``: its replicas compute with their own adapters, and with those that their model's caller sees."""

import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from two_adapters import X, net, trained, two

from fused_lora import (
    FusedLoRALinear,
    LoRAConfig,
    add_adapter,
    apply_lora,
    disable_adapters,
    merge,
    set_adapter,
)
from fused_lora.integrations.peft import fuse


def replica_of(model, change):
    """What ``torch.nn.parallel.replicate`` makes for one device: there each tensor is a copy, here ``change`` of it.

    It needs a GPU itself. Older releases of PyTorch put the copied modules straight into ``_modules``, as is done here.
    """
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copied in copies.items():
        for name, child in module._modules.items():
            copied._modules[name] = None if child is None else copies[child]
        for name, parameter in module._parameters.items():
            if parameter is None:
                copied._parameters[name] = None
            else:
                setattr(copied, name, change(parameter))
        for name, buffer in module._buffers.items():
            copied._buffers[name] = None if buffer is None else change(buffer.detach())
    return copies[model]


def doubled(tensor):
    return 2.0 * tensor


def with_a_head():
    torch.manual_seed(0)
    model = trained(apply_lora(net(), rank=2, target_modules=["0"], modules_to_save=["2"], bias="lora_only"))
    with torch.no_grad():
        model[2].adapters["default"].weight.add_(1.0)
    return model


def several():
    return set_adapter(two(), ["cats", "dogs"])


def peft_fused():
    torch.manual_seed(0)
    return fuse(trained(get_peft_model(net(), LoraConfig(r=2, target_modules=["0", "2"]))))


KINDS = {"one": two, "several": several, "modules_to_save": with_a_head, "peft": peft_fused}


@pytest.mark.parametrize("kind", KINDS)
def test_a_replica_computes_with_tensors_of_its_own_and_hands_their_gradients_back(kind):
    model = KINDS[kind]().eval()
    # the same model with doubled tensors, made without any replica
    expected = KINDS[kind]().eval()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.mul_(2.0)
    want = expected(X)
    want.sin().sum().backward()
    y = replica_of(model, doubled)(X)
    torch.testing.assert_close(y, want)
    y.sin().sum().backward()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, 2.0 * theirs.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_replica_on_another_device_reads_nothing_of_its_model(kind):
    model = KINDS[kind]()
    assert replica_of(model, lambda tensor: tensor.to("meta"))(X.to("meta")).shape == model(X).shape


def test_a_replica_is_of_the_state_that_its_model_has_then():
    model, base = two(), net()
    add_adapter(model, "birds", LoRAConfig(rank=1))
    trained(model)
    for names in (["dogs"], ["birds", "cats"], None):
        set_adapter(model, names)
        assert torch.equal(replica_of(model, torch.clone)(X), model(X))
    set_adapter(model, "dogs")
    merge(model)
    assert torch.equal(replica_of(model, torch.clone)(X), model(X))
    with disable_adapters(model):
        assert torch.equal(replica_of(model, torch.clone)(X), base(X))


def test_replicas_follow_the_thread_that_made_them():
    """``nn.DataParallel`` runs each replica on a thread of its own."""
    model, base = two(), net()(X)
    with disable_adapters(model):
        off = replica_of(model, torch.clone)
    on, seen = replica_of(model, torch.clone), []
    thread = threading.Thread(target=lambda: seen.extend([off(X), on(X)]))
    thread.start()
    thread.join(30)
    assert torch.equal(seen[0], base)
    assert torch.equal(seen[1], model(X))
    assert torch.equal(off(X), base)


def test_a_model_whose_layer_is_the_whole_is_replicated_too():
    layer = trained(FusedLoRALinear(6, 4, rank=2))
    x = torch.randn(3, 6)
    assert torch.equal(replica_of(layer, torch.clone)(x), layer(x))
    assert isinstance(replica_of(layer, torch.clone), nn.Linear)


def test_a_replica_gives_its_own_copy_to_who_reads_a_weight_by_name():
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.mix = nn.Embedding(7, 6), nn.Linear(6, 6)

        def forward(self, ids):
            return self.mix(self.table(ids)) @ self.table.weight.t()

    model = trained(apply_lora(ByName(), rank=2, target_modules=["mix"], modules_to_save=["table"]))
    with torch.no_grad():
        model.table.adapters["default"].weight.add_(1.0)
    ids = torch.arange(7)
    assert torch.equal(replica_of(model, torch.clone)(ids), model(ids))
    copied = model.table.adapters["default"].weight
    replica_of(model, doubled)(ids).sum().backward()
    assert copied.grad.abs().min() > 0
    with disable_adapters(model):
        assert torch.equal(replica_of(model, torch.clone)(ids), ByName()(ids))
