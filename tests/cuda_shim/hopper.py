"""Hopper's kernels of csrc/cuda/hopper on the host, called through ctypes on CPU tensors. As host.py."""

from __future__ import annotations

import ctypes
import math
from ctypes import c_char_p, c_int32, c_int64, c_uint64
from pathlib import Path

import torch

from .host import ARITHMETIC, CSRC, DEFAULT, SHIM, DropoutArguments, LoraMatmulArguments, Matrix, compile

INCLUDES = ("-march=native", f"-I{CSRC / 'hopper'}")
OUTCOMES = {1: "threads wait for what never comes", 2: "too much shared memory", 3: "broken"}


class HopperPlan(ctypes.Structure):
    _fields_ = (
        ("publishes", c_int32), ("columns", c_int32), ("ranks", c_int32), ("blocks", c_int32), ("counters", c_int32),
        ("slot_floats", c_int64), ("u_copy", c_int64), ("v_copy", c_int64),
    )  # fmt: skip


class BrokenLaunchError(Exception):
    """A launch hangs, does what the hardware does not define, or leaves its counters used."""


def build(folder: Path, source: Path = SHIM / "hopper_library.cpp", *options: str) -> HopperKernels:
    library = folder / "hopper.so"
    compile(source, library, *INCLUDES, "-fPIC", "-shared", *options)
    return HopperKernels(library)


class HopperKernels:
    """lora_matmul with the operator's contract, on CPU tensors."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.set_turns.argtypes = (c_uint64, c_int32, c_int32)
        self.library.sizes.restype = c_int64
        self.library.work_of.argtypes = (*(3 * [c_int64]), *(3 * [c_int32]), c_int32 * 3)
        self.library.matmul_why_not.restype = self.library.why_broken.restype = c_char_p
        for which, structure in enumerate((HopperPlan, LoraMatmulArguments)):
            assert self.library.sizes(which) == ctypes.sizeof(structure)

    def lora_matmul(
        self, a, w, u, v, bias, scale, seed, dropout_p, dropout_on_output, turns=DEFAULT, arithmetic=None
    ):  # fmt: skip
        a2 = a.reshape(math.prod(a.shape[:-1]), a.shape[-1])
        (M, Q), P, R = a2.shape, w.shape[1], u.shape[1]
        arithmetic = ARITHMETIC[a.dtype] if arithmetic is None else arithmetic
        out, h = a.new_empty((*a.shape[:-1], P)), a.new_empty((M, R))
        arguments = LoraMatmulArguments(
            M, P, Q, R, *(Matrix.of(operand, a.dtype) for operand in (a2, w, u, v)),
            None if bias is None else bias.data_ptr(), scale, dropout_on_output, DropoutArguments.of(seed, dropout_p),
            out.data_ptr(), h.data_ptr(),
        )  # fmt: skip
        reason = self.why_not(arithmetic, arguments)
        if reason is not None:
            raise ValueError(reason)
        plan = self.plan(arithmetic, arguments, turns)
        # aligned to 16 bytes by torch
        slots, counters = torch.empty(plan.slot_floats), torch.zeros(plan.counters, dtype=torch.int32)
        arguments.slots, arguments.counters = slots.data_ptr(), counters.data_ptr()
        self.library.set_turns(turns.seed, turns.resident, turns.delayed)
        outcome = self.library.launch_matmul(arithmetic, ctypes.byref(plan), ctypes.byref(arguments))
        if outcome != 0:
            raise BrokenLaunchError(f"{OUTCOMES.get(outcome, outcome)} {self.library.why_broken().decode()}".strip())
        if counters.any():
            raise BrokenLaunchError("the launch left counters that are not zero")
        return out, h

    def plan(self, arithmetic, arguments, turns):
        plan = HopperPlan()
        self.library.plan_matmul(arithmetic, ctypes.byref(arguments), turns.sms, ctypes.byref(plan))
        return plan

    def schedule(self, M, P, R, columns, publishes):
        """(row, column, block) of every ticket, in their order."""
        work, works = (c_int32 * 3)(), []
        count = self.library.work_of(M, P, R, columns, publishes, 0, work)
        for ticket in range(count):
            self.library.work_of(M, P, R, columns, publishes, ticket, work)
            works.append(tuple(work))
        return works

    def why_not(self, arithmetic, arguments):
        reason = self.library.matmul_why_not(arithmetic, ctypes.byref(arguments))
        return None if reason is None else reason.decode()
