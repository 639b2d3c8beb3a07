"""Building the optional extension for the tests, outside the tree."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def setup_py(*arguments, folder=ROOT, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "FUSED_LORA_BUILD_EXT"}
    command = [sys.executable, "setup.py", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=folder,
        env={**inherited, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def build(folder: Path, **environment) -> Path:
    """The extension's library, built into ``folder`` by the first process that comes, for all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (libraries := list(folder.glob("fused_lora/_C*.so"))):
            folders = ("--build-lib", folder, "--build-temp", folder / "objects")
            made = setup_py("build_ext", *folders, FUSED_LORA_BUILD_EXT="1", **environment)
            assert made.returncode == 0, made.stdout
            libraries = list(folder.glob("fused_lora/_C*.so"))
    (library,) = libraries
    return library
