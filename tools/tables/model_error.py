"""How far the model of ``predict.py`` is from what was measured: of layers, and of sweeps.

Nothing is chosen by the model. ``impl="auto"`` chooses by the measured times themselves (``choices.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fused_lora.bench.baselines import EAGER, FROZEN
from fused_lora.bench.groups import Group, groups_of, has_wall, is_gpu, our_default
from fused_lora.bench.results import ResultsFile, Row, Spread
from fused_lora.bench.table import markdown

from .. import predict, traffic
from ..files import NOT_MEASURED, Files, path_of
from ..predict import Gpu
from ..scaling import ADAPTERS
from ..traffic import Layer
from .choices import SIZES, asked_of

_MIXED = (
    " The file's times are between two events on the device, and hold the host's where a call costs the host more, of "
    "which the model knows nothing: the smaller the layer, the lower its answer."
)


def errors(files: Files, known: Sequence[Row]) -> str:
    """Measured beside modelled.  known: what the offline compile found."""
    parts = []
    for kind, told in (("layers", _of_layers), ("scaling", _of_a_sweep)):
        for name, file in files[kind].items():
            gpu = predict.gpu_called(file.environment.device)
            if is_gpu(file) and gpu is not None:
                head = f"On {file.environment.device}, {file.environment.date}, `{path_of(name, file)}`"
                parts.append(f"{head}{told(file, gpu, known)}")
    return "\n".join(parts) or f"{NOT_MEASURED}: no file in `benchmarks/results/` is a GPU's.\n"


def _ways(file: ResultsFile) -> Mapping[str, str]:
    """Candidate -> the way that the model has for it."""
    return {FROZEN: traffic.FROZEN, our_default(file): traffic.OURS, "addmm": traffic.ADDMM, EAGER: traffic.EAGER}


def _of_layers(file: ResultsFile, gpu: Gpu, known: Sequence[Row]) -> str:
    ways, lines = _ways(file), []
    right = compared = 0
    for pass_, modelled_ms in (("forward", predict.forward_ms), ("step", predict.step_ms)):
        found: dict[str, list[float]] = {name: [] for name in ways}
        for group in _in_16_bits(file, pass_):
            timed = {row.candidate: row.median for row in group.rows if row.candidate in ways}
            modelled = _modelled(group, [*timed], ways, modelled_ms, gpu, known)
            for name, ms in timed.items():
                found[name].append(modelled[name] / ms)
            if {our_default(file), "addmm"} <= timed.keys():
                compared += 1
                right += _quicker(timed, file) == _quicker(modelled, file)
        for name, ratios in found.items():
            if len(ratios) > 1:
                spread = Spread.of(ratios)
                ends = f"{min(ratios):.2f}–{max(ratios):.2f}"
                middle = f"{spread.median:.2f}", f"{spread.p20:.2f}–{spread.p80:.2f}"
                lines.append([pass_, name, len(ratios), *middle, ends])
    told = (
        f". Which of `{our_default(file)}` and addmm is faster, the model says right in {right} of {compared} groups: "
        f"nothing is chosen by it.{'' if has_wall(file) else _MIXED}\n"
    )
    heads = ["pass", "way", "shapes", "model ÷ measured: median", "p20–p80", "least and most"]
    return f"{told}\n{markdown(heads, lines)}"


def _in_16_bits(file: ResultsFile, pass_: str) -> list[Group]:
    """Those groups of a pass whose operands are all of 16 bits, as the model's are; a decode is a forward."""
    wanted = ("forward", "decode") if pass_ == "forward" else (pass_,)
    return [
        group for group in groups_of(file)
        if group.pass_ in wanted and group.dtype in ("bfloat16", "float16") and asked_of(group) is not None
    ]  # fmt: skip


def _modelled(
    group: Group, names: Sequence[str], ways: Mapping[str, str], ms: Callable[..., float], gpu: Gpu,
    known: Sequence[Row],
) -> dict[str, float]:  # fmt: skip
    asked = asked_of(group)
    assert asked is not None
    layer = Layer(asked.M, asked.K, asked.N, asked.R)
    return {name: ms(ways[name], layer, gpu, known) for name in names}


def _quicker(times: Mapping[str, float], file: ResultsFile) -> str:
    return min((our_default(file), "addmm"), key=lambda name: times[name])


def _of_a_sweep(file: ResultsFile, gpu: Gpu, known: Sequence[Row]) -> str:
    ways, lines = _ways(file), []
    for row in file.rows:
        sizes = SIZES.search(row.shape)
        if sizes is not None and row.candidate in ways and not row.shape.startswith(ADAPTERS):
            modelled = predict.step_ms(ways[row.candidate], Layer(*map(int, sizes.groups())), gpu, known)
            numbers = (f"{row.median:.4g}", f"{modelled:.4g}", f"{modelled / row.median:.2f}")
            lines.append([row.shape.split(" ")[0], row.candidate, *numbers])
    heads = ["sizes", "way", "measured, ms", "model, ms", "model ÷ measured"]
    return f":\n\n{markdown(heads, lines)}"
