"""The README is true: its Python runs, and its numbers are those of the results files."""

import json
import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PEERS = ("ours-eager", "eager", "addmm", "peft", "parametrize")
ROWS = [
    ("RichBoyNet training step, batch 10, rank 1, float32", ("train", "RichBoyNet", "float32")),
    ("512×2048×2048, rank 16, step, float32", ("step", "square-2048", "float32")),
    ("… bfloat16", ("step", "square-2048", "bfloat16")),
    ("… float32 adapters over bfloat16", ("step", "square-2048", "bfloat16+float32")),
    ("one token, 2048×2048, rank 16, forward, float32", ("forward", "decode-2048-m1", "float32")),
    ("… bfloat16", ("forward", "decode-2048-m1", "bfloat16")),
]


def table(results):
    """Ratios to the frozen linear's time, from one results file."""
    lines = [f"| ÷ frozen linear | {' | '.join(PEERS)} |", "|---" * (len(PEERS) + 1) + "|"]
    for title, (work, shape, dtype) in ROWS:
        found = {
            row["candidate"]: row["ratio_to_frozen"]
            for row in results["rows"]
            if row["work"] == work and row["shape"].startswith(shape) and row["dtype"] == dtype
        }
        cells = (f"{found[peer]:.2f}" if peer in found else "–" for peer in PEERS)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_every_python_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    names: dict = {}
    for block in blocks:
        exec(block, names)
    # what the blocks promise: the reloaded copy, merged, is the tuned model
    torch.testing.assert_close(names["other"](names["x"]), names["model"](names["x"]), rtol=1e-4, atol=1e-4)


def test_speed_table_is_the_results_file():
    (file,) = re.findall(r"benchmarks/results/[\w.-]+\.json", README)
    assert table(json.loads((ROOT / file).read_text())) in README
