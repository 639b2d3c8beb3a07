"""Transformers' Trainer and its models' own methods, over adapted models."""

import copy
import pickle
import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fused_lora import apply_lora, delete_adapter, load_adapter, lora_parameters, merge_and_unload
from fused_lora.integrations.transformers import SaveAdapterCallback


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def adapted():
    torch.manual_seed(1)
    return apply_lora(llama(), rank=2, dropout=0.1, target_modules=["q_proj"], modules_to_save=["lm_head"])


def trainer(folder, model):
    generator = torch.Generator().manual_seed(2)
    rows = [{"input_ids": (ids := torch.randint(32, (6,), generator=generator)), "labels": ids} for _ in range(16)]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=6, save_steps=3, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to=[], use_cpu=True, disable_tqdm=True, seed=3,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows, callbacks=[SaveAdapterCallback()])


@pytest.mark.filterwarnings("ignore:save_pretrained of a model with adapters")
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path):
    whole = adapted()
    trainer(tmp_path, whole).train()
    resumed = adapted()
    trainer(tmp_path, resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    start = lora_parameters(adapted())
    for one, two, fresh in zip(lora_parameters(whole), lora_parameters(resumed), start, strict=True):
        assert torch.equal(one, two)
        assert not torch.equal(one, fresh)
    ids = torch.arange(8)[None]
    loaded = load_adapter(llama(), tmp_path / "checkpoint-6" / "default").eval()
    assert torch.equal(loaded(ids).logits, whole.eval()(ids).logits)


@pytest.mark.filterwarnings("ignore:save_pretrained of a model with adapters")
def test_a_run_takes_its_values_from_the_folder_in_the_checkpoint(tmp_path):
    trainer(tmp_path, adapted()).train()
    folder, model, read = tmp_path / "checkpoint-3" / "default", adapted(), {}
    callback = SaveAdapterCallback()
    run = trainer(tmp_path, model)
    run.state.global_step = 3
    callback.on_train_begin(run.args, run.state, run.control, model=model)
    read = lora_parameters(load_adapter(llama(), folder))
    assert all(torch.equal(one, two) for one, two in zip(lora_parameters(model), read, strict=True))


def test_save_pretrained_names_save_adapter_while_there_are_adapters(tmp_path):
    model = adapted()
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.warns(UserWarning, match="save_pretrained of a model with adapters .* save_adapter"):
            each.save_pretrained(tmp_path / "adapted")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        delete_adapter(model, "default").save_pretrained(tmp_path / "base")
        merge_and_unload(adapted()).save_pretrained(tmp_path / "merged")


def test_resizing_embeddings_never_drops_an_adapter():
    for options in (
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ):
        model = apply_lora(llama(), rank=2, **options)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match="resize_token_embeddings must come before adapters on the embeddings"):
            model.resize_token_embeddings(40, mean_resizing=False)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        merge_and_unload(model).resize_token_embeddings(40, mean_resizing=False)
        assert model(torch.tensor([[39]])).logits.shape == (1, 1, 40)
    model = apply_lora(llama(), rank=2, target_modules=["q_proj"])
    model.resize_token_embeddings(40, mean_resizing=False)
    assert model(torch.tensor([[39]])).logits.shape == (1, 1, 40)
