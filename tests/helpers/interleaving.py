"""Runs the programs of a launch side by side in Triton's interpreter, and finds races between them.

The interpreter runs one program after the other, so a wait never waits and whoever forgets to wait is still right. Here
each program runs in a thread of its own, one at a time, and may have to hand over at every atomic, as a seed draws; at
most so many as are resident have begun and not ended, and they begin in any order.

What happens before what is told by vector clocks, the way of FastTrack (Flanagan and Freund, PLDI 2009). A program is
two threads: its leader, which makes atomics and scalar stores, and the others, which make everything else; a barrier
joins the two. Two accesses to one address, one of them a write, are a race unless one happens before the other: by
program order, by barriers, or by an acquire that reads from a release.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
import threading
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pytest
import triton.language as tl  # noqa: F401  # the interpreter looks for it among the globals of what it calls
from triton.runtime import interpreter

BUILDER = interpreter.interpreter_builder
LOAD, STORE, ATOMIC = "load", "store", "atomic"
# handovers before a launch whose programs still wait counts as stuck
PATIENCE = 20_000


class StuckError(Exception):
    """Programs wait for what will never come."""


class Access(NamedTuple):
    kind: str
    thread: int
    clock: np.ndarray
    addresses: np.ndarray


@dataclass
class Launch:
    """One launch: its programs, who of them runs, what each knows of the others, and what memory they touched."""

    random: random.Random
    resident: int
    programs: list = field(default_factory=list)
    accesses: list[Access] = field(default_factory=list)
    clocks: np.ndarray | None = None  # (threads, threads): of each thread, the time of each that it knows
    released: dict = field(default_factory=dict)  # address: what an acquire of it learns

    def run(self):
        threads = 2 * len(self.programs)
        self.clocks = np.eye(threads, dtype=np.int64)
        waiting = self.random.sample(self.programs, len(self.programs))
        begun = []
        for _ in range(PATIENCE):
            while waiting and len(begun) < self.resident:
                begun.insert(0, waiting.pop())
            if not begun:
                return
            # one runs on until it is put last: so one is left far behind, and another goes far ahead
            program = begun[0]
            program.step()
            if self.random.random() < 0.3:
                begun.append(begun.pop(0))
            if program.ended:
                begun.remove(program)
                if program.error is not None:
                    self.abandon()
                    raise program.error
        self.abandon()
        raise StuckError(f"{len(begun)} programs wait for each other, {len(waiting)} have not begun")

    def abandon(self):
        for program in self.programs:
            if program.thread.is_alive():
                program.abandoned = True
                program.turn.release()
                program.thread.join()

    def touch(self, kind, thread, addresses):
        self.accesses.append(Access(kind, thread, self.clocks[thread].copy(), addresses))

    def barrier(self, program):
        leader, others = 2 * program.number, 2 * program.number + 1
        self.clocks[[leader, others]] = np.maximum(self.clocks[leader], self.clocks[others])
        self.clocks[leader, leader] += 1
        self.clocks[others, others] += 1

    def atomic(self, program, address, order):
        leader = 2 * program.number
        known = self.clocks[leader]
        released = self.released.setdefault(address, np.zeros_like(known))
        if "ACQUIRE" in order:
            np.maximum(known, released, out=known)
        self.touch(ATOMIC, leader, np.array([address]))
        if "RELEASE" in order:
            np.maximum(released, known, out=released)
            known[leader] += 1

    def races(self) -> list[str]:
        """What kinds of accesses to one address are in no order."""
        written = np.unique(np.concatenate([a.addresses for a in self.accesses if a.kind != LOAD]))
        shape = (len(written), len(self.clocks))
        # when each thread last made each kind of access to each address
        times = {kind: np.zeros(shape, dtype=np.int64) for kind in (LOAD, STORE, ATOMIC)}
        conflicts = {LOAD: (STORE, ATOMIC), STORE: (LOAD, STORE, ATOMIC), ATOMIC: (LOAD, STORE)}
        found = {}
        for access in self.accesses:
            places = np.searchsorted(written, access.addresses)
            places = places[np.take(written, places, mode="clip") == access.addresses]
            for other in conflicts[access.kind]:
                unordered = (times[other][places] > access.clock).any(1)
                if unordered.any():
                    found[other, access.kind] = f"{other} and {access.kind} of one address, in no order"
            times[access.kind][places, access.thread] = access.clock[access.thread]
        return list(found.values())


class Program:
    """One program of a launch, in a thread that runs only while it has the turn."""

    def __init__(self, launch, number, index, body):
        self.launch, self.number, self.index = launch, number, index
        self.turn, self.back = threading.Semaphore(0), threading.Semaphore(0)
        self.ended, self.abandoned, self.error = False, False, None
        self.thread = threading.Thread(target=self._run, args=(body,), daemon=True)

    def step(self):
        """Run on to the next atomic, or to the end."""
        BUILDER.current, BUILDER.grid_idx = self, self.index
        if not self.thread.is_alive():
            self.thread.start()
        self.turn.release()
        self.back.acquire()

    def hand_over(self):
        self.back.release()
        self.turn.acquire()
        if self.abandoned:
            raise StuckError

    def _run(self, body):
        self.turn.acquire()
        try:
            body()
        except BaseException as error:
            self.error = error
        self.ended = True
        self.back.release()


@contextlib.contextmanager
def interleaved(seed: int, resident: int):
    """Launches inside run so; yields them, each a :class:`Launch` with its accesses."""
    launches: list[Launch] = []
    order = random.Random(seed)

    class Interleaved(interpreter.GridExecutor):
        def __init__(self, fn, *args, **kwargs):
            super().__init__(fn, *args, **kwargs)
            launches.append(Launch(order, resident))

            # called for every program in turn: they run when the last is there
            @functools.wraps(fn)
            def collect(**arguments):
                launch = launches[-1]
                body = functools.partial(fn, **arguments)
                launch.programs.append(Program(launch, len(launch.programs), BUILDER.grid_idx, body))
                if len(launch.programs) == np.prod(BUILDER.grid_dim):
                    launch.run()

            collect.__signature__ = inspect.signature(fn)
            self.fn = collect

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "GridExecutor", Interleaved)
        patch.setattr(BUILDER, "current", None, raising=False)
        _watch(patch)
        yield launches


def _watch(patch):
    def watched(name):
        original = getattr(BUILDER, name)
        return lambda watch: patch.setattr(BUILDER, name, functools.partial(watch, original))

    @watched("create_masked_load")
    def load(original, ptrs, mask, *rest):
        program = BUILDER.current
        program.launch.touch(LOAD, 2 * program.number + 1, _touched(ptrs, mask))
        return original(ptrs, mask, *rest)

    @watched("create_masked_store")
    def store(original, ptrs, value, mask, *rest):
        program = BUILDER.current
        scalar = ptrs.data.size == 1
        program.launch.touch(STORE, 2 * program.number + (0 if scalar else 1), _touched(ptrs, mask))
        return original(ptrs, value, mask, *rest)

    @watched("create_atomic_rmw")
    def atomic(original, operation, ptr, value, mask, order, scope):
        program = BUILDER.current
        program.hand_over()
        assert ptr.data.size == 1, "an atomic of a whole block is not modelled"
        result = original(operation, ptr, value, mask, order, scope)
        program.launch.atomic(program, int(ptr.data.item()), order.name)
        return result

    @watched("create_barrier")
    def barrier(original):
        program = BUILDER.current
        program.launch.barrier(program)
        return original()


def _touched(ptrs, mask):
    addresses, mask = np.broadcast_arrays(ptrs.data, mask.data)
    return addresses[mask.astype(bool)].astype(np.int64)
