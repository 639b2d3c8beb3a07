"""Run PEFT's own LoRA tests unfused and fused, and our check of gradients over its models: what fusing breaks, and
how much of it the tests would notice.

    python tests/peft_suite/run.py [--out results.json]

The tests come from the source distribution of the PEFT that is installed, and need ``pip install -e '.[peft-suite]'``.
They run offline, on small models with drawn weights in the hub's place; tests that want more of the hub fail both ways.

Exit status 1: a test does worse fused than unfused or fails with another message, our own check fails, or there are
fewer than LEAST_FUSED fused calls.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import hub
from outcomes import compare, counted, read

HERE = Path(__file__).parent
DEFAULT_OUT = HERE / "results.json"
LEAST_FUSED = 600
FILES = (
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_initialization.py",
    "test_seq_classifier.py",
    "test_tuners_utils.py",
)


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


def run(folder, workers, *arguments):
    """{name: Test} of a run of pytest in ``folder``."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    path = os.pathsep.join([str(HERE), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {
        "PYTHONPATH": path, "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "plugin", "-p", "no:cacheprovider"]
    command += ["--rootdir", folder, "-n", workers, f"--junitxml={report}", *arguments]
    # a failed test is a result; what a failed run leaves unwritten is an error below
    subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    return read(report)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--workers", default="auto", help="processes (default: one for each core)")
    arguments = parser.parse_args()
    began = time.perf_counter()
    version = importlib.metadata.version("peft")
    files = [f"tests/{file}" for file in FILES]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fetch_tests(version, folder)
        hub.fill(folder / "hub")
        print(f"PEFT {version}, {len(FILES)} files: unfused ...", flush=True)
        unfused = run(folder, arguments.workers, *files)
        print("fused ...", flush=True)
        fused = run(folder, arguments.workers, *files, "--fuse")
        print("gradients ...", flush=True)
        gradients = run(folder, arguments.workers, str(HERE / "gradients.py"), "--fuse")
    compared = compare(unfused, fused)
    per_file = {file: counted(unfused, fused, f"tests.{file.removesuffix('.py')}.") for file in FILES}
    fused_calls = sum(of["fused_calls"] for of in per_file.values())
    own = counted({}, gradients)
    results = {
        "versions": {of: importlib.metadata.version(of) for of in ("peft", "torch", "transformers")},
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "least_fused_calls": LEAST_FUSED,
        "fused_calls": fused_calls,
        "files": per_file,
        # its calls of PEFT's layers are mostly those of the unfused twins
        "gradients": {of: own[of] for of in ("tests", "fused", "tests_with_a_fused_call", "fused_calls")},
        **compared,
    }
    arguments.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(results, indent=1, ensure_ascii=False))
    wrong = compared["worse_fused"] or compared["another_message_fused"] or fused.keys() != unfused.keys()
    unsound = own["fused"].keys() != {"passed"} or not own["fused_calls"]
    sys.exit(1 if wrong or unsound or fused_calls < LEAST_FUSED else 0)


if __name__ == "__main__":
    main()
