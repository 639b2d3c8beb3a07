"""Folders that ``save_adapter`` wrote: PEFT computes with them what we do. Which of PEFT's keys are read."""

import json
import warnings
from dataclasses import fields
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft_folders import (
    SIZES,
    X,
    change_config,
    llama,
    logits,
    same,
    shaken,
)
from torch import nn

from fused_lora import FusedLoRALinear, LoRAConfig, apply_lora, load_adapter, save_adapter
from fused_lora.checkpoint import CONFIG_FILE
from fused_lora.models import peft_config

MOE = {
    "moe_intermediate_size": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32, "pad_token_id": 0,
    "num_key_value_heads": 2,
}  # fmt: skip
DEEPSEEK = {
    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
EXPERTS = {
    "DeepseekV3": DEEPSEEK,
    "Glm4Moe": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 8},
    "Qwen3Moe": {"num_experts": 4, "mlp_only_layers": [0], "head_dim": 8},
    "Qwen2Moe": {"num_experts": 4, "mlp_only_layers": [0], "shared_expert_intermediate_size": 8},
    "Olmoe": {"num_experts": 4},
    "Mixtral": {"num_local_experts": 4},
}


def with_experts(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | MOE | EXPERTS[name])
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("targets", ["all-linear", ["down_proj", "o_proj"], ["gate_proj", "q_proj"]], ids=str)
def test_peft_reads_dense_layers_beside_experts_as_we_mean_them(name, targets, tmp_path):
    fields = {"rank": 4, "alpha": 6, "rank_pattern": {"layers.0.*": 2}, "alpha_pattern": {"down_proj": 3}}
    model = shaken(apply_lora(with_experts(name), target_modules=targets, **fields))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*PEFT will")
        save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(with_experts(name), str(tmp_path)).eval()
    base = logits(with_experts(name))
    same(logits(model), logits(theirs), base)
    same(logits(load_adapter(with_experts(name), tmp_path)), logits(theirs), base)


def test_dense_layers_that_peft_would_lose_are_named_on_saving(tmp_path):
    model = shaken(apply_lora(with_experts("DeepseekV3"), rank=2, dropout=0.1, target_modules=["down_proj"])).eval()
    with pytest.warns(UserWarning, match=r"model.layers.0.mlp.down_proj, .*PEFT will take them for experts"):
        save_adapter(model, tmp_path)
    other = load_adapter(with_experts("DeepseekV3"), tmp_path).eval()
    assert torch.equal(logits(other), logits(model))
    assert other.get_submodule("model.layers.0.mlp.down_proj").adapter("default").dropout == 0.1


def test_the_model_types_in_which_peft_takes_names_for_experts_are_known():
    from peft.utils import transformers_weight_conversion as conversion

    from fused_lora.checkpoint import writing

    experts = conversion._MOE_TARGET_MODULE_MAPPING
    kinds = {kind for kind, of in conversion._MODEL_TO_CONVERSION_PATTERN.items() if of in experts}
    # some are classes of parts of models, which are no model_type
    assert {kind for kind in kinds if kind.islower()} <= writing._EXPERTS_TYPES
    assert {name for names in experts.values() for name in names} == writing._EXPERTS_NAMES


class Nested(nn.Module):
    """Layers whose paths end others' paths."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.block = nn.Linear(8, 8), nn.ModuleDict({"fc": nn.Linear(8, 8), "conv": nn.Identity()})
        self.conv = nn.Linear(8, 8)

    def forward(self, x):
        return self.conv(torch.tanh(self.block["fc"](torch.tanh(self.fc(x)))))


@pytest.mark.parametrize("targets", ["fc|conv", "fc", "block.fc", "conv"])
def test_peft_adapts_exactly_the_layers_that_are_adapted_here(targets, tmp_path):
    model = shaken(apply_lora(Nested(), LoRAConfig(rank=2, target_modules=targets)))
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Nested(), str(tmp_path)).eval()
    same(logits(model, X), logits(theirs, X), logits(Nested(), X))
    layers = {name for name, module in model.named_modules() if isinstance(module, FusedLoRALinear)}
    adapted = {name for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == layers


def test_what_is_written_means_the_same_in_any_order_of_its_keys(tmp_path):
    # one layer has three patterns that match it, and PEFT's own file, sorted, would not mean what PEFT trained
    patterns = {"v_proj": 1, r"layers\.1\..*": 40, "self_attn.q_proj": 9}
    model = shaken(apply_lora(llama(), rank=4, target_modules=["q_proj", "v_proj"], alpha_pattern=patterns))
    save_adapter(model, tmp_path)
    written = json.loads((tmp_path / CONFIG_FILE).read_text())["alpha_pattern"]
    for order in (sorted(written), sorted(written, reverse=True)):
        change_config(tmp_path, alpha_pattern={key: written[key] for key in order})
        theirs = peft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
        same(logits(model), logits(theirs), logits(llama()))
        with pytest.warns(UserWarning, match="changed since"):
            same(logits(load_adapter(llama(), tmp_path)), logits(theirs), logits(llama()))


# ---------------------------------------------------------------- the table of the docs


def test_every_key_of_pefts_is_read_ignored_or_refused_and_in_the_table_of_the_docs():
    kinds = {"read": peft_config.READ, "ignored": peft_config.IGNORED, "refused": peft_config.REFUSED}
    known = [key for keys in kinds.values() for key in keys]
    assert len(known) == len(set(known))
    assert set(known) == {field.name for field in fields(peft.LoraConfig)}
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
    rows = [
        line.strip("|").split("|")
        for line in page.splitlines()
        if line.startswith(("| read ", "| ignored ", "| refused "))
    ]
    told = {
        kind: {
            word.strip("`")
            for _, keys, *_ in (row for row in rows if row[0].strip() == kind)
            for word in keys.split(", ")
            for word in [word.strip()]
        }
        for kind in kinds
    }
    assert told == kinds
