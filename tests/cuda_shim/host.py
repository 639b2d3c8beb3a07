"""The CUDA kernels of csrc/cuda on the host: built by g++ against the shim, called through ctypes on CPU tensors."""

from __future__ import annotations

import ctypes
import math
import subprocess
from ctypes import c_float, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch

from fused_lora.dropout import dropout_threshold, keep_scale

SHIM = Path(__file__).parent
CSRC = SHIM.parents[1] / "csrc" / "cuda"
COMPILE = [
    "g++",
    "-std=c++17",
    "-O2",
    "-U_FORTIFY_SOURCE",
    # each library has a machine of its own
    "-fno-gnu-unique",
    "-Wall",
    "-Wno-unknown-pragmas",
    f"-I{SHIM}",
    f"-I{CSRC / 'kernels'}",
]
BFLOAT16, HALF, EXACT, TF32 = range(4)
ARITHMETIC = {torch.bfloat16: BFLOAT16, torch.float16: HALF, torch.float32: EXACT}


class Plan(ctypes.Structure):
    _fields_ = (("small_m", c_int32), ("split", c_int32), ("counters", c_int32), ("slot_floats", c_int64))


class Matrix(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("stride_0", c_int64), ("stride_1", c_int64), ("is_float32", c_int32))

    @classmethod
    def of(cls, tensor, base):
        """As the launch reads it: only float32 over a 16-bit base is converted on the way."""
        return cls(tensor.data_ptr(), *tensor.stride(), tensor.dtype == torch.float32 != base)


class DropoutArguments(ctypes.Structure):
    _fields_ = (("seed", c_void_p), ("threshold", c_int32), ("keep_scale", c_float))

    @classmethod
    def of(cls, seed, p):
        return cls(None if seed is None else seed.data_ptr(), dropout_threshold(p), keep_scale(p))


class LoraMatmulArguments(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in "MPQR"), *((name, Matrix) for name in "awuv"),
        ("bias", c_void_p), ("scale", c_float), ("dropout_on_output", c_int32), ("dropout", DropoutArguments),
        ("out", c_void_p), ("h", c_void_p), ("slots", c_void_p), ("counters", c_void_p), ("split", c_int32),
    )  # fmt: skip


class Reduction(ctypes.Structure):
    _fields_ = (
        ("wide", Matrix), ("low", Matrix), ("columns", c_int64), ("has_dropout", c_int32),
        ("out", c_void_p), ("stride_r", c_int64), ("stride_column", c_int64), ("out_is_float32", c_int32),
    )  # fmt: skip


class AdapterGradArguments(ctypes.Structure):
    _fields_ = (
        ("M", c_int64), ("R", c_int64), ("dA", Reduction), ("dB", Reduction), ("scale", c_float),
        ("dropout", DropoutArguments), ("slots", c_void_p), ("counters", c_void_p), ("split", c_int32),
    )  # fmt: skip


class Gradients:
    """A call of adapter_grad: its results, still empty, and what a launch is told."""

    def __init__(self, x, g, dy, h, scale, seed, dropout_p, dtype_A, dtype_B) -> None:
        pairs = [(None if wide is None else _rows(wide), low) for wide, low in ((x, g), (dy, h))]
        low = next(low for _, low in pairs if low is not None)
        (M, R), self.dtype = low.shape, low.dtype
        K, N = (0 if wide is None else wide.shape[1] for wide, _ in pairs)
        self.dA = None if x is None else low.new_empty((R, K), dtype=dtype_A)
        self.dB = None if dy is None else low.new_empty((N, R), dtype=dtype_B)
        reductions = [
            Reduction()
            if wide is None
            else Reduction(
                Matrix.of(wide, self.dtype), Matrix.of(low, self.dtype), wide.shape[1], out is self.dA, out.data_ptr(),
                *(out.stride() if out is self.dA else out.stride()[::-1]), out.dtype == torch.float32,
            )
            for (wide, low), out in zip(pairs, (self.dA, self.dB), strict=True)
        ]  # fmt: skip
        self.arguments = AdapterGradArguments(M, R, *reductions, scale, DropoutArguments.of(seed, dropout_p))
        # the arguments hold addresses
        self._alive = (pairs, seed)

    def take_scratch(self, plan):
        slots, counters = self._scratch = _scratch(plan)
        self.arguments.slots, self.arguments.counters = slots.data_ptr(), counters.data_ptr()
        self.arguments.split = plan.split
        return counters


@dataclass(frozen=True)
class Turns:
    """As in fibers.h. sms: what the plan takes the GPU to have."""

    seed: int = 1
    resident: int = 4
    delayed: int = 0
    sms: int = 2


DEFAULT = Turns()


def compile(source: Path, output: Path, *options: str) -> None:
    made = subprocess.run([*COMPILE, *options, "-o", output, "-x", "c++", source], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


class Kernels:
    """lora_matmul and adapter_grad with the operators' contract, on CPU tensors."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.set_turns.argtypes = (c_uint64, c_int32, c_int32)
        self.library.plan_matmul.argtypes = self.library.plan_grad.argtypes = (
            c_int32, c_int64, c_int64, c_int64, c_int64, c_int32, ctypes.POINTER(Plan),
        )  # fmt: skip
        self.library.sizes.restype = c_int64
        for which, structure in enumerate((Plan, LoraMatmulArguments, AdapterGradArguments)):
            assert self.library.sizes(which) == ctypes.sizeof(structure)

    def lora_matmul(
        self, a, w, u, v, bias, scale, seed, dropout_p, dropout_on_output, turns=DEFAULT, arithmetic=None
    ):  # fmt: skip
        a2 = _rows(a)
        (M, Q), P, R = a2.shape, w.shape[1], u.shape[1]
        arithmetic = ARITHMETIC[a.dtype] if arithmetic is None else arithmetic
        out, h = a.new_empty((*a.shape[:-1], P)), a.new_empty((M, R))
        plan = self.plan("plan_matmul", arithmetic, M, P, Q, R, turns)
        slots, counters = _scratch(plan)
        arguments = LoraMatmulArguments(
            M, P, Q, R, *(Matrix.of(operand, a.dtype) for operand in (a2, w, u, v)),
            None if bias is None else bias.data_ptr(), scale, dropout_on_output, DropoutArguments.of(seed, dropout_p),
            out.data_ptr(), h.data_ptr(), slots.data_ptr(), counters.data_ptr(), plan.split,
        )  # fmt: skip
        if math.prod(out.shape) > 0:
            failed = self.library.launch_matmul(arithmetic, ctypes.byref(plan), ctypes.byref(arguments))
            _finished(failed, counters)
        return out, h

    def adapter_grad(
        self, x, g, dy, h, scale, seed, dropout_p, dtype_A, dtype_B, turns=DEFAULT, arithmetic=None
    ):  # fmt: skip
        asked = Gradients(x, g, dy, h, scale, seed, dropout_p, dtype_A, dtype_B)
        arguments = asked.arguments
        arithmetic = ARITHMETIC[asked.dtype] if arithmetic is None else arithmetic
        sizes = (arguments.M, arguments.dA.columns, arguments.dB.columns, arguments.R)
        counters = asked.take_scratch(self.plan("plan_grad", arithmetic, *sizes, turns))
        if (arguments.dA.columns + arguments.dB.columns) * arguments.R > 0:
            _finished(self.library.launch_grad(arithmetic, ctypes.byref(arguments)), counters)
        return asked.dA, asked.dB

    def plan(self, function, arithmetic, *sizes_and_turns):
        *sizes, turns = sizes_and_turns
        self.library.set_turns(turns.seed, turns.resident, turns.delayed)
        plan = Plan()
        getattr(self.library, function)(arithmetic, *sizes, turns.sms, ctypes.byref(plan))
        return plan


def _rows(tensor):
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _scratch(plan):
    return torch.empty(plan.slot_floats), torch.zeros(plan.counters, dtype=torch.int32)


def _finished(failed, counters):
    assert failed == 0, {1: "threads wait for what never comes", 2: "too much shared memory"}[failed]
    assert not counters.any(), "the launch left counters that are not zero"
