"""Models in the place of those that PEFT's tests take from the Hugging Face hub: the same architectures, small.

The weights are drawn, as those of the hub's ``tiny-random`` models are. They lie in the layout of the hub's cache,
where Transformers finds them offline.
"""

import torch
import transformers

# of every architecture, by Transformers' names; a configuration ignores what it has no use for
FIELDS = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 64, "vocab_size": 1024,
}  # fmt: skip
MORE_FIELDS = {
    "BartForConditionalGeneration": {"decoder_start_token_id": 2},
    # PEFT's tests count the layers of these
    "BloomForCausalLM": {"num_hidden_layers": 5},
    "GPT2LMHeadModel": {"num_hidden_layers": 5},
    "OPTForCausalLM": {"num_hidden_layers": 5},
    "GPTJForCausalLM": {"rotary_dim": 4},
    "LlamaForSequenceClassification": {"num_labels": 1, "pad_token_id": 0},
    "T5ForConditionalGeneration": {"decoder_start_token_id": 0, "num_decoder_layers": 2},
}
MODELS = {
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": "Gemma3ForCausalLM",
    "hf-internal-testing/tiny-random-MistralForCausalLM": "MistralForCausalLM",
    "hf-internal-testing/tiny-random-gpt2": "GPT2LMHeadModel",
    "peft-internal-testing/opt-125m": "OPTForCausalLM",
    "peft-internal-testing/tiny-dummy-qwen2": "Qwen2ForCausalLM",
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": "BartForConditionalGeneration",
    "peft-internal-testing/tiny-random-BertForSequenceClassification": "BertForSequenceClassification",
    "peft-internal-testing/tiny-random-BertModel": "BertModel",
    "peft-internal-testing/tiny-random-BloomForCausalLM": "BloomForCausalLM",
    "peft-internal-testing/tiny-random-DebertaModel": "DebertaModel",
    "peft-internal-testing/tiny-random-DebertaV2Model": "DebertaV2Model",
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": "GPT2LMHeadModel",
    "peft-internal-testing/tiny-random-GPTJForCausalLM": "GPTJForCausalLM",
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": "GPTNeoXForCausalLM",
    "peft-internal-testing/tiny-random-LlamaForCausalLM": "LlamaForCausalLM",
    "peft-internal-testing/tiny-random-OPTForCausalLM": "OPTForCausalLM",
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": "RobertaForSequenceClassification",
    "peft-internal-testing/tiny-random-RobertaModel": "RobertaModel",
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": "T5ForConditionalGeneration",
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": "T5ForConditionalGeneration",
    "peft-internal-testing/tiny-random-gpt2": "GPT2LMHeadModel",
    "peft-internal-testing/tiny-random-t5": "T5ForConditionalGeneration",
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": "LlamaForSequenceClassification",
    "trl-internal-testing/tiny-random-LlamaForCausalLM": "LlamaForCausalLM",
}
REVISION = "0" * 40


def fill(home):
    """Write every model into the folder ``home``, which ``HF_HOME`` may then name."""
    transformers.utils.logging.disable_progress_bar()
    for name, kind in MODELS.items():
        torch.manual_seed(0)
        model_class = getattr(transformers, kind)
        config = model_class.config_class(**FIELDS | MORE_FIELDS.get(kind, {}))
        folder = home / "hub" / f"models--{name.replace('/', '--')}"
        model_class(config).save_pretrained(folder / "snapshots" / REVISION)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(REVISION)
