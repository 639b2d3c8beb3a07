"""``fused-lora`` as a person calls it."""

import json
import subprocess
import sys

import pytest

from fused_lora.cli import main


def test_info_says_which_implementations_run_here_and_why_others_do_not(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "torch " in text
    assert "eager         can run" in text
    assert "triton        cannot run: " in text or "cuda:0" in text
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["implementations"]) == {"triton", "native", "eager"}
    assert facts["auto"]["cpu"] == "eager"


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["info", "--unknown"]])
def test_bad_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "fused-lora" in capsys.readouterr().err


def test_the_command_is_installed():
    command = [sys.executable, "-m", "fused_lora.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for name in ("demo", "info", "bench", "tune", "codegen"):
        assert name in done.stdout
