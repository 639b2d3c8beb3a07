"""Host side of the kernels: allocate, strides, grid. Same contracts as the operators in ``reference.py``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import torch
from torch import Tensor
from triton.runtime import driver

from ..ops import interpreting
from ..reference import dropout_threshold, keep_scale
from .adapter_grad import _adapter_grad_kernel
from .configs import (
    INTERPRETER_REDUCTION,
    INTERPRETER_TILE,
    Device,
    Problem,
    ReductionConfig,
    TileConfig,
    default_config,
    default_reduction,
)
from .lora_matmul import _lora_matmul_kernel


def lora_matmul(
    a: Tensor,
    w: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    seed: Tensor | None,
    dropout_p: float,
    dropout_on_output: bool,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """One launch. config: tile sizes other than the default's."""
    a2 = _rows(a)
    (M, Q), P, R = a2.shape, w.shape[1], u.shape[1]
    out = a.new_empty((*a.shape[:-1], P))
    thin = a.new_empty((M, R))
    if M == 0 or P == 0:
        return out, thin
    if config is None:
        config = _tile_config(M, P, Q, R, a.dtype.itemsize, u.dtype.itemsize, seed is not None, a.device)
    grid = (_cdiv(M, config.BLOCK_M) * _cdiv(P, config.BLOCK_P),)
    with _on(a.device):
        _lora_matmul_kernel[grid](
            a2, w, u, v, bias, seed, out, thin, M, P, Q, R, *a2.stride(), *w.stride(), *u.stride(), *v.stride(),
            float(scale), keep_scale(dropout_p), dropout_threshold(dropout_p),
            HAS_BIAS=bias is not None,
            DROP_INPUT=seed is not None and not dropout_on_output,
            DROP_OUTPUT=seed is not None and dropout_on_output,
            EVEN_Q=Q > 0 and Q % config.BLOCK_Q == 0,
            MANY_RANKS=config.BLOCK_R < R,
            PRECISION=_precision(),
            **_launch_options(config),
        )  # fmt: skip
    return out, thin


def adapter_grad(
    x: Tensor | None,
    g: Tensor | None,
    dy: Tensor | None,
    h: Tensor | None,
    scale: float,
    seed: Tensor | None,
    dropout_p: float,
    dtype_A: torch.dtype,
    dtype_B: torch.dtype,
    config: ReductionConfig | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """One launch for both gradients; what is not given costs nothing."""
    pairs = [(_rows(wide), thin) for wide, thin in ((x, g), (dy, h)) if wide is not None and thin is not None]
    if not pairs:
        return None, None
    # an absent pair has no tiles, and borrows the pointers of the other
    (x2, g2), (dy2, h2) = pairs[0], pairs[-1]
    has_A, has_B = x is not None and g is not None, dy is not None and h is not None
    M, R = g2.shape
    K, N = x2.shape[1] if has_A else 0, dy2.shape[1] if has_B else 0
    dA = x2.new_empty((R, K), dtype=dtype_A) if has_A else None
    dB = dy2.new_empty((N, R), dtype=dtype_B) if has_B else None
    if config is None:
        config = INTERPRETER_REDUCTION if interpreting() else default_reduction(R, x2.dtype.itemsize)
    tiles_A, tiles_B = _cdiv(K, config.BLOCK_C), _cdiv(N, config.BLOCK_C)
    if tiles_A + tiles_B > 0:
        with _on(x2.device):
            _adapter_grad_kernel[(tiles_A + tiles_B, _cdiv(R, config.BLOCK_R))](
                x2, g2, dy2, h2, seed, dB if dA is None else dA, dA if dB is None else dB, M, K, N, R, tiles_A,
                *x2.stride(), *g2.stride(), *dy2.stride(), *h2.stride(),
                float(scale), keep_scale(dropout_p), dropout_threshold(dropout_p),
                DROPOUT=seed is not None,
                PRECISION=_precision(),
                **_launch_options(config),
            )  # fmt: skip
    return dA, dB


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _precision() -> str:
    """float32 products as PyTorch is told to make them."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def _launch_options(config: TileConfig | ReductionConfig) -> dict[str, int]:
    return dataclasses.asdict(config)


@functools.cache
def _device(device: torch.device) -> Device:
    limits = driver.active.utils.get_device_properties(device.index)
    return Device(torch.cuda.get_device_capability(device), limits["max_shared_mem"])


@functools.lru_cache(maxsize=4096)
def _tile_config(
    M: int, P: int, Q: int, R: int, itemsize: int, adapter_itemsize: int, dropout: bool, device: torch.device
) -> TileConfig:  # fmt: skip
    if device.type != "cuda":
        return INTERPRETER_TILE
    return default_config(Problem(M, P, Q, R, itemsize, adapter_itemsize, dropout), _device(device))
