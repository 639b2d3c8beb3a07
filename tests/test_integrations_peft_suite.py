"""How `make test-peft` reads and compares two runs of PEFT's tests, and that the pages quote what it found."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SUITE = ROOT / "tests" / "peft_suite"
sys.path.insert(0, str(SUITE))
from outcomes import compare, counted, read  # noqa: E402

RESULTS = json.loads((SUITE / "results.json").read_text())


def report(tmp_path, **cases):
    """A junit report of tests with these contents."""
    file = tmp_path / "report.xml"
    elements = (f'<testcase classname="tests.f" name="{name}">{inside}</testcase>' for name, inside in cases.items())
    file.write_text(f"<testsuites><testsuite>{''.join(elements)}</testsuite></testsuites>")
    return read(file)


def calls(text):
    return f"<properties><property name='calls' value='{text}'/></properties>"


FAILED = '<failure message="{}"/>'


@pytest.mark.parametrize(
    ("unfused", "fused", "worse"),
    [
        ("", "", False),
        ("", FAILED, True),
        ("", "<error/>", True),
        ("", "<skipped/>", True),
        ("<skipped/>", "<skipped/>", False),
        ("<skipped/>", "", False),
        (FAILED, "", False),
        (FAILED, FAILED, False),
        (FAILED, "<error/>", True),
    ],
)
def test_a_test_that_does_worse_is_found(tmp_path, unfused, fused, worse):
    found = compare(report(tmp_path, a=unfused), report(tmp_path, a=fused))
    assert found["worse_fused"] == (["tests.f.a"] if worse else [])
    assert bool(found["fail_both_ways"]) == (unfused != "" and fused in (FAILED, "<error/>") and unfused == FAILED)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("no such file", "no such file", True),
        ("no such file", "no such key", False),
        ("object at 0x7f01a", "object at 0x7f02b", True),
        ("lost /tmp/tmpab1/x.bin", "lost /tmp/tmpcd2/x.bin", True),
        ("took 1.25 s", "took 0.75 s", True),
        ("error 1.5e-08", "error 2.25e-07", True),
        ("3 of 4", "2 of 4", False),
    ],
)
def test_messages_of_a_test_that_fails_both_ways_are_compared_but_for_what_passes(tmp_path, one, other, same):
    found = compare(report(tmp_path, a=FAILED.format(one)), report(tmp_path, a=FAILED.format(other)))
    assert found["fail_both_ways"] == ["tests.f.a"]
    assert bool(found["another_message_fused"]) != same


def test_calls_are_added_up_over_the_tests_of_a_file(tmp_path):
    run = report(
        tmp_path,
        a=calls('{"fused": {"lora_linear": 3}, "peft": {"disabled": 2}}'),
        b=calls('{"fused": {"lora_linear": 1, "plus_adapter": 5}, "other": {"lora.layer.Conv2d": 4}}'),
        c=calls('{"peft": {"disabled": 1, "merged": 7}}') + "<skipped/>",
    )
    assert counted(run, run, "tests.f.") == {
        "tests": 3,
        "unfused": {"passed": 2, "skipped": 1},
        "fused": {"passed": 2, "skipped": 1},
        "tests_with_a_fused_call": 2,
        "fused_calls": 4,
        "calls_with_nn_dropout": 5,
        "calls_left_to_peft": {"merged": 7, "disabled": 3},
        "calls_of_other_layers": {"lora.layer.Conv2d": 4},
    }
    assert counted(run, run, "tests.g.")["tests"] == 0


def test_a_file_that_could_not_be_imported_is_an_error_not_a_test_that_fails_both_ways(tmp_path):
    with pytest.raises(RuntimeError, match=r"could not be collected.*tests\.f\.a"):
        report(tmp_path, a='<error message="collection failure"/>')


def test_the_last_run_was_good():
    assert RESULTS["worse_fused"] == [] == list(RESULTS["another_message_fused"])
    assert RESULTS["fused_calls"] >= RESULTS["least_fused_calls"] == 600
    assert RESULTS["gradients"]["fused"] == {"passed": RESULTS["gradients"]["tests"]}


def test_the_page_quotes_the_results():
    page = (ROOT / "docs" / "peft.md").read_text()
    quoted = re.search(r"<!-- suite -->\n(.*?)<!-- /suite -->", page, re.DOTALL).group(1)
    files = RESULTS["files"].values()
    gradients = RESULTS["gradients"]
    numbers = {
        len(files),
        RESULTS["fused_calls"],
        len(RESULTS["fail_both_ways"]),
        gradients["tests"],
        gradients["tests_with_a_fused_call"],
        *(sum(of[key] for of in files) for key in ("tests", "tests_with_a_fused_call", "calls_with_nn_dropout")),
        *(sum(sum(of[key].values()) for of in files) for key in ("calls_left_to_peft", "calls_of_other_layers")),
    }
    assert {int(number.replace(",", "")) for number in re.findall(r"\b\d[\d,]*\b", quoted)} == numbers
