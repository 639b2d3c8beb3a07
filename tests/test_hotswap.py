"""Another adapter's values from disk, in place."""

import pytest
import torch
from saved_models import WAYS, X, net, shaken
from torch._dynamo.testing import CompileCounterWithBackend

from fused_lora import apply_lora, hotswap_adapter, load_adapter, lora_parameters, merge, save_adapter, unmerge


def swap_pair(tmp_path, **second):
    """A compiled model with the first of two adapters, and the folder of the second."""
    save_adapter(shaken(apply_lora(net(), **({"rank": 2, "alpha": 3} | second))), tmp_path)
    model = shaken(apply_lora(net(), rank=4, alpha=1))
    return model, load_adapter(net(), tmp_path)


def test_hotswap_recompiles_nothing_and_keeps_every_parameter(tmp_path):
    torch._dynamo.reset()
    model, other = swap_pair(tmp_path / "new")
    save_adapter(model, tmp_path / "old")
    counter = CompileCounterWithBackend("eager")
    compiled, before = torch.compile(model, fullgraph=True, backend=counter), [id(p) for p in lora_parameters(model)]
    with torch.no_grad():
        first = compiled(X)
        for _ in range(3):
            assert hotswap_adapter(compiled, tmp_path / "new") is compiled
            torch.testing.assert_close(compiled(X), other(X), rtol=1e-4, atol=1e-4)
            hotswap_adapter(model, tmp_path / "old")
            torch.testing.assert_close(compiled(X), first)
    assert counter.frame_count == 1
    assert [id(p) for p in lora_parameters(model)] == before
    torch._dynamo.reset()


def test_hotswap_empties_layers_that_the_folder_lacks(tmp_path):
    model, other = swap_pair(tmp_path, target_modules=["fc1"])
    hotswap_adapter(model, tmp_path)
    torch.testing.assert_close(model(X), other(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_hotswap_takes_heads_and_biases_along(way, tmp_path):
    model = shaken(apply_lora(net(), rank=2, **WAYS[way]))
    save_adapter(model, tmp_path)
    other = apply_lora(net(), rank=2, **WAYS[way])
    hotswap_adapter(other, tmp_path)
    assert torch.equal(other(X), model(X))


def test_a_hotswap_that_cannot_be_made_changes_nothing(tmp_path):
    model, _ = swap_pair(tmp_path / "large", rank=5)
    save_adapter(apply_lora(net(), rank=2, bias="lora_only"), tmp_path / "bias")
    save_adapter(apply_lora(net(), rank=2, **WAYS["norm"]), tmp_path / "norm")
    few = apply_lora(net(), rank=4, target_modules=["fc1"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="rank of 'fc1' must be at most the adapter's, 4, to be swapped, got 5"):
        hotswap_adapter(model, tmp_path / "large")
    with pytest.raises(ValueError, match="must train what adapter 'default' does, got a difference in the bias"):
        hotswap_adapter(model, tmp_path / "bias")
    with pytest.raises(ValueError, match="must have the folder's layers to be swapped, it lacks 'norm'"):
        hotswap_adapter(model, tmp_path / "norm")
    with pytest.raises(ValueError, match="must have the folder's layers to be swapped, it lacks 'fc2'"):
        hotswap_adapter(few, tmp_path / "large")
    merge(model)
    save_adapter(apply_lora(net(), rank=2), tmp_path / "fine")
    with pytest.raises(ValueError, match="adapter 'default' must not be merged to be swapped, and 'fc1' is"):
        hotswap_adapter(model, tmp_path / "fine")
    with pytest.raises(ValueError, match="adapter 'other' is not here"):
        hotswap_adapter(model, tmp_path / "fine", "other")
    unmerge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
