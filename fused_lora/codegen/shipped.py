"""The launches that a layer makes, as they would be made on a GPU that is not here: what codegen compiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..backends.four_bits import FourBits
from ..backends.triton import prepare
from ..backends.triton.configs import (
    DecodeConfig,
    Problem,
    ReductionConfig,
    Schedule,
    ScheduleConfig,
    TileConfig,
    default_config,
    default_reduction,
    default_schedule,
)
from ..backends.triton.decode_configs import default_decode, takes_decode
from ..backends.triton.entries import Tiled
from ..torch_internals import allows_tf32
from .compiler import DEVICES, MATRIX_INSTRUCTION, Resources, compile_launch

Config = TypeVar("Config", TileConfig, DecodeConfig, ReductionConfig)
# the main loop of tiles that wait may have this many times the instructions of the bare GEMM's, or this many more: in
# short loops ptxas makes up to four others where it compares in uniform registers or in ordinary ones
LOOP_LIMIT, LOOP_SLACK = 1.05, 4
# of elements that share a scale, bitsandbytes' default
BLOCKSIZE = 64
# what loads and stores 16 bytes
WIDE = ("LDG.E.128", "STG.E.128")


@dataclass(frozen=True)
class Case:
    """A layer of M tokens, K in_features, N out_features on compute capability arch; dtypes of base and adapters.

    transposed: A and B lie in memory as their transposes do.  stages: of the main loop's pipeline, other than the
    rule's.
    """

    arch: int
    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    dropout: bool = False
    transposed: bool = False
    stages: int | None = None

    @property
    def adapters(self) -> str:
        """Their dtype, and whether dropout comes before them, for people."""
        return str(self.adapter_dtype).removeprefix("torch.") + (", dropout" if self.dropout else "")

    @property
    def exact(self) -> bool:
        """float32 at full precision, which no matrix instruction multiplies."""
        return self.dtype == torch.float32 and not allows_tf32()


@dataclass(frozen=True)
class DequantizeCase:
    """A weight of four bits, N × K, in blocks of 64, with double quantization or without, dequantized into dtype."""

    arch: int
    K: int
    N: int
    dtype: torch.dtype
    double: bool


@dataclass(frozen=True)
class Found:
    """plain: the same tile's bare GEMM, where there is one to compare with.  loads: "descriptors" or "pointers"."""

    case: Case | DequantizeCase
    pass_: str
    tile: tuple[int, ...]
    schedule: str
    loads: str
    resources: Resources
    plain: Resources | None

    @property
    def loop(self) -> int | None:
        """Instructions in the main loop of the tiles that wait: it has as many matrix instructions as the bare GEMM's.

        A publisher's main loop has more of them, one that makes h alone has fewer, or as many: then it is told from the
        other by rounding float32 adapters, by dropout's mask, which makes it the longer one, or else the longer counts.
        """
        got, plain = self.resources, self.plain
        if plain is None or not plain.loops:
            return got.loops[0] if got.loops else None
        masks = not isinstance(self.case, DequantizeCase) and self.case.dropout and self.pass_ == "forward"
        loops = zip(got.loops, zip(got.matrix_counts, got.conversions, strict=True), strict=True)
        alike = [size for size, counts in loops if counts == (plain.matrix_counts[0], plain.conversions[0])]
        return (min if masks else max)(alike, default=None)

    @property
    def plain_loop(self) -> int | None:
        return self.plain.loops[0] if self.plain is not None and self.plain.loops else None

    @property
    def instructions(self) -> tuple[str, ...]:
        """Those that make its speed: of matrices, or where there are none, those that load and store 16 bytes."""
        if not isinstance(self.case, DequantizeCase):
            return self.resources.matrix_instructions
        return tuple(name for name in WIDE if name in self.resources.global_accesses)

    def faults(self) -> list[str]:
        """What is wrong, in words: spills, warnings, code that ``sass.py`` finds wrong, another matrix instruction,
        a main loop longer than allowed, loads and stores of less than 16 bytes where there are no matrices.

        A tile that recomputes has more to do in its main loop than a bare GEMM, so that one's length is free.
        """
        faults = [f"ptxas warns: {code}" for code in self.resources.warnings]
        if self.resources.spill_bytes:
            faults.append(f"{self.resources.spill_bytes} bytes of spills")
        faults += [f"ptxas {self.resources.assembler} miscompiles: {what}" for what in self.resources.miscompiled]
        if isinstance(self.case, DequantizeCase):
            faults += [f"no {name}" for name in WIDE if name not in self.instructions]
            narrow = sorted({name for name in self.resources.global_accesses if name.startswith("ST")} - {*WIDE})
            return faults + [f"stores by {name}" for name in narrow]
        expected = MATRIX_INSTRUCTION[self.case.arch]
        if not self.case.exact and expected not in self.resources.matrix_instructions:
            faults.append(f"no {expected}")
        if self.schedule == "RECOMPUTE" or self.case.exact:
            return faults
        loop, plain = self.loop, self.plain_loop
        if loop is None:
            faults.append("no main loop with the matrix instructions of the bare GEMM")
        elif plain is not None and loop > max(LOOP_LIMIT * plain, plain + LOOP_SLACK):
            faults.append(f"{loop} instructions in the main loop, the bare GEMM has {plain}")
        return faults


def compile_case(case: Case, compare: bool = True) -> Iterator[Found]:
    """Forward, input gradient and adapter gradients of a case, one by one: each takes seconds.

    compare: compile the bare GEMM of each tile too.
    """
    x, dy, weight = _meta(case, case.M, case.K), _meta(case, case.M, case.N), _meta(case, case.N, case.K)
    h = _meta(case, case.M, case.R)
    A, B = _adapter(case, case.R, case.K), _adapter(case, case.N, case.R)
    yield _compile_matmul(case, "forward", (x, weight.t(), A.t(), B.t(), _meta(case, case.N)), h, compare)
    yield _compile_matmul(case, "input gradient", (dy, weight, B, A, None), h, compare)

    seed = _meta(case, 1, dtype=torch.int64) if case.dropout else None
    reduction = _staged(default_reduction(case.R, case.dtype.itemsize, DEVICES[case.arch]), case)
    parts = _meta(case, 4, 128, 64, reduction.BLOCK_R, dtype=torch.float32)
    call = prepare.adapter_grad_launch(
        x, h, dy, h, 1.5, seed, 0.1, A, B, reduction, DEVICES[case.arch], parts, _counters(case)
    )
    tile = (reduction.BLOCK_M, reduction.BLOCK_C, reduction.BLOCK_R, reduction.num_warps, reduction.num_stages)
    yield Found(case, "adapter gradients", tile, "in parts", "pointers", compile_launch(call, case.arch), None)


def compile_dequantize(case: DequantizeCase) -> Found:
    blocks, float32, uint8 = case.N * case.K // BLOCKSIZE, torch.float32, torch.uint8
    q, code = _meta(case, case.N * case.K // 2, dtype=uint8), _meta(case, 16, dtype=float32)
    bits = FourBits(q, code, _meta(case, blocks, dtype=uint8 if case.double else float32), BLOCKSIZE)
    if case.double:
        absmax2, code2, offset = (_meta(case, *shape, dtype=float32) for shape in ((-(-blocks // 256),), (256,), ()))
        bits = bits._replace(absmax2=absmax2, code2=code2, offset=offset, blocksize2=256)
    call = prepare.dequantize_launch(bits, _meta(case, case.N, case.K))
    tile = (call.variant.BLOCK, BLOCKSIZE, call.num_warps, call.num_stages)
    pass_ = "dequantize, double" if case.double else "dequantize"
    return Found(case, pass_, tile, "words", "pointers", compile_launch(call, case.arch), None)


def _compile_matmul(case: Case, pass_: str, operands: tuple[Any, ...], h: Tensor, compare: bool) -> Found:
    """operands: a, w, u, v and bias.  As ``launch.lora_matmul`` would launch it."""
    a, w, *_, bias = operands
    device = DEVICES[case.arch]
    seed = _meta(case, 1, dtype=torch.int64) if case.dropout else None
    sizes = (case.M, w.shape[1], w.shape[0], case.R, case.dtype.itemsize, case.adapter_dtype.itemsize)
    problem = Problem(*sizes, case.dropout, not case.exact, prepare.aligned(a, w))
    out = _meta(case, case.M, w.shape[1])
    if takes_decode(problem, device):
        decode = prepare.whole_parts(_staged(default_decode(problem, device), case), problem.Q)
        slots = _scratch(case, prepare.scratch_of(problem, decode))
        given: tuple[Any, ...] = (*operands, 1.5, out, h, slots, _counters(case), decode)
        call = prepare.decode_launch(*given)
        tile = (decode.ROWS, decode.BLOCK_P, decode.BLOCK_Q, decode.num_warps, decode.num_stages)
        return Found(case, pass_, tile, "decode", "pointers", compile_launch(call, case.arch), None)
    config = _staged(default_config(problem, device), case)
    schedule = default_schedule(problem, config, device)
    dropout = (seed, 0.1, pass_ != "forward")
    sync = None if schedule.kind <= Schedule.RECOMPUTE else _counters(case)
    parts = None
    if schedule.kind == Schedule.PRODUCE:
        parts = _scratch(case, prepare.scratch_of(problem, Tiled(config, schedule)))
    given = (*operands, 1.5, *dropout, out, h, config, schedule, device, parts, sync)
    call = prepare.lora_matmul_launch(*given)
    tile = (config.BLOCK_M, config.BLOCK_P, config.BLOCK_Q, config.num_warps, config.num_stages)
    loads = "descriptors" if schedule.descriptors else "pointers"
    plain = _compile_plain(case, a, w, bias, config, schedule) if compare else None
    return Found(case, pass_, tile, schedule.kind.name, loads, compile_launch(call, case.arch), plain)


def _compile_plain(
    case: Case, a: Tensor, w: Tensor, bias: Tensor | None, config: TileConfig, schedule: ScheduleConfig
) -> Resources:
    """The bare GEMM of a tile. Its adapters, which it never reads, are always the same: so it is compiled once."""
    u, v = _meta(case, w.shape[0], 16), _meta(case, 16, w.shape[1])
    out, h = _meta(case, case.M, w.shape[1]), _meta(case, case.M, 16)
    config, schedule = replace(config, BLOCK_R=16), ScheduleConfig(Schedule.PLAIN, descriptors=schedule.descriptors)
    given = (a, w, u, v, bias, 1.5, None, 0.0, False, out, h, config, schedule, DEVICES[case.arch])
    return compile_launch(prepare.lora_matmul_launch(*given), case.arch)


def _staged(config: Config, case: Case) -> Config:
    return config if case.stages is None else replace(config, num_stages=case.stages)


def _adapter(case: Case, *shape: int) -> Tensor:
    if case.transposed:
        return _meta(case, *shape[::-1], dtype=case.adapter_dtype).t()
    return _meta(case, *shape, dtype=case.adapter_dtype)


def _counters(case: Case) -> Tensor:
    return _meta(case, 1 << 14, dtype=torch.int32)


def _scratch(case: Case, shape: tuple[int, ...]) -> Tensor:
    return _meta(case, *shape, dtype=torch.float32)


def _meta(case: Case | DequantizeCase, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or case.dtype, device="meta")
