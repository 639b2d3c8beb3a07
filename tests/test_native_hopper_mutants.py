"""Hopper's kernel with one thing wrong at a time: the shim must see it. What is replaced is the text of the kernel."""

import faulthandler
import os
import re
import shutil
import signal
from dataclasses import dataclass

import oracle
import pytest
import torch
from cuda_shim import hopper
from cuda_shim.host import CSRC, SHIM, Turns
from native_operators import draw_matmul, exactly, plainly

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here")
SEED = torch.tensor([5])
# several clusters, each of which holds tickets ahead
M, K, N, SMS = 520, 136, 520, 4
# the shim sees that threads wait for ever; this is for what it does not
MOST_SECONDS = 120


@dataclass(frozen=True)
class Mutant:
    """A line of a file, without which or instead of which."""

    what: str
    file: str
    line: str
    instead: str = ""
    dropout: bool = False
    R: int = 64


MUTANTS = [
    Mutant("h is not fenced for the TMA", "schedule.cuh",
           "    fence_for_tma();\n    fence_device();", "    fence_device();"),
    Mutant("h is not fenced for other blocks", "schedule.cuh", "    fence_device();\n"),
    Mutant("the reader of h has no fence", "schedule.cuh", "must see too\n    fence_for_tma();", "must see too\n"),
    Mutant("h's flag is raised before the barrier", "schedule.cuh",
           "    sync_warpgroup(1 + consumer);\n    if (thread_index() % WARPGROUP == 0) add_release",
           "    if (thread_index() % WARPGROUP == 0) add_release"),
    Mutant("h's flag is raised without a release", "schedule.cuh", "add_release(flag, 1)", "add_relaxed(flag, 1)"),
    Mutant("h's flag is read without an acquire", "schedule.cuh", "load_acquire(flag)", "*flag"),
    Mutant("one consumer's h is awaited", "schedule.cuh", "CONSUMERS * blocks)", "blocks)"),
    Mutant("h is not awaited", "schedule.cuh", "< CONSUMERS * blocks) pause();", "< 0) pause();"),
    Mutant("waits for a higher ticket", "schedule.cuh",
           "ticket < alone) return {", "(ticket = (ticket + alone) % tickets()) < alone) return {", R=128),
    Mutant("a ticket is told without a release", "schedule.cuh", "arrive_in_block_releasing(", "arrive_in_block("),
    Mutant("a ticket is heard without an acquire", "schedule.cuh",
           "await_phase_of_cluster(&barriers.told", "await_phase(&barriers.told"),
    Mutant("a ticket is overwritten before it is read", "schedule.cuh", "if (turn >= 2) await", "if (turn >= 8) await"),
    Mutant("a stage is released while it is read", "pipeline.cuh",
           "    release();\n    unreleased = place.stage;", "    unreleased = place.stage;\n    release();"),
    Mutant("a stage is released to one block", "pipeline.cuh", "thread < CLUSTER) arrive", "thread < 1) arrive"),
    Mutant("a stage is filled before it is released", "pipeline.cuh",
           "    await_phase(&memory.barriers().empty[place.stage], place.phase ^ 1);\n"),
    Mutant("fewer bytes are announced than come", "pipeline.cuh",
           "arrive_expecting(full(), bytes)", "arrive_expecting(full(), bytes - 128)"),
    Mutant("more bytes are announced than come", "pipeline.cuh",
           "Shape::W_BYTES + (own_h ? 0 : Shape::A_BYTES)", "Shape::W_BYTES + Shape::A_BYTES"),
    Mutant("tiles are multiplied before they come", "pipeline.cuh",
           "{ await_phase(&memory.barriers().full[at.stage], at.phase); }", "{}"),
    Mutant("barriers are not published", "pipeline.cuh", "  publish_barriers();\n"),
    Mutant("a tile is read in the wrong swizzle", "pipeline.cuh",
           "LEADING, 8 * SPAN, Swizzle::k128", "LEADING, 8 * SPAN, Swizzle::k64"),
    Mutant("wgmma without a fence", "low_rank.cuh",
           "      wgmma_fence();\n      multiply_by_v<Shape", "      multiply_by_v<Shape"),
    Mutant("sums are read before they are done", "low_rank.cuh", "    if constexpr (H) stages.finish();"),
    Mutant("its own h is not fenced for wgmma", "low_rank.cuh", "    fence_shared_for_tma();\n"),
    Mutant("its own h is multiplied before all have put it there", "low_rank.cuh",
           "    fence_shared_for_tma();\n    sync_warpgroup(1 + consumer);", "    fence_shared_for_tma();"),
    Mutant("scale is lost", "low_rank.cuh", "first * arguments.scale, second * arguments.scale", "first, second"),
    Mutant("dropout's bits are shifted", "low_rank.cuh",
           "keeps_pair(first_pair", "keeps_pair(first_pair + 1", dropout=True),
    Mutant("out's chunks come while tiles of u are read", "lora_matmul.cuh", "sync_two_warpgroups(BOTH_CONSUMERS);"),
    Mutant("tiles of u come while out's chunks are stored", "lora_matmul.cuh", "        await_stores_read<0>();\n"),
    Mutant("a block leaves while it is arrived at", "lora_matmul.cuh", "its own\n    sync_cluster();", "its own\n"),
    Mutant("a block leaves amid its stores", "lora_matmul.cuh", "  if (consumer.thread() == 0) await_stores();\n"),
    Mutant("more registers than there are", "shape.cuh", "PRODUCER_REGISTERS = 40", "PRODUCER_REGISTERS = 64"),
    Mutant("out's chunk is not fenced for the TMA", "epilogue.cuh", "    fence_shared_for_tma();\n"),
    Mutant("out's chunk is stored before all have written it", "epilogue.cuh",
           "    sync_warpgroup(1 + consumer.consumer);\n    if (leads) store_tile", "    if (leads) store_tile"),
    Mutant("out's chunk is written while it is stored", "epilogue.cuh",
           "    if (leads) await_stores_read<STAGINGS - 1>();\n"),
]  # fmt: skip
RIGHT = [
    Mutant("nothing", "", ""),
    Mutant("nothing, with dropout", "", "", dropout=True),
    Mutant("nothing", "", "", R=128),
]


def build(folder, mutant):
    """The kernel with one of its instances alone, so that it compiles soon."""
    copy = folder / "csrc" / "cuda"
    for part in ("hopper", "kernels"):
        shutil.copytree(CSRC / part, copy / part)

    def replace(name, pattern, by):
        path = copy / "hopper" / name
        changed, found = re.subn(pattern, lambda _: by, path.read_text(), flags=re.DOTALL)
        assert found == 1, f"{name} has {found} of {pattern}"
        path.write_text(changed)

    if mutant.line:
        replace(mutant.file, re.escape(mutant.line), mutant.instead)
    shape = f"Shape<Element, W_ALONG_Q, 256, 64, {str(mutant.dropout).lower()}>"
    replace(
        "lora_matmul.cuh", r"  if \(drops\) return launch_with.*?\n}\n", f"  return launch_with({shape}{{}});\n}}\n"
    )
    for others in ("BFloat16, false", "Half, true", "Half, false"):
        signature = f"int launch_shape<{others}>(const HopperPlan&, bool, const Arguments&, void*)"
        absent = f"template <>\ninline {signature} {{\n  return -2;\n}}"
        replace("lora_matmul.h", re.escape(f"extern template {signature};"), absent)
    source = folder / "tests" / "cuda_shim" / "library.cpp"
    source.parent.mkdir(parents=True)
    others = r'#include "[^"]*(_half|_grad_bfloat16)\.cu"\n'
    source.write_text(re.sub(others, "", (SHIM / "hopper_library.cpp").read_text()))
    return hopper.build(folder, source, "-O1")


class Runs:
    """The kernel in several orders of blocks, held to the oracle."""

    def __init__(self, kernels, mutant):
        torch.manual_seed(0)
        self.kernels = kernels
        self.tensors = draw_matmul("bfloat16", M, K, N, mutant.R, False)
        self.rest = (1.5, SEED if mutant.dropout else None, 0.3 if mutant.dropout else 0.0, False)
        self.eager = plainly("lora_matmul", "bfloat16", self.tensors, self.rest)
        self.exact = exactly("lora_matmul", self.tensors, self.rest)

    def what_is_seen(self):
        """Nothing, if it is right every time."""
        for seed in range(1, 9):
            try:
                turns = Turns(seed, 4 - seed % 2 * 2, seed % 3, SMS)
                got = self.kernels.lora_matmul(*self.tensors, *self.rest, turns=turns)
                for values in zip(("out", "h"), got, self.eager, self.exact, strict=True):
                    oracle.within(*values)
            except (AssertionError, hopper.BrokenLaunchError) as error:
                return str(error).splitlines()[0]
        return ""

    def what_a_process_sees(self):
        """The same, for a mutant may write anywhere."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(MOST_SECONDS)
            faulthandler.disable()
            # the threads of the process that was copied are not here
            torch.set_num_threads(1)
            try:
                os.write(writer, self.what_is_seen().encode())
                os._exit(0)
            finally:
                os._exit(1)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            seen = pipe.read()
        _, status = os.waitpid(child, 0)
        assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "the check itself fails"
        died_of = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        assert died_of != signal.SIGALRM, "the check itself hangs"
        return f"the process dies of signal {died_of}" if died_of else seen


@pytest.mark.parametrize("mutant", RIGHT, ids=["", "dropout", "blocks of ranks"])
def test_nothing_is_seen_where_nothing_is_wrong(tmp_path, mutant):
    """What the others are compared with: the same instance, the same runs."""
    assert Runs(build(tmp_path, mutant), mutant).what_is_seen() == ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.what for mutant in MUTANTS])
def test_whatever_is_wrong_is_seen(tmp_path, mutant):
    seen = Runs(build(tmp_path, mutant), mutant).what_a_process_sees()
    print(mutant.what, "->", seen)
    assert seen
