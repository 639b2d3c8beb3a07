"""The implementations of the two operators, and the rule that chooses one. Each is a module of this package.

To add one: write the module, and name it in ``BACKENDS``.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..plans import Planner
from . import eager, environment, measured, native
from .measured import LayerPass as LayerPass
from .triton import backend as triton


class Backend(Protocol):
    """What a module of this package has.

    Symbols as in ``reference.py``: forward and input gradient are one operator, ``lora_matmul``, told other operands.
    """

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot compute on tensors of this device and dtype, or None when it can."""

    def lora_matmul(
        self, a: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, scale: float,
        seed: Tensor | None, dropout_p: float, dropout_on_output: bool, /,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``out = a w + scale · (a u) v + bias`` and the low-rank product ``a u``.

        a: (..., Q).  w: (Q, P).  u: (Q, R).  v: (R, P).  bias: (P,) or None.  u and v are rounded to a's dtype.
        seed: (1,) of int64 for dropout, else None: on a's elements inside ``a u``, or on those of ``(a u) v``.
        Returns out (..., P) and (M, R), both in a's dtype.
        """

    def adapter_grad(
        self, x: Tensor | None, g: Tensor | None, dy: Tensor | None, h: Tensor | None, scale: float,
        seed: Tensor | None, dropout_p: float, dtype_A: torch.dtype, dtype_B: torch.dtype, /,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """``dA = scale · gᵀ D(x)`` in dtype_A where x and g are given, ``dB = scale · dyᵀ h`` in dtype_B likewise.

        x: (..., K).  g: (M, R).  dy: (..., N).  h: (M, R).
        Returns (R, K) and (N, R), None or empty where not asked for.
        """


BACKENDS: dict[str, Backend] = {"triton": triton, "native": native, "eager": eager}


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot compute on tensors of this device and dtype, or None when it can."""
    return BACKENDS[name].why_not(device, dtype)


# A compiler that traces a call asks once and keeps the answer: what is installed, and what a GPU can do, stays. This is
# torch.compiler.assume_constant_result without its import of Dynamo, which would double that of this package.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def planner(impl: str, drops: bool) -> Planner | None:
    """What of a backend makes plans of calls that repeat, or None.  drops: whether there is a dropout mask to draw."""
    if impl == "triton":
        return triton
    return eager if impl == "eager" and not drops else None


def choose(impl: str, device: torch.device, dtype: torch.dtype, asked: LayerPass | None = None) -> str:
    """The backend that runs: the one asked for, or RuntimeError; for "auto", by this rule:

    on a CPU "native" where the extension is built; on a CUDA device what ``measured.py`` knows to be the fastest for
    what is asked; everywhere else "eager". Where nothing was measured, and without ``asked``, a CUDA device runs
    "triton" where it can, else "native" where it can.

    asked: None under a compiler. A size would be built into its graph, which other sizes would then recompile; and what
    it would be chosen by is the host's time, which a compiled graph saves anyway.

    On a CPU the rule is measured (benchmarks/results/native): beside "eager", a step of RichBoyNet and a token's
    forward take a third to a half less, and a step of 512 tokens the same.
    """
    if impl == "auto":
        # the CPU comes first: there a microsecond counts
        if device.type == "cpu":
            return "native" if native.available() and dtype in native.DTYPES else "eager"
        return "eager" if device.type != "cuda" else _fastest(device, dtype, asked)
    if impl != "eager":
        why = why_not(impl, device, dtype)
        if why is not None:
            raise RuntimeError(f"impl={impl!r} cannot run here: {why}")
    return impl


def _fastest(device: torch.device, dtype: torch.dtype, asked: LayerPass | None) -> str:
    names = able(device, dtype)
    if asked is None or names == ("eager",):
        return names[0]
    return measured.choose(environment.capability(device), dtype, asked, names)


def able(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """The backends that can run, in the order in which they are taken where nothing was measured."""
    found = []
    # a loop: Dynamo of torch 2.8 takes no generator here
    for name in measured.BACKENDS:
        if why_not(name, device, dtype) is None:
            found.append(name)
    return tuple(found)


def runs(impl: str, device: torch.device, dtype: torch.dtype, asked: LayerPass) -> tuple[str, ...]:
    """The backends that :func:`choose` takes for a layer, with gradients and without, from the fewest tokens to the
    most. ``asked`` is one of its passes."""
    found: dict[str, None] = {}
    for gradients in (False, True):
        for M in measured.TOKENS:
            found[choose(impl, device, dtype, asked._replace(gradients=gradients, M=M))] = None
    return tuple(found)
