"""Whole models: adapters in, switched, disabled, merged, counted."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn
from two_adapters import trained

from fused_lora import (
    FusedLoRALinear,
    LoRAConfig,
    add_adapter,
    apply_lora,
    delete_adapter,
    disable_adapters,
    lora_parameters,
    merge,
    merge_and_unload,
    set_adapter,
    summary,
    unmerge,
)
from fused_lora.bench.measure import peak_bytes


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(12, 12), nn.Linear(12, 12, bias=False)
        self.norm = nn.LayerNorm(12)

    def forward(self, x):
        return self.norm(x + self.v_proj(torch.tanh(self.q_proj(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def adapted(model):
    return [name for name, module in model.named_modules() if isinstance(module, FusedLoRALinear)]


X = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))


def test_apply_lora_changes_layers_in_place_freezes_the_rest_and_changes_no_output():
    model = Net()
    linear, names, expected = model.head, [n for n, _ in model.named_parameters()], model(X)
    assert apply_lora(model, rank=2) is model
    assert model.head is linear
    assert torch.equal(model(X), expected)
    assert len(adapted(model)) == 5
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == [n for n, _ in model.named_parameters() if ".adapters.default.lora_" in n]
    assert set(names) < {name for name, _ in model.named_parameters()}
    assert [id(p) for p in lora_parameters(model)] == [id(p) for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["q_proj"]}, ["blocks.0.q_proj", "blocks.1.q_proj"]),
        ({"target_modules": ["blocks.1.q_proj", "head"]}, ["blocks.1.q_proj", "head"]),
        ({"target_modules": r".*\.0\.[qv]_proj"}, ["blocks.0.q_proj", "blocks.0.v_proj"]),
        ({"exclude_modules": ["q_proj", "head"]}, ["blocks.0.v_proj", "blocks.1.v_proj"]),
        ({"exclude_modules": "blocks.*"}, ["head"]),
    ],
    ids=str,
)
def test_targets(fields, expected):
    assert adapted(apply_lora(Net(), **fields)) == expected


def test_patterns_set_rank_and_alpha_by_the_end_of_a_path():
    model = apply_lora(Net(), rank=2, rank_pattern={"q_proj": 3, r"blocks\.1\.v_proj": 4}, alpha_pattern={"head": 10})
    assert model.blocks[0].q_proj.lora_A.shape[0] == 3
    assert model.blocks[0].v_proj.lora_A.shape[0] == 2
    assert model.blocks[1].v_proj.lora_A.shape[0] == 4
    assert model.head.scale == 5
    assert model.blocks[0].q_proj.scale == 1


def test_a_name_that_matches_nothing_is_said():
    with pytest.warns(UserWarning, match="no linear layer is called 'k_proj'"):
        apply_lora(Net(), target_modules=["q_proj", "k_proj"])


def test_a_lone_linear_is_adapted_itself():
    linear = apply_lora(nn.Linear(3, 4), rank=1)
    assert isinstance(linear, FusedLoRALinear)


def test_hooks_optimizers_and_other_references_to_a_layer_survive():
    model, calls = Net(), []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    alias = model.head
    apply_lora(model, rank=1)
    model(X)
    assert calls == [1]
    assert alias is model.head
    assert pickle.loads(pickle.dumps(copy.deepcopy(apply_lora(Net(), rank=1))))(X).shape == (4, 5)


def test_output_head_of_a_transformers_model_is_left_out_of_all_linear():
    model = Net()
    model.get_output_embeddings = lambda: model.head
    assert "head" not in adapted(apply_lora(model))
    model = Net()
    model.get_output_embeddings = lambda: model.head
    assert adapted(apply_lora(model, target_modules=["head"])) == ["head"]


def test_attention_that_reads_its_weight_past_forward_is_not_adapted():
    model = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)
    with pytest.raises(ValueError, match=r"self_attn.out_proj \(NonDynamicallyQuantizableLinear\), which can't take"):
        apply_lora(model, target_modules=["out_proj"])
    assert adapted(apply_lora(model)) == ["linear1", "linear2"]


def test_the_fast_path_of_a_transformer_encoder_does_not_skip_the_adapters():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 24, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 12)
    trained(apply_lora(encoder, rank=2))
    with torch.no_grad():
        fast = encoder(x)
    torch.testing.assert_close(fast, encoder(x).detach())
    with disable_adapters(encoder):
        assert not torch.equal(encoder(x), fast)


def encoder_layer(activation="relu"):
    return nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, dropout=0.0, activation=activation).eval()


@pytest.mark.parametrize("leave", [merge_and_unload, lambda model: delete_adapter(model, "default")])
@pytest.mark.parametrize("activation", ["relu", "gelu", torch.tanh])
def test_an_encoder_gets_its_fast_path_back_when_its_last_adapter_goes(leave, activation):
    model = nn.Sequential(encoder_layer(activation), encoder_layer(activation))
    flags = [layer.activation_relu_or_gelu for layer in model]
    states = [set(vars(layer)) for layer in model]
    trained(apply_lora(model, rank=2, target_modules=["linear1"]))
    add_adapter(model, "other", LoRAConfig(target_modules=["0.linear2"]))
    assert not any(layer.activation_relu_or_gelu for layer in model)
    delete_adapter(model, "other")
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert not any(layer.activation_relu_or_gelu for layer in model)
    leave(model)
    assert [layer.activation_relu_or_gelu for layer in model] == flags
    assert [set(vars(layer)) for layer in model] == states


def test_the_fast_path_is_taken_again_and_says_the_same():
    model = nn.Sequential(encoder_layer())
    merge_and_unload(trained(apply_lora(model, rank=2)))
    x = torch.randn(2, 5, 12)
    model.requires_grad_(False)
    with torch.profiler.profile() as profile, torch.no_grad():
        fast = model(x)
    assert any(event.key == "aten::_transformer_encoder_layer_fwd" for event in profile.key_averages())
    torch.testing.assert_close(fast, model.train()(x))


def test_several_adapters_in_one_model():
    model = apply_lora(Net(), rank=2, adapter="cats")
    assert add_adapter(model, "dogs", LoRAConfig(rank=3, target_modules=["q_proj"])) is model
    trained(model)
    base_out = None
    with disable_adapters(model):
        base_out = model(X)
    cats = model(X)
    set_adapter(model, "dogs")
    dogs = model(X)
    assert model.head.active_adapter is None
    assert len(lora_parameters(model)) == 4
    assert len(lora_parameters(model, "cats")) == 10
    set_adapter(model, "cats")
    assert torch.equal(model(X), cats)
    assert not torch.equal(dogs, cats)
    set_adapter(model, None)
    assert torch.equal(model(X), base_out)
    with pytest.raises(ValueError, match="model must have an active adapter"):
        lora_parameters(model)
    delete_adapter(model, "cats")
    assert "cats" not in model.head.adapters
    set_adapter(model, "dogs")
    assert torch.equal(model(X), dogs)


def test_training_changes_the_active_adapter_and_no_weight():
    model = apply_lora(Net(), rank=2)
    add_adapter(model, "idle")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".default." in name}


def test_disable_adapters_nests_and_restores_after_an_exception_and_a_merge():
    base = Net()
    expected = base(X)
    model = trained(apply_lora(base, rank=2))
    with_lora = model(X)
    for prepare in (lambda: None, lambda: merge(model)):
        prepare()
        with contextlib.suppress(KeyError), disable_adapters(model):
            with disable_adapters(model):
                assert torch.equal(model(X), expected)
            assert torch.equal(model(X), expected)
            raise KeyError
        torch.testing.assert_close(model(X), with_lora, rtol=1e-5, atol=1e-5)


def test_merge_unmerge_and_unload():
    model = trained(apply_lora(Net(), rank=2))
    weights = {n: p.clone() for n, p in model.named_parameters()}
    expected = model(X)
    assert merge(model) is model
    torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)
    assert unmerge(model) is model
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    head = model.head
    assert merge_and_unload(model) is model
    assert model.head is head
    assert {type(m) for m in model.modules()} == {Net, nn.ModuleList, Block, nn.Linear, nn.LayerNorm}
    assert set(model.state_dict()) == set(Net().state_dict())
    torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)


def test_a_merge_that_fails_in_one_layer_is_undone_in_all():
    model = trained(apply_lora(Net(), rank=2))
    with torch.no_grad():
        model.head.lora_B[0, 0] = float("nan")
    weights = {n: p.clone() for n, p in model.named_parameters() if "adapters" not in n}
    with pytest.raises(ValueError, match="head: adapter 'default' must merge to a finite weight"):
        merge(model)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)
    assert not any(m.merged for m in model.modules() if isinstance(m, FusedLoRALinear))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("merged", [False, True])
def test_unloading_needs_the_memory_of_one_layers_sum(dtype, merged):
    side, layers = 128, 8

    def adapt():
        model = apply_lora(nn.Sequential(*(nn.Linear(side, side, dtype=dtype) for _ in range(layers))), rank=2)
        return merge(trained(model)) if merged else trained(model)

    def unload():
        assert all(type(layer) is nn.Linear for layer in merge_and_unload(adapt()))

    # made anew within each recording: a release is recorded where the allocation was
    before, after = (peak_bytes(call, torch.device("cpu")) for call in (adapt, unload))
    # the sum in float32, and where the weight is narrower what it is rounded to
    one = side * side * (4 if dtype is torch.float32 else 4 + dtype.itemsize)
    assert after - before < (0.1 if merged else 1.1) * one


def test_unloading_that_fails_in_the_last_layer_changes_none():
    model = trained(apply_lora(Net(), rank=2))
    merge(model.blocks[0])
    with torch.no_grad():
        model.head.lora_B[0, 0] = float("inf")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="head: adapter 'default' must merge to a finite weight"):
        merge_and_unload(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [layer.merged for layer in (model.blocks[0].q_proj, model.head)] == [True, False]
    assert len(adapted(model)) == 5


def test_weights_whose_sum_overflows_are_finite_all_the_same():
    layer = apply_lora(nn.Linear(64, 64).half(), rank=1)
    with torch.no_grad():
        layer.weight.fill_(60_000)
        layer.lora_B.fill_(0.5)
    assert merge_and_unload(layer).weight.isfinite().all()


def test_adapters_over_a_16_bit_model_are_float32_unless_told():
    model = apply_lora(Net().bfloat16(), rank=2)
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
    trained(model)(X.bfloat16()).float().sum().backward()
    assert {p.grad.dtype for p in lora_parameters(model)} == {torch.float32}
    model = apply_lora(Net().bfloat16(), rank=2, adapter_dtype=torch.bfloat16)
    assert {p.dtype for p in lora_parameters(model)} == {torch.bfloat16}


def test_summary_counts_and_says_why():
    model = apply_lora(Net(), rank=2, target_modules=["q_proj"])
    found = summary(model)
    base = sum(p.numel() for p in Net().parameters())
    assert (found.base, found.adapters, found.trainable) == (base, 96, 96)
    assert (found.base_bytes, found.trainable_bytes) == (4 * base, 4 * 96)
    assert [(row.path, row.rank, row.implementation) for row in found.layers] == [
        ("blocks.0.q_proj", 2, "eager"),
        ("blocks.1.q_proj", 2, "eager"),
    ]
    assert found.not_adapted == ("blocks.0.v_proj", "blocks.1.v_proj", "head")
    text = str(found)
    assert "12x12" in text
    assert f"base {base:,} parameters" in text
    set_adapter(model, None)
    assert "no adapter is active" in str(summary(model))
    assert "trainable 0" in str(summary(Net().requires_grad_(False)))
