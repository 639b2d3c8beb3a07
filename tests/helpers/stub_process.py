"""Processes over a stub of libcuda: Triton looks for its driver once, so each needs an interpreter of its own."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]


def run(script, folder, *arguments):
    """What ``python SCRIPT FOLDER *arguments`` prints. folder: that of the stub, see the fixture ``libcuda``."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_LIBCUDA_PATH": str(folder), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, str(HERE / script), str(folder), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
