"""Launches by a plan, past Triton's JIT: they pass to the launcher what the JIT would. Over a stub of libcuda."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fused_lora.bench.host import stub

CHECKOUT = Path(__file__).parents[1]
PROCESS = Path(__file__).parent / "helpers" / "planned_launches.py"


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory):
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("the stub of libcuda is compiled by gcc, for Linux")
    folder = tmp_path_factory.mktemp("libcuda")
    stub.compile_library(folder)
    return folder


def run(folder, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_LIBCUDA_PATH": str(folder), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, str(PROCESS), str(folder), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("seed", [0, 1])
def test_a_planned_launch_passes_what_the_jit_would_whatever_changed_before_it(libcuda, seed):
    compared, planned = map(int, run(libcuda, str(seed), "4").split())
    assert compared > 60
    # pointers that are no multiples of 16, and rows that are copied, go through the JIT every time
    assert planned > compared // 2
