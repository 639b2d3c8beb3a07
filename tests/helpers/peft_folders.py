"""PEFT's adapter folders of tiny models, and how outputs are compared."""

import json
import warnings
from pathlib import Path

import peft
import torch
import transformers

from fused_lora.checkpoint import CONFIG_FILE

IDS = torch.tensor([[3, 5, 9, 10]])
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 40}


def llama(**config):
    torch.manual_seed(0)
    config = SIZES | {"num_key_value_heads": 1, "tie_word_embeddings": False, "pad_token_id": 0} | config
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()


def roberta():
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**SIZES, num_labels=3, pad_token_id=2)
    return transformers.RobertaForSequenceClassification(config).eval()


def compiled():
    return torch.compile(llama(), backend="eager")


def compiled_inside():
    model = llama()
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="eager")
    return model


def shaken(model):
    """Every A and B drawn, and what else is trained moved."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name or ".modules_to_save." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def logits(model, x=IDS):
    with torch.no_grad():
        out = model(x)
    return getattr(out, "logits", out)


def same(ours, theirs, base):
    """Equal within float32's rounding, by the size of what the adapter changes; and it changes much."""
    change = float((theirs - base).abs().max())
    assert change > 1e-3
    assert float((ours - theirs).abs().max()) <= 1e-5 * max(change, float(theirs.abs().max()))


def written_by_peft(make, config, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = shaken(peft.get_peft_model(make(), config)).eval()
        theirs.save_pretrained(str(folder), **options)
        return logits(peft.PeftModel.from_pretrained(make(), str(folder)).eval())


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]} | options)


def change_config(folder, **changes):
    path = Path(folder) / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
