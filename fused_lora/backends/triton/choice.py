"""What a launch takes on a device: the tuned choice, else that of the rules in ``configs.py``. Each is found once."""

from __future__ import annotations

import functools

import torch
from triton.runtime import driver

from . import tuned
from .configs import (
    INTERPRETER,
    INTERPRETER_DECODE,
    INTERPRETER_PARTS,
    INTERPRETER_REDUCTION,
    INTERPRETER_TILE,
    DecodeConfig,
    Device,
    Problem,
    ReductionConfig,
    ReductionProblem,
    TileConfig,
    default_config,
    default_reduction,
    default_schedule,
    reduction_parts,
)
from .decode_configs import default_decode, takes_decode
from .entries import Reduced, Tiled
from .prepare import reduction_tiles


@functools.cache
def known_device(device: torch.device) -> Device:
    """What the rules know of it."""
    if device.type != "cuda":
        return INTERPRETER
    limits = driver.active.utils.get_device_properties(device.index)
    capability = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    return Device(capability, limits["max_shared_mem"], limits["multiprocessor_count"], name)


@functools.lru_cache(maxsize=4096)
def choice(problem: Problem, device: torch.device) -> Tiled | DecodeConfig:
    """The tuned one, else the rules'."""
    return tuned.current().choice(problem, known_device(device)) or rule(problem, device)  # type: ignore[return-value]


def rule(problem: Problem, device: torch.device) -> Tiled | DecodeConfig:
    """What the rules choose on this device, whatever is tuned."""
    known = known_device(device)
    if takes_decode(problem, known):
        return INTERPRETER_DECODE if known is INTERPRETER else default_decode(problem, known)
    return tiled_rule(problem, device)


def tiled_rule(problem: Problem, device: torch.device, tile: TileConfig | None = None) -> Tiled:
    """The same without ``decode.py``.  tile: to be taken instead of the rule's."""
    known = known_device(device)
    if tile is None:
        tile = INTERPRETER_TILE if known is INTERPRETER else default_config(problem, known)
    return Tiled(tile, default_schedule(problem, tile, known))


@functools.lru_cache(maxsize=4096)
def reduction_choice(problem: ReductionProblem, device: torch.device) -> Reduced | None:
    """The tuned one, if there is one."""
    return tuned.current().choice(problem, known_device(device))  # type: ignore[return-value]


def rule_reduction(problem: ReductionProblem, device: torch.device) -> Reduced:
    """What the rules choose for both adapter gradients on this device, whatever is tuned."""
    config = reduction_rule(problem.R, problem.itemsize, device)
    tiles = reduction_tiles(problem.columns, 0, problem.R, config)
    return Reduced(config, parts_rule(config, problem.M, tiles, problem.itemsize, device))


def reduction_rule(rank: int, itemsize: int, device: torch.device) -> ReductionConfig:
    known = known_device(device)
    return INTERPRETER_REDUCTION if known is INTERPRETER else default_reduction(rank, itemsize, known)


def parts_rule(config: ReductionConfig, rows: int, tiles: int, itemsize: int, device: torch.device) -> int:
    """Into how many parts M is split."""
    known = known_device(device)
    return INTERPRETER_PARTS if known is INTERPRETER else reduction_parts(config, rows, tiles, itemsize, known)
