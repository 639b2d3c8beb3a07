"""Layers whose weight a model reads by name, past their forward and their adapters: they are named, once."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import transformers
from torch import nn
from two_adapters import trained

from fused_lora import (
    FusedLoRALinear,
    apply_lora,
    load_adapter,
    lora_parameters,
    merge,
    merge_and_unload,
    quantize_base,
    save_adapter,
    summary,
)
from fused_lora.called import never_called


class ByName(nn.Module):
    """Calls one layer, and reads the weight of the other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return torch.nn.functional.linear(torch.tanh(self.called(x)), self.read.weight, self.read.bias)


def wavlm():
    torch.manual_seed(0)
    return transformers.WavLMModel(
        transformers.WavLMConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8),
            conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2, layerdrop=0.0, mask_time_prob=0.0,
        )
    )  # fmt: skip


def mamba():
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, state_size=4, use_cache=False)
    return transformers.MambaForCausalLM(config)


X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[3, 5, 9]])
# model, its inputs, the ends of the paths that are never called
MODELS = {
    "read by name": (ByName, X, {"read"}),
    "WavLM": (wavlm, torch.randn(2, 400), {"q_proj", "k_proj", "v_proj", "out_proj"}),
    "Mamba": (mamba, IDS, {"dt_proj"}),
}


def run(model, x):
    y = model(x)
    return getattr(y, "logits", None) if hasattr(y, "logits") else getattr(y, "last_hidden_state", y)


def silently(action, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return action(*args, **kwargs)


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.filterwarnings("ignore:the CUDA kernels of a mamba")
def test_exactly_the_layers_without_a_gradient_are_named(case):
    make, x, ends = MODELS[case]
    model = apply_lora(make(), rank=2)
    assert never_called(model) == []
    run(model, x).float().square().sum().backward()
    layers = {path: m for path, m in model.named_modules() if isinstance(m, FusedLoRALinear)}
    dead = {path for path, layer in layers.items() if layer.lora_B.grad is None}
    assert dead
    assert all(path.endswith(tuple(ends)) for path in dead)
    assert set(never_called(model)) == dead
    table = summary(model)
    assert {row.path for row in table.layers if row.implementation == "never called"} == dead
    assert "never called" in str(table)


def test_the_first_step_after_a_backward_warns_once():
    model = apply_lora(ByName(), rank=2)
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
    other = nn.Linear(2, 2)
    silently(torch.optim.SGD(other.parameters(), lr=0.1).step)
    silently(optimizer.step)
    model(X).sum().backward()
    with pytest.warns(UserWarning, match="1 adapted layers were never called, while others were: read") as caught:
        optimizer.step()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    model(X).sum().backward()
    silently(optimizer.step)
    silently(merge, model)


def test_merging_leaves_no_layer_out_and_says_what_it_changes():
    model = trained(apply_lora(ByName(), rank=2))
    y = model(X)
    before = model.read.weight.clone()
    with pytest.warns(UserWarning, match="read. Merged, their adapters change what the model computes"):
        merge_and_unload(model)
    assert not torch.equal(model.read.weight, before)
    assert not torch.allclose(model(X), y)


def test_saving_warns_and_a_loaded_model_was_called_nowhere(tmp_path):
    model = trained(apply_lora(ByName(), rank=2))
    silently(save_adapter, model, tmp_path)
    model(X)
    with pytest.warns(UserWarning, match="never called"):
        save_adapter(model, tmp_path)
    loaded = load_adapter(ByName(), tmp_path)
    silently(merge, loaded)
    assert torch.equal(loaded.read.weight, silently(merge, load_adapter(ByName(), tmp_path)).read.weight)


def test_layers_that_are_all_called_are_not_warned_of(tmp_path):
    model = apply_lora(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), rank=2)
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
    model(X).sum().backward()
    silently(optimizer.step)
    silently(save_adapter, model, tmp_path)
    silently(merge, model)
    assert "never called" not in str(summary(model))


def test_the_note_is_shared_by_copies_and_replicas_and_no_part_of_the_state():
    model = apply_lora(ByName(), rank=2)
    keys = set(model.state_dict())
    copied, replica = copy.deepcopy(model), model.called._replicate_for_data_parallel()
    copied(X)
    assert model.called._called.ever
    assert replica._called is model.called._called
    assert never_called(model) == ["read"]
    assert set(model.state_dict()) == keys
    again = pickle.loads(pickle.dumps(model))
    assert never_called(again) == []
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert never_called(torch.load(buffer, weights_only=False)) == []


def test_compiled_layers_are_known_by_their_gradients():
    torch._dynamo.reset()
    model = apply_lora(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), rank=2)
    model[0].compile(fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
    model(X).sum().backward()
    silently(optimizer.step)
    assert never_called(model) == []


def test_a_compiled_layer_that_was_trained_stays_known_without_its_gradients(tmp_path):
    torch._dynamo.reset()
    model = apply_lora(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), rank=2)
    model[0].compile(fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
    model(X).sum().backward()
    silently(optimizer.step)
    optimizer.zero_grad()
    assert never_called(model) == []
    silently(save_adapter, model, tmp_path)
    silently(merge, model)


def test_checkpointed_layers_compile_whole():
    from torch.utils.checkpoint import checkpoint

    torch._dynamo.reset()
    model = apply_lora(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), rank=2)

    def forward(x):
        return checkpoint(model, x, use_reentrant=False)

    want = model(X)
    torch.testing.assert_close(torch.compile(forward, fullgraph=True, backend="aot_eager")(X), want)


def test_quantized_layers_are_noted_too():
    torch.manual_seed(0)
    model = apply_lora(quantize_base(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)), "int8"), rank=2)
    model[0](torch.randn(2, 64))
    assert never_called(model) == ["1"]


def test_mambas_out_proj_is_warned_of_as_peft_refuses_it():
    with pytest.warns(UserWarning, match="kernels of a mamba model read the weight of out_proj"):
        apply_lora(mamba(), rank=2)
    silently(apply_lora, mamba(), rank=2, exclude_modules=["out_proj"])
