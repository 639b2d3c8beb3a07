#!/usr/bin/env bash
# PEFT's hotswap_adapter puts a folder of A and B into an adapter that also trained a head (modules_to_save). The folder
# has no head, so loading it gives the base's; after the swap the previous adapter's head stays, silently.
# Exits 0 while that is so, and 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 peft==0.21.2
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
import warnings

import peft
import torch
from peft.utils.hotswap import hotswap_adapter

print(f"peft {peft.__version__}, torch {torch.__version__}")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))


def save(name, **options):
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["body"], **options))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_()
    model.save_pretrained(f"{sys.argv[1]}/{name}")
    return f"{sys.argv[1]}/{name}"


with_head, without = save("with-head", modules_to_save=["head"]), save("without")
x = torch.randn(3, 8)
loaded = peft.PeftModel.from_pretrained(Net(), without).eval()(x)
swapped = peft.PeftModel.from_pretrained(Net(), with_head).eval()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    hotswap_adapter(swapped, without, "default")
apart = (swapped(x) - loaded).abs().max().item()
print("expected: outputs of the folder as from_pretrained loads it, or an error, or a warning")
print(f"seen:     outputs differ by up to {apart:.2f}; warnings: {[str(w.message) for w in caught]}")
sys.exit(0 if apart > 0.1 and not caught else 1)
PYTHON
