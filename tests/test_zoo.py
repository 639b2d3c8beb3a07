"""The harness of ``make zoo`` itself, on models of torch.nn and Transformers; the whole run is a command of its own."""

import json

import pytest

pytest.importorskip("peft")

import torch
from torch import nn

from tools.zoo import __main__ as zoo
from tools.zoo import checks, of_torch
from tools.zoo.entry import CHECKS, Entry

BY_NAME = {entry.name: entry for entry in of_torch.MODELS}
PERCEPTRON = BY_NAME["Sequential of Linears"]


def test_a_run_examines_what_is_asked_for_and_writes_its_file(tmp_path, capsys):
    pytest.importorskip("transformers")
    out = tmp_path / "zoo.json"
    assert zoo.main(["--only", "Sequential of,LSTM,LlamaForCausalLM", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["extra"]["name"] for row in rows] == ["Sequential of Linears", "LSTM and a head", "LlamaForCausalLM"]
    for row in rows:
        assert set(row["extra"]["checks"]) == set(CHECKS)
        assert set(row["extra"]["checks"].values()) <= {"ok", "rounded"}
    assert "LlamaForCausalLM" in capsys.readouterr().out


def test_a_name_that_no_model_has_is_refused(capsys):
    assert zoo.main(["--only", "no such model"]) == 2
    assert "--only must name a model of the zoo, got 'no such model'" in capsys.readouterr().err


def test_a_model_that_fails_stops_no_other():
    def raises():
        raise RuntimeError("no weights today")

    bad = Entry("bad", "torch.nn", "broken", raises, of_torch.sequence)
    found = dict(zoo.examined([bad, PERCEPTRON], jobs=1))
    assert found[bad]["notes"]["fresh"] == "RuntimeError: no weights today"
    assert zoo.settle(bad, found[bad])[0] == "torch.nn: bad, fresh: RuntimeError: no weights today"
    assert zoo.settle(PERCEPTRON, found[PERCEPTRON]) == []


def test_a_layer_whose_weight_is_read_by_name_is_listed():
    found = checks.examine(BY_NAME["A weight read by name"])
    assert found["checks"]["gradients"] in ("differs", "warned")
    assert found["notes"]["gradients"].endswith(": read")


def test_a_known_reason_that_is_gone_is_told():
    entry = Entry("p", "torch.nn", "", PERCEPTRON.make, PERCEPTRON.inputs, known={"saved": "was once so"})
    told = zoo.settle(entry, checks.examine(entry))
    assert told == ["torch.nn: p, saved: differs no longer, and has a reason to: was once so"]


@pytest.mark.parametrize(
    ("name", "wrong", "seen"),
    [
        ("merge_and_unload", lambda model: PERCEPTRON.base(), "merged"),
        ("load_adapter", lambda base, folder: base, "saved"),
        ("fuse", lambda model: model.base_model.model[0].lora_B["default"].weight.data.zero_(), "PEFT fused"),
    ],
)
def test_a_wrong_result_is_seen(monkeypatch, name, wrong, seen):
    monkeypatch.setattr(checks, name, wrong)
    verdicts = checks.examine(PERCEPTRON)["checks"]
    assert [check for check, verdict in verdicts.items() if verdict == "differs"] == [seen]


def test_wrong_gradients_are_seen(monkeypatch):
    """A of one layer gets half again of its gradient."""
    adapted = checks.Compared.adapted

    def off(self):
        model = adapted(self)
        model[0].lora_A.register_hook(lambda gradient: 1.5 * gradient)
        return model

    monkeypatch.setattr(checks.Compared, "adapted", off)
    verdicts = checks.examine(PERCEPTRON)["checks"]
    assert [check for check, verdict in verdicts.items() if verdict == "differs"] == ["gradients", "PEFT"]


def test_a_models_random_weights_are_the_same_at_every_call():
    first, second = PERCEPTRON.base(), PERCEPTRON.base()
    assert isinstance(first, nn.Module)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
