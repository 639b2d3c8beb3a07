"""``modules_to_save`` as PEFT has it: what reads a weight by name, and both ends of a tied weight."""

import copy
import json
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from fused_lora import (
    apply_lora,
    base_state_dict,
    disable_adapters,
    load_adapter,
    lora_parameters,
    merge_and_unload,
    save_adapter,
    set_adapter,
)
from fused_lora.checkpoint import CONFIG_FILE, WEIGHTS_FILE

IDS = torch.arange(11)


class Table(nn.Module):
    """An embedding whose weight is the output head too, as an expression."""

    def __init__(self):
        super().__init__()
        self.part, self.mix = nn.Embedding(11, 16), nn.Linear(16, 16)

    def forward(self, ids):
        return torch.tanh(self.mix(self.part(ids))) @ self.part.weight.T


class Queries(nn.Module):
    """Learned queries that are never called, as DETR's."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.part = nn.Embedding(11, 16), nn.Linear(16, 16), nn.Embedding(5, 16)

    def forward(self, ids):
        h = self.mix(self.embed(ids))
        return torch.softmax(self.part.weight @ h.T, -1) @ h


class Nested(nn.Module):
    """A part with a Parameter of its own and layers below it, all read from outside."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.dense = nn.Parameter(torch.randn(16)), nn.Linear(16, 16)
            self.tables = nn.ParameterList([torch.randn(16, 16), torch.randn(16)])
            self.inner = nn.ModuleDict({"norm": nn.LayerNorm(16)})

        def forward(self, x):
            return self.inner["norm"](self.dense(x) * self.scale @ self.tables[0] + self.tables[1])

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.part = nn.Embedding(11, 16), nn.Linear(16, 16), self.Part()

    def forward(self, ids):
        h = self.part(self.mix(self.embed(ids)))
        h = F.linear(h, self.part.dense.weight, self.part.dense.bias) * self.part.scale + self.part.tables[1]
        return F.layer_norm(self.part.dense(h), (16,), self.part.inner["norm"].weight, self.part.inner["norm"].bias)


class Attention(nn.Module):
    """Attention that another module computes, of nn.MultiheadAttention's weights."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.part = nn.Embedding(11, 16), nn.Linear(16, 16), nn.MultiheadAttention(16, 2)

    def forward(self, ids):
        h = self.mix(self.embed(ids))
        h = h + self.part(h, h, h, need_weights=False)[0]
        q, k, v = F.linear(h, self.part.in_proj_weight, self.part.in_proj_bias).chunk(3, -1)
        return F.linear(torch.softmax(q @ k.T, -1) @ v, self.part.out_proj.weight, self.part.out_proj.bias)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.part = nn.Embedding(11, 16), nn.Linear(16, 16), nn.LSTM(16, 4)

    def forward(self, ids):
        return self.part(self.mix(self.embed(ids)))[0] @ self.part.weight_hh_l0.T


NETS = [Table, Queries, Nested, Attention, Recurrent]


def base(kind):
    torch.manual_seed(0)
    return kind().eval()


def peft_of(kind, **options):
    options = {"r": 2, "target_modules": ["mix"], "modules_to_save": ["part"], "init_lora_weights": False} | options
    torch.manual_seed(1)
    model = get_peft_model(base(kind), LoraConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def both(kind, folder, **options):
    """PEFT's model, and ours of its folder."""
    theirs = peft_of(kind, **options)
    theirs.save_pretrained(folder)
    return theirs, load_adapter(base(kind), folder).eval()


# ---------------------------------------------------------------- weights that are read by name


@pytest.mark.parametrize("kind", NETS)
def test_a_peft_folder_gives_peft_s_outputs_in_every_state(kind, tmp_path):
    theirs, ours = both(kind, tmp_path / "peft")
    torch.testing.assert_close(ours(IDS), theirs(IDS))
    plain = base(kind)(IDS)
    with disable_adapters(ours):
        assert torch.equal(ours(IDS), plain)
    assert torch.equal(set_adapter(ours, None)(IDS), plain)
    set_adapter(ours, "default")
    torch.testing.assert_close(copy.deepcopy(ours)(IDS), theirs(IDS))
    assert not torch.allclose(ours(IDS), plain)
    # and what is saved of it is PEFT's again
    save_adapter(ours, tmp_path / "ours")
    torch.testing.assert_close(PeftModel.from_pretrained(base(kind), tmp_path / "ours")(IDS), theirs(IDS))
    torch.testing.assert_close(merge_and_unload(ours)(IDS), theirs(IDS))


@pytest.mark.parametrize("kind", NETS)
def test_training_takes_peft_s_steps(kind, tmp_path):
    theirs, ours = both(kind, tmp_path)
    set_adapter(ours, "default")
    for model, parameters in (
        (theirs, [p for p in theirs.parameters() if p.requires_grad]),
        (ours, lora_parameters(ours)),
    ):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(IDS).sin().mean().backward()
            assert all(parameter.grad is not None for parameter in parameters)
            optimizer.step()
    torch.testing.assert_close(ours(IDS), theirs(IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", NETS)
def test_names_stay_and_the_base_keeps_its_values(kind, tmp_path):
    _, ours = both(kind, tmp_path)
    state = base(kind).state_dict()
    assert base_state_dict(ours).keys() == state.keys()
    for found in (base_state_dict(ours), ours.state_dict(), dict(ours.named_parameters())):
        assert all(torch.equal(found[name], value) for name, value in state.items())
    merge_and_unload(ours)
    assert ours.state_dict().keys() == state.keys()


@pytest.mark.parametrize("kind", NETS)
def test_functional_call_puts_tensors_where_their_names_say(kind, tmp_path):
    _, ours = both(kind, tmp_path)
    expected, tensors = ours(IDS), {name: value.detach().clone() for name, value in ours.state_dict().items()}
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    assert torch.equal(torch.func.functional_call(ours, tensors, (IDS,)), expected)
    with torch.no_grad():
        moved = torch.func.functional_call(ours, {name: value * 1.5 for name, value in tensors.items()}, (IDS,))
    assert not torch.allclose(moved, expected)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("kind", [Table, Nested, Attention])
def test_a_compiled_call_reads_the_active_copy(kind, tmp_path):
    torch._dynamo.reset()
    _, ours = both(kind, tmp_path)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(IDS), ours(IDS))
    with disable_adapters(ours):
        torch.testing.assert_close(compiled(IDS), base(kind)(IDS))


def test_a_thread_that_switches_adapters_off_reads_the_bases_weight_alone(tmp_path):
    _, ours = both(Table, tmp_path)
    read, switched, go_on = {}, threading.Event(), threading.Event()

    def off():
        with disable_adapters(ours):
            read["off"] = ours.part.weight
            switched.set()
            go_on.wait(10)
            read["off later"] = ours.part.weight

    thread = threading.Thread(target=off)
    thread.start()
    assert switched.wait(10)
    read["here"] = ours.part.weight
    go_on.set()
    thread.join()
    own = dict(ours.named_parameters())["part.weight"]
    assert read["off"] is own
    assert read["off later"] is own
    assert read["here"] is ours.part.adapters["default"].weight


def test_a_module_with_parameters_and_layers_of_its_own_runs_every_hook_once():
    model, calls = base(Nested), []
    for name in ("part", "part.dense", "part.inner.norm"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    apply_lora(model, rank=2, target_modules=["mix"], modules_to_save=["part"])
    model.part(torch.randn(3, 16))
    assert sorted(calls) == ["part", "part.dense", "part.inner.norm"]


def test_debertas_relative_positions_are_the_adapters():
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    def deberta():
        torch.manual_seed(0)
        config = DebertaV2Config(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
            relative_attention=True, max_relative_positions=8, position_buckets=4, norm_rel_ebd="layer_norm",
            pos_att_type=["p2c", "c2p"], share_att_key=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            initializer_range=0.5,
        )  # fmt: skip
        return DebertaV2ForSequenceClassification(config).eval()

    ours = apply_lora(deberta(), rank=2, target_modules=["query_proj"], modules_to_save=["rel_embeddings"])
    theirs = get_peft_model(
        deberta(), LoraConfig(r=2, target_modules=["query_proj"], modules_to_save=["rel_embeddings"])
    )
    step = torch.randn(8, 16)
    with torch.no_grad():
        ours.deberta.encoder.rel_embeddings.adapters["default"].weight.add_(step)
        theirs.base_model.model.deberta.encoder.rel_embeddings.modules_to_save["default"].weight.add_(step)
    torch.testing.assert_close(ours(IDS[None]).logits, theirs.eval()(IDS[None]).logits)
    assert not torch.allclose(ours(IDS[None]).logits, deberta()(IDS[None]).logits)
    ours(IDS[None]).logits.sum().backward()
    assert ours.deberta.encoder.rel_embeddings.weight.grad.abs().sum() > 0


# ---------------------------------------------------------------- both ends of a tied weight


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.part, self.mix, self.head = nn.Embedding(11, 16), nn.Linear(16, 16), nn.Linear(16, 11, bias=False)
        self.head.weight = self.part.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.mix(self.part(ids))))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def logits(model):
    return model(IDS[None]).logits.detach()


def their_llama(names, **options):
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[*names], **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def test_two_values_of_a_tied_weight_stay_two(tmp_path):
    theirs, ours = both(Tied, tmp_path / "peft", modules_to_save=["part", "head"])
    torch.testing.assert_close(ours(IDS), theirs(IDS))
    assert ours.part.weight is not ours.head.weight
    with disable_adapters(ours):
        assert torch.equal(ours(IDS), base(Tied)(IDS))
    save_adapter(ours, tmp_path / "ours")
    assert "ensure_weight_tying" not in json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())
    torch.testing.assert_close(PeftModel.from_pretrained(base(Tied), tmp_path / "ours")(IDS), theirs(IDS))
    with pytest.warns(UserWarning, match=r"part.weight and head.weight were one tensor, and are not after merging"):
        merge_and_unload(ours)
    torch.testing.assert_close(ours(IDS), theirs(IDS))


def test_a_fresh_adapter_trains_two_copies_as_peft_does():
    torch.manual_seed(1)
    theirs = get_peft_model(
        base(Tied), LoraConfig(r=2, lora_alpha=2, target_modules=["mix"], modules_to_save=["part", "head"])
    )
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="part.weight and head.weight are one tensor"):
        ours = apply_lora(base(Tied), rank=2, target_modules=["mix"], modules_to_save=["part", "head"])
    with torch.no_grad():
        ours.mix.lora_A.copy_(theirs.base_model.model.mix.lora_A["default"].weight)
    for model in (theirs, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(IDS), IDS).backward()
            optimizer.step()
    torch.testing.assert_close(ours(IDS), theirs(IDS))
    assert not torch.equal(ours.part.weight, ours.head.weight)


@pytest.mark.parametrize("names", [("embed_tokens", "lm_head"), ("embed_tokens",), ("lm_head",)])
@pytest.mark.parametrize("tying", [False, True])
def test_a_tied_llama_s_folder_means_the_same_both_ways(names, tying, tmp_path):
    theirs = their_llama(names, ensure_weight_tying=tying)
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "peft")
    ours = load_adapter(llama(), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(ours), expected)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tying
    save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again), expected)
    assert logits(load_adapter(llama(), tmp_path / "ours")).equal(logits(ours))
    # merged, and through a checkpoint of the merged model, it is the same
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged, theirs = merge_and_unload(ours), theirs.merge_and_unload()
    assert any("not after merging" in str(warning.message) for warning in caught) != tying
    torch.testing.assert_close(logits(merged), expected)
    assert merged.config.tie_word_embeddings == theirs.config.tie_word_embeddings == tying
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(type(merged).from_pretrained(tmp_path / "merged").eval()), expected)


def test_ensured_tying_trains_one_copy_wherever_the_weight_is():
    ours = apply_lora(llama(), rank=2, target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert ours.lm_head.weight is not dict(ours.named_parameters())["model.embed_tokens.weight"]
    assert sum(p.numel() for p in lora_parameters(ours)) == 11 * 16 + 2 * (16 + 16)
    with pytest.warns(UserWarning, match="ensure_weight_tying: no module of modules_to_save has a tied weight"):
        apply_lora(base(Table), target_modules=["mix"], modules_to_save=["part"], ensure_weight_tying=True)
    with pytest.raises(ValueError, match=r"ensure_weight_tying: part.weight and head.weight are one tensor, and an"):
        apply_lora(base(Tied), target_modules=["head"], ensure_weight_tying=True)
    with pytest.raises(TypeError, match="ensure_weight_tying must be True or False, got 1"):
        apply_lora(base(Tied), ensure_weight_tying=1)


def test_ensured_tying_of_two_values_is_refused(tmp_path):
    theirs = their_llama(["lm_head"], ensure_weight_tying=True)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    tensors["base_model.model.lm_head.weight"][0] += 1
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"weight' must be equal to the tensor that it is tied to"):
        load_adapter(llama(), tmp_path)
