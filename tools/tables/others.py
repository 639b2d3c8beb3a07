"""Tables of the smaller results files: repeats, PEFT models, compiled steps, many ranks, the offline compile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from fused_lora.bench.baselines import FROZEN, OURS_PREFIX, PEFT
from fused_lora.bench.groups import groups_of
from fused_lora.bench.results import ResultsFile, Row, Spread
from fused_lora.bench.shapes import FORWARD, TRAIN
from fused_lora.bench.table import NOTHING, markdown, size
from fused_lora.codegen import record

from ..files import NOT_MEASURED, Files, path_of, source

_WITHIN_ROUNDS = (
    "A ratio is the median of the ratios within each round, with its 20th to 80th percentile, so what slows the "
    "machine down for a while cancels: it is not the ratio of the two medians beside it."
)
SUITE = Path(__file__).parents[2] / "tests" / "peft_suite" / "results.json"


def _of_each(files: Files, kind: str, make: Callable[[str, ResultsFile], str]) -> str:
    """What is made of every file of a kind."""
    return "\n".join(make(name, file) for name, file in files[kind].items()) or f"{NOT_MEASURED}.\n"


# --------------------------------------------------------------------------------------------------
# The compiled extension, measured several times
# --------------------------------------------------------------------------------------------------


def repeats(files: Files) -> str:
    def make(name: str, file: ResultsFile) -> str:
        lines = []
        for group in groups_of(file):
            ours, eager = (_repeated(group.rows, OURS_PREFIX + impl) for impl in ("native", "eager"))
            columns = ((ours, FROZEN), (ours, PEFT), (eager, FROZEN))
            lines.append([group.short_title, *(_medians(rows, base) for rows, base in columns)])
        heads = ["", "ours-native ÷ frozen", "ours-native ÷ peft", "ours-eager ÷ frozen"]
        return f"{source(name, file)}\n\n{markdown(heads, lines)}"

    return _of_each(files, "native", make)


def repeats_in_words(name: str, file: ResultsFile) -> str:
    """Of RichBoyNet's training step, whose spread is the largest."""
    rows = [row for row in _repeated(file.rows, f"{OURS_PREFIX}native") if row.pass_ == TRAIN]
    return (
        f"RichBoyNet's step by `ours-native`, measured {len(rows)} more times on {file.environment.device}: "
        f"{_medians(rows, FROZEN)} of the frozen network's, {_medians(rows, PEFT)} of PEFT's "
        f"([native/{name}]({path_of(name, file)}))."
    )


def _repeated(rows: list[Row], candidate: str) -> list[Row]:
    return sorted((row for row in rows if row.candidate == candidate), key=lambda row: row.repeat)


def _medians(rows: list[Row], base: str) -> str:
    return ", ".join(f"{row.ratios[base].median:.2f}" for row in rows)


# --------------------------------------------------------------------------------------------------
# PEFT
# --------------------------------------------------------------------------------------------------


def peft_steps(files: Files) -> str:
    def make(name: str, file: ResultsFile) -> str:
        lines = []
        for group in groups_of(file):
            by = {row.candidate: row for row in group.rows}
            peft, fused = by[PEFT], by["fused"]
            memory = [size(row.saved_bytes) for row in (peft, fused)]
            times = [f"{row.median:.4g}" for row in (peft, fused)]
            lines.append([group.shape, group.dtype, *times, _ratio(fused.ratios[PEFT]), *memory])
        heads = ["model", "dtype", "PEFT, ms", "fused, ms", "fused ÷ PEFT", "PEFT keeps", "fused keeps"]
        return f"{source(name, file)}\n\n{markdown(heads, lines)}"

    return _of_each(files, "peft", make)


def quantized_steps(files: Files) -> str:
    """Over a base of few bits; memory is what a call takes above the model."""

    def make(name: str, file: ResultsFile) -> str:
        lines = []
        for group in groups_of(file):
            by = {row.candidate: row for row in group.rows}
            peft, ours = by[PEFT], (by["ours"], by["peft fused"])
            ratios = [_ratio(row.ratios[PEFT]) for row in ours]
            peaks = [size(row.peak_bytes) for row in (peft, *ours)]
            lines.append([f"{group.pass_}, {group.shape}", group.dtype, f"{peft.median:.4g}", *ratios, *peaks])
        heads = ["", "base, dtype", "PEFT, ms", "ours ÷ PEFT", "PEFT's fused ÷ PEFT"]
        heads += [f"{whose}, peak" for whose in ("PEFT", "ours", "PEFT's fused")]
        return f"{source(name, file)} {_WITHIN_ROUNDS}\n\n{markdown(heads, lines)}"

    return _of_each(files, "quantized", make)


def _ratio(ratio: Spread) -> str:
    return f"{ratio.median:.2f} ({ratio.p20:.2f}–{ratio.p80:.2f})"


def peft_suite(files: Files) -> str:
    """Of `make test-peft`, which has a file of its own kind: outcomes of tests, no times."""
    found = json.loads(SUITE.read_text(encoding="utf-8"))
    per_file, gradients = found["files"].values(), found["gradients"]
    tests, fused, dropout = (
        sum(one[key] for one in per_file) for key in ("tests", "tests_with_a_fused_call", "calls_with_nn_dropout")
    )
    left, other = (
        sum(sum(one[key].values()) for one in per_file) for key in ("calls_left_to_peft", "calls_of_other_layers")
    )
    worse = len(found["worse_fused"])
    return (
        f"- {tests:,} tests in {len(per_file)} files. {fused:,} of them make a fused call, {found['fused_calls']:,} in "
        f"all; {dropout:,} more calls are ours, but take\n  the mask of `nn.Dropout` on little data.\n"
        f"- {left:,} calls of fused layers run PEFT's code, each for a reason that the file counts: disabled, merged, "
        f"DoRA and other\n  variants, mixed batches. {other:,} calls are of layers that are never fused: AdaLoRA's, "
        f"convolutions, embeddings.\n"
        f"- {f'{worse} tests do' if worse else 'No test does'} worse fused. {len(found['fail_both_ways'])} fail both "
        f"ways, with the same messages; most ask the hub for more.\n"
        f"- Gradients: {gradients['tests']} models and configurations agree, {gradients['tests_with_a_fused_call']} of "
        f"them with a fused call.\n"
    )


# --------------------------------------------------------------------------------------------------
# torch.compile, many ranks, the offline compile
# --------------------------------------------------------------------------------------------------


def compiled_steps(files: Files) -> str:
    def make(name: str, file: ResultsFile) -> str:
        lines = []
        for group in groups_of(file):
            by = {row.candidate: row for row in group.rows}
            if "compiled" not in by:
                continue
            eager, compiled, frozen = by["eager"], by["compiled"], by.get("frozen compiled")
            times = (f"{row.median:.0f} ({row.p20:.0f}–{row.p80:.0f})" for row in (eager, compiled))
            base = NOTHING if frozen is None else _ratio(frozen.ratios["frozen eager"])
            lines.append([f"{group.shape}, {group.dtype}", *times, _ratio(compiled.ratios["eager"]), base])
        heads = ["step", "eager, µs", "compiled, µs", "compiled ÷ eager", "frozen base: compiled ÷ eager"]
        return f"{source(name, file)} {_WITHIN_ROUNDS}\n\n{markdown(heads, lines)}"

    return _of_each(files, "overhead", make)


def cost_of_a_call(files: Files) -> str:
    def make(name: str, file: ResultsFile) -> str:
        by = {row.candidate: row for row in file.rows if row.pass_ == FORWARD}
        ours, linear = by["ours"], by["linear"]
        return (
            f"A call of the layer without gradients, {ours.shape}, takes {ours.median:.1f} µs, "
            f"{ours.median - linear.median:.1f} µs more than `nn.Linear`'s, its two low-rank products included.\n"
        )

    return _of_each(files, "overhead", make)


def memory_by_strategy(files: Files) -> str:
    def make(name: str, file: ResultsFile) -> str:
        lines = []
        for row in file.rows:
            held = (row.extra[f"{part}_bytes"] for part in ("frozen", "adapters", "gradients", "optimizer"))
            peak = f"{row.median / 1e6:.2f} ({row.p20 / 1e6:.2f}–{row.p80 / 1e6:.2f})"
            lines.append([row.candidate, *(f"{count / 1e6:.2f}" for count in held), peak])
        heads = ["MB on a rank", "base", "adapters", "gradients", "Adam", "peak of a step, on top"]
        about = f"{file.settings['ranks']} processes on a CPU share {file.rows[0].shape}, {file.rows[0].dtype}. "
        peaks = f" Peaks: median and p20–p80 of {file.rows[0].rounds} steps."
        return f"{about}{source(name, file)}{peaks}\n\n{markdown(heads, lines)}"

    return _of_each(files, "distributed", make)


def launches(files: Files) -> str:
    return _of_each(files, "codegen", lambda name, file: record.table(file))
