"""What ``load_adapter`` may be told, what a folder says of its model, and the base alone."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from saved_models import WAYS, X, net, shaken
from torch import nn

from fused_lora import (
    FusedLoRALinear,
    apply_lora,
    base_state_dict,
    load_adapter,
    lora_parameters,
    merge,
    merge_and_unload,
    save_adapter,
    set_adapter,
)
from fused_lora.checkpoint import CONFIG_FILE, WEIGHTS_FILE


def change_config(folder, **changes):
    """As PEFT writes it: the weights do not know it."""
    save_file(load_file(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(json.loads((folder / CONFIG_FILE).read_text()) | changes))


# ---------------------------------------------------------------- what load_adapter may be told


@pytest.mark.parametrize("way", WAYS)
def test_a_loaded_adapter_may_wait_and_may_be_frozen(way, tmp_path):
    model = shaken(apply_lora(net(), rank=2, **WAYS[way]))
    save_adapter(model, tmp_path)
    waiting = load_adapter(net(), tmp_path, activate=False)
    assert torch.equal(waiting(X), net()(X))
    assert not any(p.requires_grad for p in waiting.parameters())
    assert torch.equal(set_adapter(waiting, "default")(X), model(X))
    frozen = load_adapter(net(), tmp_path, trainable=False)
    assert torch.equal(frozen(X), model(X))
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in lora_parameters(set_adapter(frozen, "default")))


def test_one_that_waits_leaves_the_others_as_they_are(tmp_path):
    save_adapter(shaken(apply_lora(net(), rank=3)), tmp_path)
    model = shaken(apply_lora(net(), rank=2, adapter="cats"))
    expected = model(X)
    load_adapter(model, tmp_path, "dogs", activate=False)
    assert torch.equal(model(X), expected)
    load_adapter(model, tmp_path, "cats", activate=False, replace=True)
    assert model.fc1.active_adapter is None
    assert model.fc1.adapter("cats").rank == 3


def test_an_adapter_that_may_be_trained_is_replaced_only_where_that_is_asked_for(tmp_path):
    """A fresh adapter has nothing to lose: every B is zero, and it trains A and B alone."""
    save_adapter(shaken(apply_lora(net(), rank=3, target_modules=["fc1", "fc2"])), tmp_path)
    expected = load_adapter(net(), tmp_path)(X)
    assert torch.equal(load_adapter(apply_lora(net(), rank=2), tmp_path)(X), expected)

    one_value = apply_lora(net(), rank=2)
    with torch.no_grad():
        one_value.fc2.lora_B[3, 1] = 1e-30
    kept = {
        "a B that is not zero in 'fc2'": one_value,
        "modules_to_save or biases in 'head.0'": apply_lora(net(), rank=2, **WAYS["head"]),
        "a bias in 'fc1'": apply_lora(net(), rank=2, bias="lora_only"),
    }
    for what, model in kept.items():
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=f"adapter 'default' is here already, with {what}.*replace=True"):
            load_adapter(model, tmp_path)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(load_adapter(model, tmp_path, replace=True)(X), expected)
    with pytest.raises(TypeError, match="replace must be True or False, got 'yes'"):
        load_adapter(net(), tmp_path, replace="yes")


def test_impl_is_of_the_layers_adapted_now_and_is_checked_first(tmp_path):
    save_adapter(apply_lora(net(), rank=2), tmp_path)
    model = load_adapter(net(), tmp_path, impl="eager")
    assert {m.impl for m in model.modules() if isinstance(m, FusedLoRALinear)} == {"eager"}
    plain = net()
    with pytest.raises(ValueError, match="impl must be one of"):
        load_adapter(plain, tmp_path, impl="fast")
    assert all(p.requires_grad for p in plain.parameters())


def test_a_folder_with_a_pickle_alone_is_told_how_to_convert_it(tmp_path):
    torch.save({"base_model.model.fc1.lora_A.weight": torch.ones(2, 12)}, tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model.bin, a pickle, .* is never read; .*save_pretrained"):
        load_adapter(net(), tmp_path)


# ---------------------------------------------------------------- layers that the config does not name


def test_layers_that_the_config_does_not_name_are_refused_or_left_out_as_peft_leaves_them(tmp_path):
    save_adapter(shaken(apply_lora(net(), rank=2)), tmp_path)
    change_config(tmp_path, target_modules=["fc1"])
    plain = net()
    with pytest.raises(ValueError, match=r"fc2.lora_A.weight' is of a layer that adapter_config.json does not name"):
        load_adapter(plain, tmp_path)
    assert type(plain.fc1) is nn.Linear
    with pytest.warns(UserWarning, match="ignored: .*fc2.lora_A.weight"):
        load_adapter(plain, tmp_path, strict=False)
    assert type(plain.fc2) is nn.Linear
    peft = PeftModel.from_pretrained(net(), str(tmp_path)).eval()
    torch.testing.assert_close(plain(X), peft(X), rtol=1e-5, atol=1e-5)


def test_excluded_layers_are_not_named_either(tmp_path):
    save_adapter(apply_lora(net(), rank=2), tmp_path)
    change_config(tmp_path, exclude_modules=["fc2"])
    with pytest.raises(ValueError, match=r"fc2.lora_A.weight' is of a layer"):
        load_adapter(net(), tmp_path)


class Deep(nn.Module):
    """Lists of layers, as Transformers has them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.ModuleDict({name: nn.ModuleList(self.block() for _ in range(4)) for name in ("up", "down")})

    @staticmethod
    def block():
        return nn.ModuleDict(
            {"fc": nn.Linear(12, 12), "experts": nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(12, 12)})])}
        )

    def forward(self, x):
        for block in (*self.body["up"], *self.body["down"]):
            x = block["experts"][0]["fc"](block["fc"](x)).tanh()
        return x


@pytest.mark.parametrize(
    "chosen",
    [
        {"layers_to_transform": 1},
        {"layers_to_transform": [0, 2]},
        {"layers_to_transform": [1, 2], "layers_pattern": "down"},
        {"layers_to_transform": [0], "layers_pattern": ["up", "down"]},
    ],
    ids=str,
)
def test_layers_chosen_by_number_are_those_that_peft_chooses(chosen, tmp_path):
    peft = get_peft_model(Deep(), LoraConfig(r=2, target_modules=["fc"], **chosen)).eval()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    peft.save_pretrained(str(tmp_path))
    model = load_adapter(Deep(), tmp_path)
    torch.testing.assert_close(model(X), peft(X), rtol=1e-4, atol=1e-5)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    of_one = [key for key in tensors if key.startswith(min(tensors).partition("lora_")[0])]
    save_file({key: tensors[key] for key in tensors if key not in of_one}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="is one of target_modules, and adapter_model"):
        load_adapter(Deep(), tmp_path)
    # no case chooses this one
    more = {f"base_model.model.body.up.3.fc.lora_{key[-8:]}": tensors[key].clone() for key in of_one}
    save_file(tensors | more, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"body.up.3.fc.lora_A.weight' is of a layer"):
        load_adapter(Deep(), tmp_path)


def test_numbers_of_layers_that_are_none_are_refused(tmp_path):
    save_adapter(apply_lora(net(), rank=2), tmp_path)
    for wrong in ({"layers_to_transform": ["0"]}, {"layers_to_transform": [0], "layers_pattern": [3]}):
        change_config(tmp_path, **wrong)
        with pytest.raises(ValueError, match="layers_to_transform must be numbers of layers"):
            load_adapter(net(), tmp_path)


def test_a_model_that_is_one_linear_layer_saves_and_loads(tmp_path):
    model = shaken(apply_lora(nn.Linear(12, 4), rank=2))
    save_adapter(model, tmp_path)
    other = nn.Linear(12, 4)
    other.load_state_dict(base_state_dict(model))
    assert torch.equal(load_adapter(other, tmp_path)(X), model(X))


# ---------------------------------------------------------------- what a folder says of its model


def transformer(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    family = "Llama" if kind.startswith("Llama") else "Bert"
    config = getattr(transformers, f"{family}Config")(vocab_size=32, pad_token_id=0, **sizes)
    config._name_or_path = "someone/small-model"
    torch.manual_seed(0)
    return getattr(transformers, kind)(config).eval()


@pytest.mark.parametrize(
    ("kind", "head", "task"),
    [
        ("LlamaForCausalLM", None, "CAUSAL_LM"),
        ("BertLMHeadModel", None, "CAUSAL_LM"),
        ("LlamaForSequenceClassification", "score", "SEQ_CLS"),
        ("BertForTokenClassification", "classifier", "TOKEN_CLS"),
        ("BertForQuestionAnswering", "qa_outputs", "QUESTION_ANS"),
        # PEFT wants the head of such a task in the folder
        ("BertForSequenceClassification", None, None),
        ("BertModel", None, None),
    ],
)
def test_a_folder_says_the_model_and_the_task_and_peft_loads_it(kind, head, task, tmp_path):
    fields = {"target_modules": r".*(q_proj|query)"} | ({"modules_to_save": [head]} if head else {})
    model = shaken(apply_lora(transformer(kind), rank=2, **fields))
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("someone/small-model", task)
    peft, ids = PeftModel.from_pretrained(transformer(kind), str(tmp_path)).eval(), torch.arange(1, 9)[None]
    torch.testing.assert_close(peft(input_ids=ids)[0], model(input_ids=ids)[0], rtol=1e-5, atol=1e-5)


def test_of_another_model_it_says_neither(tmp_path):
    class NetForCausalLM(type(net())):
        name_or_path = ""

    save_adapter(apply_lora(NetForCausalLM(), rank=2), tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == (None, None)


# ---------------------------------------------------------------- the base alone


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("merged", [False, True])
def test_the_base_is_what_it_was_under_its_own_names(way, merged):
    model = shaken(apply_lora(net(), rank=2, **WAYS[way]))
    if merged:
        merge(model)
    state = base_state_dict(torch.compile(nn.DataParallel(model), backend="eager"))
    before = net().state_dict()
    assert [*state] == [*before]
    assert all(torch.equal(value, before[key]) for key, value in state.items())
    assert not any(value.requires_grad for value in state.values())
    assert state["norm.weight"].data_ptr() == dict(model.named_parameters())["norm.weight"].data_ptr()
    assert torch.equal(merge_and_unload(model).fc1.weight, model.fc1.weight)


def test_the_base_of_a_plain_model_is_its_state_and_a_layer_of_two_names_has_both():
    model = net()
    assert [*base_state_dict(model)] == [*model.state_dict()]
    twice = nn.ModuleDict({"one": nn.Linear(4, 4)})
    twice["two"] = twice["one"]
    before = {key: value.clone() for key, value in twice.state_dict().items()}
    layer = shaken(apply_lora(twice, rank=2, target_modules=["one"]))["one"]
    layer.merge()
    state = base_state_dict(twice)
    assert state.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in state.items())
