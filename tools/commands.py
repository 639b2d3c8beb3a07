"""Commands that a part of ``make gpu`` runs: output passed on as it comes, and an end when their time is up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# seconds in which pytest may say what it found so far
GRACE_S = 10.0


@dataclass(frozen=True)
class Ended:
    """code: the exit status.  lines: of output, without the empty ones.  timed_out: it was stopped."""

    code: int
    lines: list[str]
    timed_out: bool
    seconds: float

    @property
    def last(self) -> str:
        return self.lines[-1] if self.lines else ""


def run(command: Sequence[str], cwd: Path, limit_s: float, environment: Mapping[str, str] | None = None) -> Ended:
    """Run it for limit_s seconds at most; then it is interrupted, and killed if that does not end it."""
    start, timed_out = time.monotonic(), threading.Event()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=None if environment is None else {**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )

    def stop() -> None:
        timed_out.set()
        _signal(process, signal.SIGINT)

    timers = [threading.Timer(limit_s, stop), threading.Timer(limit_s + GRACE_S, _signal, (process, signal.SIGKILL))]
    for timer in timers:
        timer.daemon = True
        timer.start()
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.strip():
                lines.append(line.strip())
        code = process.wait()
    except BaseException:
        _signal(process, signal.SIGKILL)
        raise
    finally:
        for timer in timers:
            timer.cancel()
    return Ended(code, lines, timed_out.is_set(), time.monotonic() - start)


def _signal(process: subprocess.Popen[str], number: int) -> None:
    """Send the signal to the command and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
