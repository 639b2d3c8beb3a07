"""What a call does: kernels that it launches and by which way, descriptors and tensors that it makes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch.profiler import ProfilerActivity, profile
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

Call = Callable[[], object]


@dataclass
class Seen:
    """jits, launches: of JITFunction.run and of Triton's launcher, each to be repeated as it was; descriptors made."""

    jits: list[Call] = field(default_factory=list)
    launches: list[Call] = field(default_factory=list)
    descriptors: int = 0


@contextlib.contextmanager
def watching() -> Iterator[Seen]:
    """Watch what is called meanwhile."""
    seen, launcher = Seen(), driver.active.launcher_cls
    run, launch, described = JITFunction.run, launcher.__call__, TensorDescriptor.__post_init__

    def watched_run(*args: Any, **kwargs: Any) -> Any:
        seen.jits.append(partial(run, *args, **kwargs))
        return run(*args, **kwargs)

    def watched_launch(*args: Any) -> Any:
        seen.launches.append(partial(launch, *args))
        return launch(*args)

    def watched_described(descriptor: TensorDescriptor) -> None:
        seen.descriptors += 1
        described(descriptor)

    JITFunction.run, launcher.__call__, TensorDescriptor.__post_init__ = watched_run, watched_launch, watched_described
    try:
        yield seen
    finally:
        JITFunction.run, launcher.__call__, TensorDescriptor.__post_init__ = run, launch, described


def structure(call: Call) -> dict[str, int]:
    """How often a call that is not the first of its kind does what costs the host."""
    with watching() as seen:
        call()
    return {
        "launches": len(seen.launches),
        "jit_runs": len(seen.jits),
        "descriptors": seen.descriptors,
        "allocations": allocations(call),
    }


def allocations(call: Call) -> int:
    """Tensors whose memory PyTorch's allocator gave during the call."""
    # or the profiler announces every recording on stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    return sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)
