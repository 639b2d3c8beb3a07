"""The truth in float64 and the error that a computation may have. Needs torch alone.

Budget: against the truth, an error of at most twice that of the eager computation in the same dtype, plus one rounding
of the largest |truth|. It follows from the inputs alone, never from the machine or from what a kernel happens to give.

A kernel sums a float32 product in one chain, term after term, where a library splits the sum as it likes and rounds
less. So a kernel is held to the eager computation with its float32 products in one chain: ``in_one_chain``.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lora import reference

NAMES = ("y", "dx", "dA", "dB", "dbias")


@dataclass
class Inputs:
    """Operands of one call and the gradient of its output, drawn in the dtype under test."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    dy: Tensor
    scale: float

    def leaves(self) -> Inputs:
        """Copies that want gradients; the weight stays frozen."""
        wanted = {
            name: getattr(self, name).detach().clone().requires_grad_()
            for name in ("x", "lora_A", "lora_B", "bias")
            if getattr(self, name) is not None
        }
        return replace(self, **wanted)

    def to(self, dtype: torch.dtype) -> Inputs:
        return replace(
            self, **{name: value.to(dtype) for name, value in vars(self).items() if isinstance(value, Tensor)}
        )


def draw(M, K, N, R, dtype=torch.float32, adapter_dtype=None, bias=True, scale=1.5, device="cpu") -> Inputs:
    """Values as a layer meets them: outputs of order one."""

    def randn(*shape, std=1.0, of=dtype):
        return (torch.randn(*shape, dtype=torch.float64) * std).to(of).to(device)

    adapter_dtype = adapter_dtype or dtype
    return Inputs(
        x=randn(M, K),
        weight=randn(N, K, std=K**-0.5),
        lora_A=randn(R, K, std=K**-0.5, of=adapter_dtype),
        lora_B=randn(N, R, std=R**-0.5, of=adapter_dtype),
        bias=randn(N) if bias else None,
        dy=randn(M, N),
        scale=scale,
    )


def results(inputs: Inputs, forward, **options) -> dict[str, Tensor]:
    """Output and every gradient of ``forward(x, weight, A, B, scale, bias, **options)``."""
    leaves = inputs.leaves()
    y = forward(leaves.x, leaves.weight, leaves.lora_A, leaves.lora_B, leaves.scale, leaves.bias, **options)
    y.backward(inputs.dy.view(y.shape))
    grads = (leaves.x.grad, leaves.lora_A.grad, leaves.lora_B.grad, None if leaves.bias is None else leaves.bias.grad)
    return {name: value.detach() for name, value in zip(NAMES, (y, *grads), strict=True) if value is not None}


class in_one_chain(TorchDispatchMode):  # noqa: N801  # read as a phrase: with in_one_chain()
    """Inside, a product of float32 matrices adds its terms one after the other, each fused with its multiplication."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        if not _MATRIX_PRODUCTS.search(name) or args[0].dtype != torch.float32:
            return func(*args, **kwargs)
        out = kwargs.get("out")
        if name == "mm":
            result = _chain(*args)
        elif name in ("addmm", "addmm_"):
            result = kwargs.get("beta", 1) * args[0] + kwargs.get("alpha", 1) * _chain(*args[1:])
            out = args[0] if name == "addmm_" else out
        elif name == "_linear_pointwise" and args[2] is None:
            result = _chain(args[0], args[1].t())
        else:
            raise NotImplementedError(f"{func} is not summed in one chain yet")
        return result if out is None else out.copy_(result)


_MATRIX_PRODUCTS = re.compile(r"mm|mv|dot|matmul|linear|einsum")


def _chain(a: Tensor, b: Tensor) -> Tensor:
    total = a.new_zeros(a.shape[0], b.shape[1])
    for q in range(a.shape[1]):
        total = torch.addcmul(total.double(), a[:, q : q + 1].double(), b[q : q + 1].double()).float()
    return total


def check(
    inputs: Inputs, got: dict[str, Tensor], mask: Tensor | None = None, dropout_p: float = 0.0, kernel: bool = False
) -> None:
    """Assert that ``got``, as :func:`results` gives it, is within the budget. kernel: that of a kernel's sums."""
    _check([_with_expectations(inputs, got, kernel, mask=mask, dropout_p=dropout_p)])


def check_shape(forward, M, K, N, R, kernel=False, **options) -> None:
    """:func:`check` on fresh draws: so many that what every result hangs on has 64 values to err in."""
    fewest = min(M * N, M * K, M * R, R * K, N * R, N) or 64
    draws = [draw(M, K, N, R, **options) for _ in range(-(-64 // min(fewest, 64)))]
    _check([_with_expectations(inputs, results(inputs, forward), kernel) for inputs in draws])


def _with_expectations(
    inputs: Inputs, got: dict[str, Tensor], kernel: bool, **dropout
) -> dict[str, tuple[Tensor, ...]]:
    """name -> (got, eager in the same dtype, exact in float64)."""
    exact = results(inputs.to(torch.float64), reference.eager_lora_linear, **dropout)
    with in_one_chain() if kernel else contextlib.nullcontext():
        # float32 adapters over a 16-bit weight are rounded to it, as autocast would
        low = results(inputs.to(inputs.weight.dtype), reference.eager_lora_linear, **dropout)
    assert set(got) == set(exact)
    return {name: (got[name], low[name], exact[name]) for name in exact}


def _check(draws: list[dict[str, tuple[Tensor, ...]]]) -> None:
    for name in draws[0]:
        within(name, *(torch.stack(values) for values in zip(*(one[name] for one in draws), strict=True)))


def within(name: str, got: Tensor, eager: Tensor, exact: Tensor) -> None:
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    error = (got.double() - exact).abs().max().item()
    allowed = budget(eager, exact)
    assert error <= allowed, f"{name}: error {error:.3e} is over the budget of {allowed:.3e}"


def budget(eager: Tensor, exact: Tensor) -> float:
    rounding = torch.finfo(eager.dtype).eps / 2 * exact.abs().max().item()
    return 2 * (eager.double() - exact).abs().max().item() + rounding


def forward_bound(inputs: Inputs) -> Tensor:
    """A bound that no correct float32 or float64 forward can exceed, whatever its order of summation: (M, N).

    Each of its sums has at most K + R + 2 terms, each product is rounded a few times: γ_n = n u / (1 - n u) times the
    computation on absolute values (Higham, Accuracy and Stability of Numerical Algorithms, §3.1).
    """
    u = torch.finfo(inputs.weight.dtype).eps / 2
    n = inputs.x.shape[-1] + inputs.lora_A.shape[0] + 8
    absolute = Inputs(*(v.abs() if isinstance(v, Tensor) else v for v in vars(inputs.to(torch.float64)).values()))
    args = (absolute.x, absolute.weight, absolute.lora_A, absolute.lora_B, abs(absolute.scale), absolute.bias)
    return n * u / (1 - n * u) * reference.eager_lora_linear(*args)
