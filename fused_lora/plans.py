"""Calls of ``lora_linear`` like one before: a look stands for all that was checked and chosen then.

What a check or a choice depends on is compared, exactly: kinds, layouts, shapes, strides, dtypes and devices of all
operands, which of them want gradients, grad mode, dropout, ``impl``, autocast, the precision of float32 products, and
whether a mode, a transform or a tracer watches. Values of tensors are no part of it, nor is scale.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, is_grad_enabled

from .torch_internals import (
    FORWARD_AD,
    GUARDS_PROBLEM,
    Guard,
    allows_tf32,
    autocast_dtype,
    dispatch_modes,
    guard,
    in_forward_ad,
    in_functorch,
    is_tracing,
)

Value = TypeVar("Value")


class Cache(Generic[Value]):
    """For threads at once. It holds so many entries, and gives up the oldest for a new one."""

    def __init__(self, most: int) -> None:
        self._entries: dict[Hashable, Value] = {}
        self._most, self._lock = most, threading.Lock()
        # a dict's own get, which needs no lock: a call of a layer asks it
        self.get = self._entries.get

    def put(self, key: Hashable, value: Value) -> Value:
        """Returns the value."""
        with self._lock:
            if key not in self._entries and len(self._entries) >= self._most:
                del self._entries[next(iter(self._entries))]
            self._entries[key] = value
        return value

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


# of (x, weight, lora_A, lora_B, bias, scale, seed, keeps_h), which returns (y, h)
Forward = Callable[..., tuple[Tensor, Tensor | None]]
# of (x, g, dy, h, scale, seed), which returns (dA, dB)
Gradients = Callable[..., tuple[Tensor | None, Tensor | None]]


class Planner(Protocol):
    """What of a backend makes plans. ``backends.Backend`` says what is computed."""

    def plan(
        self, a: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None,
        seed: Tensor | None, dropout_p: float, is_input_gradient: bool, /,
    ) -> Forward | None:  # fmt: skip
        """Of ``lora_matmul``; None where every call is to be looked at anew. A plan takes weight, lora_A and lora_B (in
        an input gradient lora_B before lora_A) as they are, not transposed."""

    def adapter_grad_plan(
        self, x: Tensor | None, g: Tensor | None, dy: Tensor | None, h: Tensor | None,
        seed: Tensor | None, dropout_p: float, dtype_A: torch.dtype, dtype_B: torch.dtype, /,
    ) -> Gradients:  # fmt: skip
        """Of ``adapter_grad``."""


class CallPlan:
    """What is known of calls like one.

    impl: the backend that computes.  planner: what of it makes plans, if anything does.
    drops: whether there is a dropout mask to draw.  trains: whether a gradient is wanted.
    forward: the backend's own plan of the forward; None before there is one, and where it makes none.
    """

    __slots__ = ("_autocast", "_gradients", "_tf32", "drops", "forward", "impl", "planner", "settled", "trains")

    def __init__(self, x: Tensor, impl: str, planner: Planner | None, drops: bool, trains: bool) -> None:
        self.impl, self.planner, self.drops, self.trains = impl, planner, drops, trains
        self.forward: Forward | None = None
        self._gradients: tuple[tuple[Guard, tuple[bool, ...], GradientPlans], ...] = ()
        self._tf32 = allows_tf32() if x.dtype == torch.float32 else None
        # whether autocast is on, the guard knows; to which dtype, it does not
        self._autocast = autocast_dtype(x.device)
        # whether a guard says all
        self.settled = self._tf32 is None and self._autocast is None

    def holds(self, x: Tensor) -> bool:
        """Of what no guard knows."""
        return self._precision_holds() and (self._autocast is None or self._autocast == autocast_dtype(x.device))

    def _precision_holds(self) -> bool:
        return self._tf32 is None or self._tf32 == allows_tf32()

    def gradients(
        self, wanted: tuple[bool, ...], operands: tuple[Tensor, ...], *, new: bool = False
    ) -> GradientPlans | None:  # fmt: skip
        """The plans of a backward with operands like these; None where forward has none, or where the precision is
        another by now.

        operands: all that the backward reads.  wanted: which gradients.  new: the first time they are empty, not None.
        """
        if self.forward is None or in_forward_ad() or in_functorch() or not self._precision_holds():
            return None
        for fits, known, plans in self._gradients:
            if known == wanted and fits(*operands):
                return plans
        if not new or dispatch_modes() > 0:
            # to who watches, a plan's launches are no operators
            return None
        assert self.planner is not None
        made = GradientPlans(self.planner)
        self._gradients = ((guard(*operands), wanted, made), *self._gradients[: _MOST_ALIKE - 1])
        return made


@dataclass
class GradientPlans:
    """A backend's plans of the input gradient and of the adapters', once they are made.  planner: of the forward's."""

    planner: Planner
    input: Forward | None = None
    adapters: Gradients | None = None


# those of one key differ in strides, dtypes, or in who wants gradients
CALLS: Cache[tuple[tuple[Guard, CallPlan], ...]] = Cache(4096)
_MOST_ALIKE = 16


def find(
    operands: tuple[Tensor, ...], scale: float, dropout_p: float, training: bool, impl: str
) -> CallPlan | None:  # fmt: skip
    """operands: x, weight, lora_A, lora_B, and bias where there is one. Nothing is checked yet: they may be anything.

    A call whose numbers are no plain floats, or not finite, always takes the long way.
    """
    if (
        type(scale) is not float
        or scale - scale != 0.0
        or type(dropout_p) is not float
        or FORWARD_AD._current_level >= 0
    ):
        return None
    try:
        # the key of put
        key = operands[0].shape, operands[1].shape, len(operands), dropout_p, training, impl, is_grad_enabled()
        for fits, plan in CALLS.get(key, ()):
            if fits(*operands) and (plan.settled or plan.holds(operands[0])):
                return plan
    except (AttributeError, RuntimeError, TypeError):
        # no tensors, or nested ones
        pass
    return None


def put(operands: tuple[Tensor, ...], dropout_p: float, training: bool, impl: str, plan: CallPlan) -> None:
    """For a call that was checked, and computed as the plan says, unless one like it is known.

    Without guards nothing is kept: every call is looked at anew.
    """
    if GUARDS_PROBLEM is not None:
        return _warn(GUARDS_PROBLEM)
    key = operands[0].shape, operands[1].shape, len(operands), dropout_p, training, impl, is_grad_enabled()
    known = CALLS.get(key, ())
    if not any(fits(*operands) and one.holds(operands[0]) for fits, one in known):
        CALLS.put(key, ((guard(*operands), plan), *known[: _MOST_ALIKE - 1]))


@functools.cache
def _warn(why: str) -> None:
    warnings.warn(f"every call is checked anew, which takes the host longer: {why}", RuntimeWarning, stacklevel=2)


def watched() -> bool:
    """Whether somebody sees or changes what is done with tensors now: a mode, a transform, a tracer."""
    return dispatch_modes() > 0 or in_functorch() or in_forward_ad() or is_tracing()
