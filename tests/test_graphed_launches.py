"""CUDA graphs of plans, as far as a machine without a GPU shows them: a simulated one, over a stub of libcuda."""

import json

import pytest
import stub_process

pytest.importorskip("triton")

from graphed_launches import CHECKS


@pytest.fixture(scope="module")
def failed(libcuda):
    return json.loads(stub_process.run("graphed_launches.py", libcuda))


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_the_simulated_gpu_shows(check, failed):
    assert check not in failed, failed[check]
