#!/usr/bin/env bash
# PEFT matches alpha_pattern and rank_pattern in the order in which they were given: the first match decides. It saves
# them in alphabetical order. A model with two patterns that match one layer reloads with another scale, silently.
# Exits 0 while that is so, and 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 peft==0.21.2
"$folder/venv/bin/python" -W ignore - "$folder/adapter" <<'PYTHON'
import json
import sys

import peft
import torch

print(f"peft {peft.__version__}, torch {torch.__version__}")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tower = torch.nn.ModuleDict({"proj": torch.nn.Linear(8, 8)})

    def forward(self, x):
        return self.tower["proj"](x)


# one layer, two patterns that match it; the specific one is given first
config = peft.LoraConfig(r=2, target_modules=["proj"], alpha_pattern={"tower.proj": 32, "proj": 4})
trained = peft.get_peft_model(Net(), config).eval()
with torch.no_grad():
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            parameter.normal_()
trained.save_pretrained(sys.argv[1])
reloaded = peft.PeftModel.from_pretrained(Net(), sys.argv[1]).eval()

x = torch.randn(3, 8)
scales = [model.base_model.model.tower["proj"].scaling["default"] for model in (trained, reloaded)]
with open(f"{sys.argv[1]}/adapter_config.json") as file:
    print("alpha_pattern given:", config.alpha_pattern, " saved:", json.load(file)["alpha_pattern"])
print(f"expected: the reloaded layer has the trained one's scale, {scales[0]}, and its outputs")
print(f"seen:     scale {scales[1]}; outputs differ by up to {(reloaded(x) - trained(x)).abs().max():.1f}")
sys.exit(0 if scales == [16.0, 2.0] else 1)
PYTHON
