"""What an editor and mypy make of our signatures."""

import inspect
import subprocess
import sys
import typing
from dataclasses import fields
from pathlib import Path

import pytest

from fused_lora import FusedLoRALinear, LoRAConfig, add_adapter, apply_lora
from fused_lora.adapter import AdapterOptions, OptionFields
from fused_lora.models.config import ConfigFields

SNIPPETS = """
import torch
from torch import nn
from fused_lora import FusedLoRALinear, LoRAConfig, add_adapter, apply_lora, load_adapter, set_adapter

class Net(nn.Module):
    size: int = 3

net = Net()
linear = nn.Linear(3, 3)
size_1: int = apply_lora(net, rank=8, alpha=16, target_modules=["q"], init="normal").size
size_2: int = apply_lora(net, LoRAConfig(rank=8, alpha=16.0), adapter="a", rank=4).size
size_3: int = add_adapter(net, "b", rank=4).size
size_4: int = set_adapter(net, "b").size
size_5: int = load_adapter(net, "folder").size
FusedLoRALinear(3, 3, rank=4, alpha=8, dropout=0.1).add_adapter("b", rank=4, dtype=torch.float32)
FusedLoRALinear.from_linear(linear, rank=4)
apply_lora(net, rank="eight")  # wrong
apply_lora(net, lora_alpha=3)  # wrong
apply_lora(net, 8)  # wrong
kept: str = apply_lora(net).size  # wrong
apply_lora(Net)  # wrong
add_adapter(net, "b", rank="eight")  # wrong
add_adapter(net, "b", lora_alpha=3)  # wrong
FusedLoRALinear(3, 3, rank="eight")  # wrong
FusedLoRALinear(3, 3, lora_alpha=3)  # wrong
FusedLoRALinear.from_linear(linear, rank="eight")  # wrong
FusedLoRALinear.from_linear(linear, lora_alpha=3)  # wrong
FusedLoRALinear(3, 3).add_adapter("b", rank="eight")  # wrong
FusedLoRALinear(3, 3).add_adapter("b", lora_alpha=3)  # wrong
LoRAConfig(rank="eight")  # wrong
LoRAConfig(lora_alpha=3)  # wrong
"""


def test_mypy_refuses_the_wrong_lines_and_no_others(tmp_path):
    pytest.importorskip("mypy")
    file = tmp_path / "snippets.py"
    file.write_text(SNIPPETS)
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--no-error-summary", "--show-error-codes"]
    ran = subprocess.run(
        [*command, "--config-file=", f"--cache-dir={tmp_path}", "--ignore-missing-imports", str(file)],
        capture_output=True, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    told = {int(line.split(":")[1]) for line in ran.stdout.splitlines() if ": error:" in line}
    lines = SNIPPETS.splitlines()
    assert told == {n for n, line in enumerate(lines, 1) if line.endswith("# wrong")}, ran.stdout + ran.stderr


@pytest.mark.parametrize(("keywords", "options"), [(OptionFields, AdapterOptions), (ConfigFields, LoRAConfig)])
def test_the_keywords_are_the_fields(keywords, options):
    assert typing.get_type_hints(keywords) == {
        name: kind for name, kind in typing.get_type_hints(options).items() if name in {f.name for f in fields(options)}
    }


def test_signatures_can_be_read_at_run_time():
    for function in (apply_lora, add_adapter, FusedLoRALinear.from_linear):
        names = [*inspect.signature(function).parameters]
        assert names[0] in ("model", "linear")
        assert typing.get_type_hints(function)["impl"] is str
    assert [*inspect.signature(LoRAConfig).parameters][:3] == ["rank", "alpha", "dropout"]
