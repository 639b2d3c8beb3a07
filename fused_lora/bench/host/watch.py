"""What a call does: the kernels that it launches and by which way, the descriptors and tensors that it makes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch.profiler import ProfilerActivity, profile
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ..measure import Call


@dataclass
class Seen:
    """Calls of JITFunction.run and of Triton's launcher, each to be repeated as it was; descriptors made."""

    jit_runs: list[Call] = field(default_factory=list)
    launches: list[Call] = field(default_factory=list)
    descriptors: int = 0


@contextlib.contextmanager
def watching() -> Iterator[Seen]:
    """What happens meanwhile."""
    seen, launcher = Seen(), driver.active.launcher_cls
    run, launch, describe = JITFunction.run, launcher.__call__, TensorDescriptor.__post_init__

    def seen_run(*args: Any, **kwargs: Any) -> Any:
        seen.jit_runs.append(partial(run, *args, **kwargs))
        return run(*args, **kwargs)

    def seen_launch(*args: Any) -> Any:
        seen.launches.append(partial(launch, *args))
        return launch(*args)

    def seen_describe(descriptor: TensorDescriptor) -> None:
        seen.descriptors += 1
        describe(descriptor)

    JITFunction.run, launcher.__call__, TensorDescriptor.__post_init__ = seen_run, seen_launch, seen_describe
    try:
        yield seen
    finally:
        JITFunction.run, launcher.__call__, TensorDescriptor.__post_init__ = run, launch, describe


def count(call: Call) -> dict[str, int]:
    """How often a call, not the first of its kind, does what costs the host. operators: calls of the dispatcher."""
    with watching() as seen:
        call()
    # or the profiler announces every recording on stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    return {
        "launches": len(seen.launches),
        "jit_runs": len(seen.jit_runs),
        "descriptors": seen.descriptors,
        "operators": sum(event.name().startswith("fused_lora::") for event in events),
        "allocations": sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events),
    }
