"""Many processes on this machine, each check compared with one process: DDP, fully_shard, tensor parallel, checkpoints.

The checks are in distributed_checks.py. A process group starts once for its size and runs all of them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import distributed_checks
import pytest


@pytest.mark.parametrize("world", distributed_checks.CHECKS)
def test_every_way_to_spread_training_gives_what_one_process_gives(world, tmp_path):
    environment = {**os.environ, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, distributed_checks.__file__, str(tmp_path)]
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    errors = []
    try:
        for process in ranks:
            errors.append(process.communicate(timeout=300)[1])
    finally:
        for process in ranks:
            process.kill()
    wanted = {function.__name__: None for function in distributed_checks.CHECKS[world]}
    for rank in range(world):
        file = Path(tmp_path, f"{rank}.json")
        assert file.exists(), errors[rank]
        outcome = json.loads(file.read_text())
        for name, problem in outcome.items():
            assert problem is None, f"rank {rank} of {world}, {name}:\n{problem}"
        assert outcome == wanted
    assert len(wanted) >= 5
