"""PEFT, ``fuse`` and Transformers' Trainer on a small Llama: train, stop, resume, and end at the same weights.

The Llama is random, the text real: bytes of the manual that Python ships. PEFT wraps the model as ever; one line lets
its layers compute through ``lora_linear``; the Trainer saves PEFT's own checkpoints, and a second Trainer resumes from
one half way, to the same adapter as a run that was never interrupted.

    python examples/train_llama.py [--steps 60] [--out llama-run]
"""

import argparse
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fused_lora.integrations.peft import fuse, summary

LENGTH = 64


class ManualBytes(torch.utils.data.Dataset):
    """Windows of LENGTH bytes."""

    def __init__(self):
        text = "\n".join(topics[name] for name in sorted(topics)).encode()
        whole = len(text) // LENGTH * LENGTH
        self.windows = torch.frombuffer(bytearray(text[:whole]), dtype=torch.uint8).view(-1, LENGTH).long()

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, index):
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def make_model():
    """The same random Llama each time, with LoRA in its layers; embeddings and output head are trained whole."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=LENGTH,
        )
    )  # fmt: skip
    config = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear",
        modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM",
    )  # fmt: skip
    return fuse(get_peft_model(llama, config))


def make_trainer(model, folder, steps):
    arguments = TrainingArguments(
        output_dir=folder, max_steps=steps, save_steps=steps // 2, per_device_train_batch_size=16, learning_rate=5e-3,
        logging_steps=max(1, steps // 6), report_to=[], seed=0, use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=ManualBytes())


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", default="llama-run", help="folder for the checkpoints")
    options = parser.parse_args(arguments)

    model = make_model()
    print(summary(model))
    trainer = make_trainer(model, options.out, options.steps)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: {losses[0]:.2f} at first, {losses[-1]:.2f} at last")

    half = f"{options.out}/checkpoint-{options.steps // 2}"
    print(f"again, from {half}")
    resumed = make_model()
    make_trainer(resumed, options.out, options.steps).train(resume_from_checkpoint=half)
    ours, again = get_peft_model_state_dict(model), get_peft_model_state_dict(resumed)
    same = ours.keys() == again.keys() and all(torch.equal(ours[key], again[key]) for key in ours)
    print(f"resumed half way, the adapter ends {'bit for bit the same' if same else 'OTHERWISE'}")
    return {"losses": losses, "same": same}


if __name__ == "__main__":
    main()
