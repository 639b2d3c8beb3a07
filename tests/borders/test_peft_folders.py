"""Folders that PEFT wrote: what PEFT's own reload of them computes, ``load_adapter`` computes."""

import warnings

import peft
import pytest
import torch
import transformers
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from peft_folders import (
    X,
    change_config,
    compiled,
    compiled_inside,
    llama,
    logits,
    lora,
    roberta,
    same,
    shaken,
    written_by_peft,
)
from safetensors.torch import load_file, save_file
from torch import nn

from fused_lora import apply_lora, disable_adapters, load_adapter, save_adapter
from fused_lora.checkpoint import WEIGHTS_FILE, config_file

# ---------------------------------------------------------------- PEFT writes, we read

READS = {
    "all-linear beside a head of several layers": (roberta, lora(target_modules="all-linear", task_type="SEQ_CLS")),
    "names of layers inside modules_to_save": (roberta, lora(target_modules=["query", "dense"], task_type="SEQ_CLS")),
    "a regex that matches inside modules_to_save": (
        roberta, lora(target_modules=r".*(query|dense)", modules_to_save=["classifier"]),
    ),
    "modules_to_save around a layer by its middle name": (
        llama, lora(target_modules=["q_proj", "up_proj"], modules_to_save=["1.mlp"]),
    ),
    "lm_head as a target": (llama, lora(target_modules=["q_proj", "lm_head"])),
    "lm_head by a regex": (llama, lora(target_modules=r".*(q_proj|lm_head)")),
    "lm_head as a target beside other modules_to_save": (
        llama, lora(target_modules=["lm_head"], modules_to_save=["norm"]),
    ),
    "a tied lm_head as a target": (lambda: llama(tie_word_embeddings=True), lora(target_modules=["q_proj", "lm_head"])),
    "a full name beside layers_to_transform": (
        llama, lora(target_modules=["model.layers.2.self_attn.q_proj", "v_proj"], layers_to_transform=[0]),
    ),
    "layers_pattern, a regex": (llama, lora(layers_to_transform=[0, 2], layers_pattern="(layers|h)")),
    "layers_pattern, regexes": (llama, lora(layers_to_transform=1, layers_pattern=["blocks?", r"l\w+s"])),
    "layers_pattern, several parts": (llama, lora(layers_to_transform=[1], layers_pattern=r"model\.layers")),
    "ensure_weight_tying without tied parts": (llama, lora(ensure_weight_tying=True)),
    "use_qalora over a plain layer": (llama, lora(use_qalora=True, qalora_group_size=8)),
    "velora": (llama, lora(velora_config=VeloraConfig(num_groups=4))),
    "monteclora": (llama, lora(monteclora_config=MontecloraConfig(num_samples=2, buffer_size=2))),
    "target_parameters that are weights": (llama, lora(target_modules=[], target_parameters=["q_proj.weight"])),
    "target_parameters beside names, with a pattern": (
        llama,
        lora(
            target_modules=["v_proj"],
            target_parameters=["0.mlp.up_proj.weight"],
            rank_pattern={r"up_proj\.weight": 2},
        ),
    ),
    "a pattern of a literal name": (llama, lora(alpha_pattern={"model.layers.0.self_attn.q_proj": 32})),
    "patterns are anchored": (
        llama, lora(rank_pattern={"proj": 2, "attn.q_proj": 5, r"layers\.[01]\..*q_proj": 3, "v_pro": 1}),
    ),
    "several patterns, sorted in the file": (
        llama, lora(alpha_pattern={"v_proj": 1, r".*layers\.1\..*": 40, "self_attn.q_proj": 9}),
    ),
    "trained compiled": (compiled, lora()),
    "trained compiled, all-linear": (compiled, lora(target_modules="all-linear")),
    "trained compiled, by a regex and with a head": (
        compiled, lora(target_modules=r"_orig_mod\.model\..*q_proj", modules_to_save=["lm_head"]),
    ),
    "trained compiled in parts": (compiled_inside, lora()),
    "trained compiled in parts, with a norm": (compiled_inside, lora(modules_to_save=["input_layernorm"])),
} | {
    f"init_lora_weights {init}": (llama, lora(init_lora_weights=init))
    for init in (True, False, "gaussian", "Gaussian", "orthogonal", "eva", "mica", "MiCA")
}  # fmt: skip


@pytest.mark.parametrize("case", READS)
def test_we_read_what_peft_reads(case, tmp_path):
    make, config = READS[case]
    theirs, base = written_by_peft(make, config, tmp_path), logits(make())
    model = load_adapter(make(), tmp_path)
    same(logits(model), theirs, base)
    with disable_adapters(model):
        assert torch.equal(logits(model), base)
    # and what we make of it is read again, by both
    save_adapter(model, tmp_path / "again")
    same(logits(load_adapter(make(), tmp_path / "again")), theirs, base)


@pytest.mark.parametrize("make", [compiled, compiled_inside])
@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["lm_head"]}, {"target_modules": "all-linear"}], ids=str)
def test_a_folder_of_a_compiled_model_is_one_of_the_plain_model_and_back(make, fields, tmp_path):
    written_by_peft(make, lora(**fields), tmp_path)
    expected = logits(load_adapter(llama(), tmp_path))
    assert torch.equal(logits(load_adapter(make(), tmp_path)), expected)
    save_adapter(load_adapter(make(), tmp_path), tmp_path / "again")
    theirs = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "again")).eval()
    same(expected, logits(theirs), logits(llama()))


def test_names_without_pefts_prefix_are_read_and_mixed_ones_are_not(tmp_path):
    theirs = written_by_peft(llama, lora(), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    bare = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    save_file(bare, tmp_path / WEIGHTS_FILE)
    same(logits(load_adapter(llama(), tmp_path)), theirs, logits(llama()))
    first = sorted(tensors)[0]
    save_file(bare | {first: bare.pop(first.removeprefix("base_model.model."))}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(
        ValueError, match=r"keys must be base_model.model.<layer>.lora_A.weight or the like, got 'model"
    ):
        load_adapter(llama(), tmp_path)


def test_all_linear_in_any_case_leaves_the_output_head_out(tmp_path):
    theirs = written_by_peft(llama, lora(target_modules="all-linear"), tmp_path)
    change_config(tmp_path, target_modules="ALL-Linear")
    same(logits(load_adapter(llama(), tmp_path)), theirs, logits(llama()))
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    head = {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 16)}
    head["base_model.model.lm_head.lora_B.weight"] = torch.ones(40, 4)
    save_file(tensors | head, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"lm_head.lora_A.weight' is of a layer that .* does not name"):
        load_adapter(llama(), tmp_path)
    with pytest.warns(UserWarning, match="ignored: .*lm_head.lora_A.weight"):
        model = load_adapter(llama(), tmp_path, strict=False)
    same(logits(model), theirs, logits(llama()))


def test_a_head_made_by_another_torch_module_is_no_target(tmp_path):
    # PEFT leaves out what modules_to_save names anywhere in a path; and we say so of a file that has A and B there
    written_by_peft(roberta, lora(target_modules=["query"], modules_to_save=["classifier"]), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    name = "base_model.model.classifier.dense.lora_"
    more = {f"{name}A.weight": torch.ones(4, 16), f"{name}B.weight": torch.ones(16, 4)}
    save_file(tensors | more, tmp_path / WEIGHTS_FILE)
    change_config(tmp_path, target_modules=["query", "dense"])
    with pytest.raises(ValueError, match=r"modules_to_save must leave out layers with A and B, got 'classifier.dense'"):
        load_adapter(roberta(), tmp_path)


# ---------------------------------------------------------------- the base's own values beside A and B


def test_embeddings_that_are_the_bases_are_read_past(tmp_path):
    theirs = written_by_peft(llama, lora(), tmp_path, save_embedding_layers=True)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / WEIGHTS_FILE)
    model = load_adapter(llama(), tmp_path)
    same(logits(model), theirs, logits(llama()))
    assert not hasattr(model.lm_head, "adapters")
    # saved in another precision, they are still the base's
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    save_file({key: t if "lora" in key else t.bfloat16() for key, t in tensors.items()}, tmp_path / WEIGHTS_FILE)
    same(logits(load_adapter(llama(), tmp_path)), theirs, logits(llama()))


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_that_are_not_the_bases_are_the_adapters(tied, tmp_path):
    def make():
        return llama(tie_word_embeddings=tied)

    def grown():
        model = make()
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(1.5)
        return model

    written_by_peft(grown, lora(), tmp_path, save_embedding_layers=True)
    theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path)).eval()
    model = load_adapter(make(), tmp_path)
    same(logits(model), logits(theirs), logits(make()))
    with disable_adapters(model):
        assert torch.equal(logits(model), logits(make()))
    save_adapter(model, tmp_path / "again")
    same(logits(peft.PeftModel.from_pretrained(make(), str(tmp_path / "again")).eval()), logits(theirs), logits(make()))


def test_another_base_under_an_adapted_head_is_refused(tmp_path):
    def other():
        model = llama()
        with torch.no_grad():
            model.lm_head.weight.add_(0.1)
        return model

    written_by_peft(other, lora(target_modules=["q_proj", "lm_head"]), tmp_path)
    model = llama()
    with pytest.raises(
        ValueError, match=r"lm_head.base_layer.weight' is not what the model has there, under an adapted"
    ):
        load_adapter(model, tmp_path)
    assert type(model.lm_head) is nn.Linear
    same(
        logits(load_adapter(other(), tmp_path)),
        logits(peft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()),
        logits(other()),
    )


def test_a_vocabulary_of_another_size_is_named(tmp_path):
    written_by_peft(lambda: llama(vocab_size=44), lora(), tmp_path, save_embedding_layers=True)
    with pytest.raises(ValueError, match=r"must be \(40, 16\), got \(44, 16\); where the vocabulary was resized"):
        load_adapter(llama(), tmp_path)


# ---------------------------------------------------------------- what is refused, and how


@pytest.mark.parametrize("init", ["olora", "pissa", "pissa_niter_2"])
def test_inits_that_change_the_base_are_refused_with_the_way_out(init, tmp_path):
    torch.manual_seed(0)
    theirs = peft.get_peft_model(llama(), lora(init_lora_weights=init)).eval()
    theirs.save_pretrained(str(tmp_path / "start"))
    theirs = shaken(theirs)
    theirs.save_pretrained(str(tmp_path / "mutated"))
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' changes the base weights, .*path_initial_model"):
        load_adapter(llama(), tmp_path / "mutated")
    # the way out that the message names
    start = tmp_path / "start"
    change_config(start, init_lora_weights=True)
    theirs.peft_config["default"].init_lora_weights = init
    theirs.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(start))
    same(logits(load_adapter(llama(), tmp_path / "plain")), logits(theirs), logits(llama()))


def test_lora_ga_is_read_as_peft_reads_it_and_said(tmp_path):
    written_by_peft(llama, lora(), tmp_path)
    change_config(tmp_path, init_lora_weights="lora_ga", lora_ga_config={"direction": "ArB2r"})
    theirs = peft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    with pytest.warns(UserWarning, match="init_lora_weights='lora_ga': training changed the base too"):
        model = load_adapter(llama(), tmp_path)
    same(logits(model), logits(theirs), logits(llama()))


def test_an_unknown_init_is_refused_as_by_peft(tmp_path):
    written_by_peft(llama, lora(), tmp_path)
    change_config(tmp_path, init_lora_weights="newest")
    with pytest.raises(ValueError, match="init_lora_weights must be one of PEFT's, got 'newest'"):
        load_adapter(llama(), tmp_path)
    with pytest.raises(ValueError, match="Unknown initialization"):
        peft.PeftModel.from_pretrained(llama(), str(tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True}, {"lora_bias": True}, {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
        {"trainable_token_indices": [1]}, {"layer_replication": [[0, 2], [1, 3]]}, {"kasa_config": KasaConfig()},
        {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"])},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_more_than_lora_is_refused_by_the_key(options, tmp_path):
    written_by_peft(llama, lora(**options), tmp_path)
    assert next(iter(options)) in config_file.REFUSED
    with pytest.raises(ValueError, match=f"only plain LoRA can be loaded, got {next(iter(options))}="):
        load_adapter(llama(), tmp_path, strict=False)


def test_keys_that_are_none_of_pefts_are_refused_or_ignored_and_said(tmp_path):
    theirs = written_by_peft(llama, lora(), tmp_path)
    change_config(tmp_path, nvfp4_merge_aware={"bits": 4})
    with pytest.raises(
        ValueError, match=r"only plain LoRA can be loaded, got nvfp4_merge_aware=\{'bits': 4\}; strict=F"
    ):
        load_adapter(llama(), tmp_path)
    with pytest.warns(UserWarning, match="ignored: nvfp4_merge_aware"):
        model = load_adapter(llama(), tmp_path, strict=False)
    same(logits(model), theirs, logits(llama()))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (llama, {"target_modules": ["embed_tokens"]}, "is of an adapter of an embedding, and only linear layers"),
        (
            lambda: nn.Sequential(nn.Conv1d(4, 4, 1)),
            {"target_modules": ["0"]},
            "needs a linear layer '0', and the model has none, but a Conv1d",
        ),
        (
            lambda: transformers.GPT2Model(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40)),
            {"target_modules": [], "target_parameters": ["attn.c_proj.weight"]},
            "is of the weight of a Conv1D; target_parameters must be weights of nn.Linear",
        ),
    ],
)  # fmt: skip
def test_layers_that_cannot_be_adapted_are_named(make, options, message, tmp_path):
    peft.get_peft_model(make(), lora(**options)).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        load_adapter(make(), tmp_path)


# ---------------------------------------------------------------- one layer in two places


class Twice(nn.Module):
    """One layer object in two places, or two layers of one Parameter."""

    def __init__(self, one_object):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        if one_object:
            self.second = self.first
        else:
            self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_a_folder_that_peft_reads_at_the_first_place_alone_is_refused(tmp_path):
    theirs = shaken(peft.get_peft_model(Twice(True), lora(target_modules=["first", "second"])))
    theirs.save_pretrained(str(tmp_path))
    model = Twice(True)
    with pytest.raises(
        ValueError, match="module that stands in several places, first, second: PEFT adapts it in the f"
    ):
        load_adapter(model, tmp_path)
    assert type(model.first) is nn.Linear


def test_one_module_in_two_places_is_said_on_saving_and_is_the_same_to_us(tmp_path):
    model = shaken(apply_lora(Twice(True), rank=2))
    with pytest.warns(UserWarning, match="first and second are one module: PEFT will adapt first alone"):
        save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(Twice(True), tmp_path)(X), model(X))


def test_two_layers_of_one_parameter_have_adapters_of_their_own_in_both(tmp_path):
    theirs = shaken(peft.get_peft_model(Twice(False), lora(target_modules=["first", "second"])))
    theirs.save_pretrained(str(tmp_path))
    model = load_adapter(Twice(False), tmp_path)
    same(logits(model, X), logits(theirs, X), logits(Twice(False), X))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path / "again")
    same(
        logits(peft.PeftModel.from_pretrained(Twice(False), str(tmp_path / "again")), X),
        logits(theirs, X),
        logits(Twice(False), X),
    )
