"""Run PEFT's own LoRA tests for custom models, unfused and fused: fusing must break none of them.

    python tests/peft_suite/run.py [--out results.json]

The tests come from the source distribution of the PEFT that is installed. They need ``pip install -e '.[peft-suite]'``.
Exit status 1: a test does worse fused than unfused, or nothing was fused at all.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import torch

HERE = Path(__file__).parent
DEFAULT_OUT = HERE / "results.json"
TESTS = "test_custom_models.py"


def fetch_tests(version, folder):
    """PEFT's tests as a package in ``folder``."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*pip, "--dest", folder, f"peft=={version}"], check=True)
    (archive,) = folder.glob("peft-*.tar.gz")
    with tarfile.open(archive) as tar:
        prefix = f"peft-{version}/tests/"
        tar.extractall(folder, [m for m in tar if m.name.startswith(prefix)], filter="data")
    (folder / prefix).rename(folder / "tests")
    (folder / "tests" / "__init__.py").touch()


def run(folder, workers, *options):
    """{test: outcome} and the number of fused calls."""
    report, calls = folder / "report.xml", folder / "calls"
    environment = os.environ | {"PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "plugin", "-p", "no:cacheprovider", "-n", workers]
    command += [f"--junitxml={report}", f"--calls={calls}", *options, f"tests/{TESTS}"]
    # a failed test is a result; what a failed run leaves unwritten is an error below
    subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    outcomes = {
        f"{case.get('classname')}.{case.get('name')}": next(
            (child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed"
        )
        for case in ElementTree.parse(report).iter("testcase")
    }
    return outcomes, int(calls.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--workers", default="auto", help="processes (default: one for each core)")
    arguments = parser.parse_args()
    version = importlib.metadata.version("peft")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fetch_tests(version, folder)
        print(f"PEFT {version}, {TESTS}: unfused ...", flush=True)
        unfused, _ = run(folder, arguments.workers)
        print("fused ...", flush=True)
        fused, calls = run(folder, arguments.workers, "--fuse")
    broken = sorted(test for test, outcome in fused.items() if outcome not in ("passed", unfused.get(test)))
    results = {
        "peft": version,
        "torch": torch.__version__,
        "tests": TESTS,
        "unfused": dict(Counter(unfused.values())),
        "fused": dict(Counter(fused.values())),
        "fused_calls": calls,
        "worse_fused": broken,
        "fail_unfused": sorted(test for test, outcome in unfused.items() if outcome in ("failure", "error")),
    }
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    sys.exit(1 if broken or not calls or fused.keys() != unfused.keys() else 0)


if __name__ == "__main__":
    main()
