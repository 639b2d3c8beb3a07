"""The extension's CPU code under AddressSanitizer and UndefinedBehaviorSanitizer, over fuzzed operands.

python tests/sanitize.py [pytest arguments]
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers.native_build import ROOT, build

TESTS = ("tests/test_native_fuzz.py", "tests/test_native_autograd.py")


def runtime(name: str) -> str:
    found = subprocess.run(["g++", f"-print-file-name={name}"], text=True, capture_output=True, check=True)
    return found.stdout.strip()


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder), FUSED_LORA_SANITIZE="1")
        # Python isn't sanitized, so the runtimes must be there before it; libstdc++, so that exceptions are seen thrown
        environment = {
            **os.environ,
            "FUSED_LORA_TEST_LIBRARY": str(library),
            "LD_PRELOAD": " ".join(map(runtime, ("libasan.so", "libubsan.so", "libstdc++.so"))),
            # Python never frees what it keeps to the end
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        }
        arguments = sys.argv[1:] or ["-k", "not compiled and not second"]
        # an extension that is built in the tree must not be loaded too: operators can be registered once
        run = "import sys; sys.modules['fused_lora._C'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
        options = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
        command = [sys.executable, "-c", run, *options, *TESTS, *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
