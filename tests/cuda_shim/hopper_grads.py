"""The adapter gradients of csrc/cuda/hopper on the host, called through ctypes on CPU tensors. As host.py."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int32, c_uint64
from pathlib import Path

from .hopper import INCLUDES, OUTCOMES, BrokenLaunchError
from .host import ARITHMETIC, DEFAULT, SHIM, Gradients, Plan, Turns, compile


def build(folder: Path, source: Path = SHIM / "hopper_grads.cpp", *options: str) -> HopperGradients:
    library = folder / "hopper_grads.so"
    compile(source, library, *INCLUDES, *options, "-fPIC", "-shared")
    return HopperGradients(library)


class HopperGradients:
    """adapter_grad with the operator's contract, on CPU tensors."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.set_turns.argtypes = (c_uint64, c_int32, c_int32)
        self.library.grad_why_not.restype = self.library.why_broken.restype = c_char_p

    def adapter_grad(self, *given, turns=DEFAULT, arithmetic=None):
        asked = Gradients(*given)
        arithmetic, arguments = ARITHMETIC[asked.dtype], ctypes.byref(asked.arguments)
        reason = self.why_not(*given)
        if reason is not None:
            raise ValueError(reason)
        counters = asked.take_scratch(self.plan(asked, turns))
        self.library.set_turns(turns.seed, turns.resident, turns.delayed)
        outcome = self.library.launch_grad(arithmetic, arguments)
        if outcome != 0:
            raise BrokenLaunchError(f"{OUTCOMES.get(outcome, outcome)} {self.library.why_broken().decode()}".strip())
        if counters.any():
            raise BrokenLaunchError("the launch left counters that are not zero")
        return asked.dA, asked.dB

    def plan(self, asked: Gradients, turns: Turns) -> Plan:
        plan = Plan()
        self.library.plan_grad(ctypes.byref(asked.arguments), turns.sms, ctypes.byref(plan))
        return plan

    def why_not(self, *given) -> str | None:
        asked = Gradients(*given)
        reason = self.library.grad_why_not(ARITHMETIC[asked.dtype], ctypes.byref(asked.arguments))
        return None if reason is None else reason.decode()
