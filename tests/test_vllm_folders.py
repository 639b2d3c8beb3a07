"""vLLM takes a folder of ours: its rules for LoRA folders, in our words, applied to what ``save_adapter`` writes.

The rules are those of vLLM's ``PEFTHelper`` (the config), ``parse_fine_tuned_lora_name`` and
``LoRAModel.from_local_checkpoint`` (the tensors).
"""

import json
import math
import re

import pytest
import torch
from safetensors import safe_open
from two_adapters import trained

from fused_lora import apply_lora, merge_and_unload, save_adapter

REQUIRED = {"r", "lora_alpha", "target_modules"}
# values that change what an adapter means, which it refuses
REFUSED = (
    "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora",
)  # fmt: skip
# initialisations that leave the base as it was
INITS = (True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga")
# linear layers of a Llama, by the last part of their names
LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def read_config(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config.keys() >= REQUIRED
    assert config["r"] > 0
    if config.get("bias", "none") != "none":
        raise ValueError("bias")
    if not set(config.get("modules_to_save") or ()) <= {"classifier", "score"}:
        raise ValueError("modules_to_save")
    assert not any(config.get(field) for field in REFUSED)
    assert config.get("init_lora_weights", True) in INITS
    return config


def rank_and_scale(config, path):
    def of(pattern, default):
        keys = (key for key in config.get(pattern) or {} if re.match(rf"(.*\.)?({key})$", path))
        return config[pattern][key] if (key := next(keys, None)) is not None else default

    rank, alpha = of("rank_pattern", config["r"]), of("alpha_pattern", config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def read(folder):
    """path of a layer -> what vLLM adds to its weight."""
    config, pairs = read_config(folder), {}
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  # it is no mapping
            *path, which, last = key.removeprefix("base_model.model.").split(".")
            assert (which, last) in (("lora_A", "weight"), ("lora_B", "weight")), f"{key} is no LoRA weight"
            assert path[-1] in LAYERS, f"{key} is of no layer that can have an adapter"
            pairs.setdefault(".".join(path), {})[which] = file.get_tensor(key)
    changes = {}
    for path, pair in pairs.items():
        rank, scale = rank_and_scale(config, path)
        assert pair["lora_A"].shape[0] == pair["lora_B"].shape[1] == rank
        changes[path] = scale * pair["lora_B"] @ pair["lora_A"]
    return changes


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": 4},
        {"rank": 3, "alpha": 7.5, "use_rslora": True, "dropout": 0.25, "target_modules": ["q_proj", "down_proj"]},
        {"rank": 2, "rank_pattern": {"o_proj": 5}, "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 9}},
    ],
    ids=str,
)
def test_vllms_rules_read_what_we_write(fields, tmp_path):
    model = trained(apply_lora(llama(), **fields)).eval()
    save_adapter(model, tmp_path)
    changes = read(tmp_path)
    plain, tuned = llama(), merge_and_unload(model)
    for path, linear in tuned.named_modules():
        if isinstance(linear, torch.nn.Linear):
            expected = plain.get_submodule(path).weight + changes.pop(path, 0.0)
            torch.testing.assert_close(linear.weight, expected, msg=path)
    assert not changes


@pytest.mark.parametrize("fields", [{"bias": "all"}, {"modules_to_save": ["norm"]}], ids=str)
def test_vllm_refuses_what_is_more_than_a_and_b(fields, tmp_path):
    net = llama()
    net.model.layers[0].mlp.up_proj.bias = torch.nn.Parameter(torch.zeros(48))
    save_adapter(apply_lora(net, rank=2, **fields), tmp_path)
    with pytest.raises(ValueError, match=next(iter(fields))):
        read(tmp_path)
