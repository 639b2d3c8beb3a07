"""Hopper's kernel with one thing wrong at a time: the shim must see it, whatever it is."""

import re
import shutil

import pytest
import torch
from cuda_shim import hopper
from cuda_shim.host import CSRC, SHIM, Turns
from native_operators import check, draw_matmul

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here")
SEED = torch.tensor([5])
PLAIN, DROPOUT = "256, 64, false", "256, 64, true"
# few clusters of which each holds tickets ahead; with several blocks of ranks, and with one
SHAPES = {"ranks": (300, 192, 520, 128), "rank": (520, 192, 520, 64)}

# file, what is written there, what is written instead, of which instance, at which shape
MUTANTS = {
    "none": ("pipeline.cuh", "", "", PLAIN, "ranks"),
    "none with dropout": ("pipeline.cuh", "", "", DROPOUT, "rank"),
    "h is not fenced for the TMA": ("schedule.cuh", "    fence_for_tma();\n    fence_device();", "    fence_device();", PLAIN, "rank"),
    "h is not fenced for other blocks": ("schedule.cuh", "    fence_device();\n", "", PLAIN, "rank"),
    "the reader of h has no fence": ("schedule.cuh", "    // what the acquire has seen, the TMA must see too\n    fence_for_tma();", "", PLAIN, "rank"),
    "the flag is raised before the barrier": ("schedule.cuh", "    sync_warpgroup(1 + consumer);\n    if (thread_index() % WARPGROUP == 0) add_release", "    if (thread_index() % WARPGROUP == 0) add_release", PLAIN, "rank"),
    "the flag is raised without a release": ("schedule.cuh", "add_release(flag, 1)", "add_relaxed(flag, 1)", PLAIN, "rank"),
    "the flag is read without an acquire": ("schedule.cuh", "load_acquire(flag)", "*flag", PLAIN, "rank"),
    "the flag is awaited for one consumer": ("schedule.cuh", "CONSUMERS * blocks)", "blocks)", PLAIN, "rank"),
    "waits for a higher ticket": ("schedule.cuh", "    if (ticket < alone) return {ticket / (blocks - 1), -1, 1 + ticket % (blocks - 1)};\n    ticket -= alone;", "    if (ticket >= rows * columns) {\n      ticket -= rows * columns;\n      return {ticket / (blocks - 1), -1, 1 + ticket % (blocks - 1)};\n    }", PLAIN, "ranks"),
    "a ticket is told without a release": ("schedule.cuh", "arrive_in_block_releasing(", "arrive_in_block(", PLAIN, "rank"),
    "a ticket is heard without an acquire": ("schedule.cuh", "await_phase_of_cluster(&barriers.told", "await_phase(&barriers.told", PLAIN, "rank"),
    "a stage is released while it is read": ("pipeline.cuh", "    wgmma_wait<1>();\n    release();\n    unreleased = place.stage;", "    wgmma_wait<1>();\n    unreleased = place.stage;\n    release();", PLAIN, "rank"),
    "a stage is released to one block": ("pipeline.cuh", "thread < CLUSTER) arrive_in_block", "thread < 1) arrive_in_block", PLAIN, "rank"),
    "a stage is filled before it is released": ("pipeline.cuh", "    await_phase(&memory.barriers().empty[place.stage], place.phase ^ 1);\n", "", PLAIN, "rank"),
    "fewer bytes are announced than come": ("pipeline.cuh", "    arrive_expecting(full(), bytes);", "    arrive_expecting(full(), bytes - 128);", PLAIN, "rank"),
    "more bytes are announced than come": ("pipeline.cuh", "Shape::W_BYTES + (own_h ? 0 : Shape::A_BYTES)", "Shape::W_BYTES + Shape::A_BYTES", PLAIN, "rank"),
    "tiles are multiplied before they come": ("pipeline.cuh", "{ await_phase(&memory.barriers().full[at.stage], at.phase); }", "{}", PLAIN, "rank"),
    "barriers are not published": ("pipeline.cuh", "  publish_barriers();\n", "", PLAIN, "rank"),
    "wgmma without a fence": ("low_rank.cuh", "      wgmma_fence();\n      multiply_by_v<Shape::COLUMNS>", "      multiply_by_v", PLAIN, "rank"),
    "sums are read before they are done": ("low_rank.cuh", "    // else the LoRA step follows at once\n    if constexpr (H) stages.finish();", "", PLAIN, "rank"),
    "out's chunks come while tiles of u are read": ("lora_matmul.cuh", "      sync_two_warpgroups(BOTH_CONSUMERS);\n", "", PLAIN, "rank"),
    "tiles of u come while out's chunks are stored": ("lora_matmul.cuh", "        await_stores_read<0>();\n", "", PLAIN, "rank"),
    "out's chunk is not fenced for the TMA": ("epilogue.cuh", "    fence_shared_for_tma();\n", "", PLAIN, "rank"),
    "out's chunk is stored before all have written it": ("epilogue.cuh", "    sync_warpgroup(1 + consumer.consumer);\n    if (leads) store_tile", "    if (leads) store_tile", PLAIN, "rank"),
    "out's chunk is written while it is stored": ("epilogue.cuh", "    if (leads) await_stores_read<STAGINGS - 1>();\n", "", PLAIN, "rank"),
    "a block leaves while it is arrived at": ("lora_matmul.cuh", "  // nor may it leave while another may still arrive at its own\n  sync_cluster();\n", "", PLAIN, "rank"),
    "a block leaves amid its stores": ("lora_matmul.cuh", "  if (consumer.thread() == 0) await_stores();\n", "", PLAIN, "rank"),
    "too many registers": ("shape.cuh", "PRODUCER_REGISTERS = 40", "PRODUCER_REGISTERS = 64", PLAIN, "rank"),
    "scale is lost": ("low_rank.cuh", "round_pair(first * arguments.scale, second * arguments.scale, Element{})", "round_pair(first, second, Element{})", PLAIN, "rank"),
    "dropout's bits are shifted": ("low_rank.cuh", "column_of_pair()) / 2;\n    uint32_t dropped", "column_of_pair()) / 2 + 1;\n    uint32_t dropped", DROPOUT, "rank"),
}  # fmt: skip


def mutant(folder, file, text, instead, shape):
    """The kernel with the one instance <BFloat16, W_ALONG_Q, shape>, and the text in the file replaced."""
    copy = folder / "csrc" / "cuda"
    for part in ("hopper", "kernels"):
        shutil.copytree(CSRC / part, copy / part)

    def replace(name, pattern, by, count=1):
        path = copy / "hopper" / name
        changed, found = re.subn(pattern, lambda _: by, path.read_text(), flags=re.DOTALL)
        assert found == count, f"{name} has {found} of {pattern}"
        path.write_text(changed)

    if text:
        replace(file, re.escape(text), instead)
    replace(
        "lora_matmul.cuh",
        r"  if \(drops\) return launch_with.*?\n}\n",
        f"  return launch_with(Shape<Element, W_ALONG_Q, {shape}>{{}});\n}}\n",
    )
    for others in (r"BFloat16, false", r"Half, true", r"Half, false"):
        signature = f"int launch_shape<{others}>(const HopperPlan&, bool, const Arguments&, void*)"
        replace(
            "lora_matmul.h",
            "extern template " + re.escape(signature) + ";",
            f"template <>\ninline {signature} {{\n  return -2;\n}}",
        )
    source = folder / "tests" / "cuda_shim" / "library.cpp"
    source.parent.mkdir(parents=True)
    source.write_text(
        re.sub(r"#include \S*(_half|_grad_bfloat16).cu\"\n", "", (SHIM / "hopper_library.cpp").read_text())
    )
    return hopper.build(folder, source)


@pytest.mark.parametrize("name", MUTANTS)
def test_whatever_is_wrong_is_seen(tmp_path, name):
    file, text, instead, shape, ranks = MUTANTS[name]
    kernels = mutant(tmp_path, file, text, instead, shape)
    torch.manual_seed(0)
    draws = [draw_matmul("bfloat16", *SHAPES[ranks], False)]
    rest = (1.5, SEED if shape == DROPOUT else None, 0.3 if shape == DROPOUT else 0.0, False)
    outcomes = []
    for seed in range(1, 9):
        try:
            check(
                kernels,
                "lora_matmul",
                "bfloat16",
                draws,
                0,
                *rest,
                turns=Turns(seed, 4 + seed % 3 * 2, seed % 3, sms=4),
            )
        except (AssertionError, hopper.BrokenLaunchError) as error:
            outcomes.append(str(error).splitlines()[0])
            break
    assert (not outcomes) == (not text), outcomes
    print(name, "->", outcomes)
