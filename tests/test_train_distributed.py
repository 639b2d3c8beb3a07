"""examples/train_distributed.py under torchrun: a process is killed, and the run ends where it would have ended."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from safetensors.torch import load_file

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_distributed.py"


def torchrun(out, *options):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3",
        str(EXAMPLE), "--out", str(out), "--steps=400", "--save-every=50", "--width=16", "--depth=1", *options,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process):
    """Asks first: torchrun ends its ranks then. They hold the pipe too, and would outlive a torchrun that is killed."""
    process.terminate()
    try:
        process.wait(40)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def lines_of(process):
    watchdog = threading.Timer(480, end, (process,))
    watchdog.start()
    seen = []
    try:
        for line in process.stdout:
            seen.append(line)
            yield line
        assert process.wait() == 0, "".join(seen)
    finally:
        watchdog.cancel()
        end(process)


def adapter(out):
    return load_file(out / "adapter" / "adapter_model.safetensors")


def test_a_run_whose_rank_is_killed_goes_on_from_its_checkpoint_and_ends_the_same(tmp_path):
    victim, killed, starts, output = None, False, [], []
    for line in lines_of(torchrun(tmp_path / "killed", "--strategy=fsdp")):
        output.append(line)
        for found in re.finditer(r"rank (\d) pid (\d+) from step (\d+)", line):
            starts.append(int(found[3]))
            if found[1] == "1" and victim is None:
                victim = int(found[2])
        # not at the line's start alone: two ranks may write into one line
        if "step 100 loss" in line and not killed:
            killed = True
            os.kill(victim, signal.SIGKILL)
    assert killed, "".join(output)
    assert starts[:2] == [0, 0]
    # which rank is found to have failed, and when, is torchrun's: it may have to start the two more than once
    assert len(starts) >= 4, "".join(output)
    assert starts[-2] == starts[-1] >= 100
    losses = [float(found) for found in re.findall(r"\bstep \d+ loss (\d+\.\d{4})", "".join(output))]
    assert losses[-1] < 0.5 * losses[0]

    for _ in lines_of(torchrun(tmp_path / "whole", "--strategy=fsdp")):
        pass
    killed, whole = adapter(tmp_path / "killed"), adapter(tmp_path / "whole")
    assert killed.keys() == whole.keys()
    assert all(bool((killed[name] == whole[name]).all()) for name in whole)
