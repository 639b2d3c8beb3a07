"""What two runs of PEFT's tests say, read from their junit reports and set side by side."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from xml.etree import ElementTree

# what differs from run to run: addresses, temporary paths, times and other measured numbers
PASSING = re.compile(r"0x[0-9a-f]+|/(tmp|var)/[^\s'\")]*|\b\d+\.\d+(e[+-]?\d+)?")


@dataclass(frozen=True)
class Test:
    outcome: str  # "passed", "skipped", "failure" or "error"
    message: str
    calls: dict[str, dict[str, int]]


def read(report):
    """{name: Test} of the junit report at path ``report``; RuntimeError where a file could not be imported."""
    cases = ElementTree.parse(report).iter("testcase")
    found = {f"{case.get('classname')}.{case.get('name')}": _test(case) for case in cases}
    lost = [name for name, test in found.items() if test.message == "collection failure"]
    if lost:
        raise RuntimeError(f"tests could not be collected, is '.[peft-suite]' installed? {lost}")
    return found


def _test(case):
    bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
    calls = case.find("properties/property[@name='calls']")
    return Test(
        "passed" if bad is None else bad.tag,
        "" if bad is None else PASSING.sub("…", bad.get("message") or ""),
        {} if calls is None else json.loads(calls.get("value")),
    )


def compare(unfused, fused):
    """Tests that do worse fused, that fail both ways with another message, and all that fail both ways."""
    both = {name for name in unfused.keys() & fused.keys() if failed(unfused[name]) and failed(fused[name])}
    return {
        "worse_fused": sorted(
            name for name, test in fused.items()
            if test.outcome != "passed" and (name not in unfused or test.outcome != unfused[name].outcome)
        ),
        "another_message_fused": {
            name: [unfused[name].message, fused[name].message]
            for name in sorted(both) if unfused[name].message != fused[name].message
        },
        "fail_both_ways": sorted(both),
    }  # fmt: skip


def failed(test):
    return test.outcome in ("failure", "error")


def counted(unfused, fused, prefix=""):
    """Outcomes both ways and calls of the fused run, of the tests whose names begin with ``prefix``."""
    unfused, fused = ([test for name, test in run.items() if name.startswith(prefix)] for run in (unfused, fused))
    calls = {sort: Counter() for sort in ("fused", "peft", "other")}
    for test in fused:
        for sort, counts in test.calls.items():
            calls[sort].update(counts)
    return {
        "tests": len(fused),
        "unfused": dict(Counter(test.outcome for test in unfused)),
        "fused": dict(Counter(test.outcome for test in fused)),
        "tests_with_a_fused_call": sum("lora_linear" in test.calls.get("fused", ()) for test in fused),
        "fused_calls": calls["fused"]["lora_linear"],
        "calls_with_nn_dropout": calls["fused"]["plus_adapter"],
        "calls_left_to_peft": dict(calls["peft"].most_common()),
        "calls_of_other_layers": dict(calls["other"].most_common()),
    }
