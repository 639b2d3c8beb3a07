"""The examples do what they say, in fewer steps."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_minilm_learns_from_real_text_and_its_adapter_reloads(tmp_path, capsys):
    found = load("finetune_minilm").main(["--steps", "12", "--held-out", "64", "--out", str(tmp_path / "adapter")])
    assert found["same"]
    assert found["agree"] == 1.0
    # seven chapters: one in seven by chance
    assert found["tuned"] > 0.3
    assert "right on unseen sentences" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip


def test_minilm_learns_over_a_base_of_four_bits(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    arguments = ["--steps", "12", "--held-out", "64", "--base", "nf4", "--out", str(tmp_path / "adapter")]
    found = load("finetune_minilm").main(arguments)
    assert found["same"]
    assert found["tuned"] > 0.3
    assert found["agree"] > 0.9
    assert "nf4 77" in capsys.readouterr().out


def test_a_fused_llama_trains_saves_and_resumes_to_the_same_weights(tmp_path):
    found = load("train_llama").main(["--steps", "12", "--out", str(tmp_path)])
    assert found["losses"][-1] < found["losses"][0] - 0.5
    assert found["same"]
    assert (tmp_path / "checkpoint-6" / "adapter_model.safetensors").exists()


def test_two_adapters_served_in_turn_each_help_their_own_requests(tmp_path):
    found = load("serve_adapters").main(["--steps", "80", "--requests", "60", "--out", str(tmp_path)])
    accuracy = found["accuracy"]
    assert found["unchanged"]
    assert accuracy["upright", "adapter"] == accuracy["upright", "base"] > 0.7
    for kind in ("upside-down", "mirrored"):
        assert accuracy[kind, "adapter"] > accuracy[kind, "base"] + 0.1


def test_every_example_is_listed_and_tested():
    listed = (EXAMPLES / "README.md").read_text()
    tests = [test.read_text() for test in Path(__file__).parent.glob("test_*.py")]
    for file in EXAMPLES.glob("*.py"):
        assert f"examples/{file.name}" in listed
        assert any(f'load("{file.stem}")' in text or f'"{file.name}"' in text for text in tests)
