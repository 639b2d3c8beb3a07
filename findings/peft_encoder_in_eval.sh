#!/usr/bin/env bash
# In evaluation an nn.TransformerEncoderLayer may hand the weights of its linear layers to one fused operator, and does
# not call the layers. PEFT's LoRA layers give out the base's weights there: in training the adapter counts, in
# evaluation it does not, silently.
# Exits 0 while that is so, and 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 peft==0.21.2
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import peft
import torch

print(f"peft {peft.__version__}, torch {torch.__version__}")
torch.manual_seed(0)
layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
x = torch.randn(2, 5, 16)
with torch.no_grad():
    base = layer.eval()(x)
    model = peft.get_peft_model(layer, peft.LoraConfig(r=4, target_modules=["linear1", "linear2"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
    # dropout is 0: training and evaluation are the same function
    changes = {mode: (model.train(mode == "training")(x) - base).abs().max().item() for mode in ("training", "evaluation")}
print("expected: the adapter changes the output in both modes, by the same")
print("seen:     " + ", ".join(f"{mode}: changed by up to {change:.6f}" for mode, change in changes.items()))
sys.exit(0 if changes["training"] > 0.1 and changes["evaluation"] < 1e-4 else 1)
PYTHON
