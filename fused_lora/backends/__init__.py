"""The implementations of the two operators, and the rule that chooses one. Each is a module of this package.

To add one: write the module, and name it in ``BACKENDS``.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from . import eager, native
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


def choose(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs: the one asked for, or RuntimeError; for "auto", by this rule:

    on a CPU "native" where the extension is built; on a CUDA device "triton" where it can run, else "native" where it
    can; everywhere else "eager". On an H100 (benchmarks/results) "native" is faster than "triton" at small M,
    where the host decides, and as fast or slower above. The rule is for the sizes that are trained.

    On a CPU it is measured (benchmarks/results/native): beside "eager", a step of RichBoyNet and a token's forward take
    a third to a half less, and a step of 512 tokens the same.
    """
    if impl == "auto":
        # the CPU comes first: there a microsecond counts
        if device.type == "cpu":
            return "native" if native.available() and dtype in native.DTYPES else "eager"
        if device.type != "cuda":
            return "eager"
        # a loop: Dynamo of torch 2.8 knows no next() with a default
        for name in ("triton", "native"):
            if why_not(name, device, dtype) is None:
                return name
        return "eager"
    if impl != "eager":
        why = why_not(impl, device, dtype)
        if why is not None:
            raise RuntimeError(f"impl={impl!r} cannot run here: {why}")
    return impl
