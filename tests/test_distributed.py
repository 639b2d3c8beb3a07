"""Many processes on this machine, each check compared with one process: DDP, fully_shard, tensor parallel, checkpoints.

The checks are in distributed_checks.py and beside it. A process group starts once for its size and runs all of them.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import distributed_checks
import pytest


@pytest.mark.parametrize("world", distributed_checks.CHECKS)
def test_every_way_to_spread_training_gives_what_one_process_gives(world, tmp_path):
    environment = {**os.environ, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, distributed_checks.__file__, str(tmp_path)]
    logs = [tmp_path / f"{rank}.log" for rank in range(world)]
    ranks = []
    deadline = time.monotonic() + 280
    try:
        for rank, log in enumerate(logs):
            # a file: a pipe that nobody empties stops its rank, and with it all that wait for that rank
            with log.open("w") as file:
                ranks.append(subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stderr=file))
        for process in ranks:
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pytest.fail("\n".join(f"{log.name}:\n{log.read_text()}" for log in logs))
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    wanted = {function.__name__: None for function in distributed_checks.CHECKS[world]}
    for rank in range(world):
        file = Path(tmp_path, f"{rank}.json")
        assert file.exists(), logs[rank].read_text()
        outcome = json.loads(file.read_text())
        for name, problem in outcome.items():
            assert problem is None, f"rank {rank} of {world}, {name}:\n{problem}"
        assert outcome == wanted
    assert len(wanted) >= 5
