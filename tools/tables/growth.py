"""docs/scaling.md's tables and plots: what was measured on each machine, and what the model says of GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fused_lora.bench import charts
from fused_lora.bench.baselines import FROZEN
from fused_lora.bench.charts import Curve
from fused_lora.bench.groups import candidates_of, our_default
from fused_lora.bench.results import ResultsFile, Row
from fused_lora.bench.table import NOTHING, markdown, size
from fused_lora.codegen.record import sizes

from .. import predict, traffic
from ..compiled import resident
from ..files import NOT_MEASURED, Files, source
from ..predict import GPUS, Gpu
from ..scaling import ADAPTERS, AXES, SWEEPS
from ..traffic import Layer

WAYS = (traffic.FROZEN, traffic.OURS, traffic.ADDMM, traffic.EAGER, traffic.PEFT)
_LABELS = {
    "M": "tokens M", "K": "in_features K", "N": "out_features N", "R": "rank R",
    ADAPTERS: "adapters loaded, one active",
}  # fmt: skip
_Y_LABEL = "time ÷ frozen baseline's"


def plots(files: Files) -> dict[str, str]:
    """File name -> SVG."""
    made = {}
    for name, file in files["scaling"].items():
        for axis in AXES:
            made[_plot_name(name, axis)] = _measured_plot(file, axis)
    for axis in AXES[:-1]:
        made[f"scaling-model-{axis}.svg"] = _model_plot(axis, compiled_rows(files))
    return made


def compiled_rows(files: Files) -> list[Row]:
    """What the offline compile found, by the newest file."""
    return next((file.rows for file in files["codegen"].values()), [])


# --------------------------------------------------------------------------------------------------
# Measured
# --------------------------------------------------------------------------------------------------


def _plot_name(file: str, axis: str) -> str:
    return f"scaling-{Path(file).stem}-{axis}.svg"


def _points(file: ResultsFile, axis: str) -> dict[int, dict[str, Row]]:
    """Value of the axis -> candidate -> row, ascending."""
    found: dict[int, dict[str, Row]] = {}
    for row in file.rows:
        name, _, value = row.shape.split(" ")[0].partition("=")
        if name == axis:
            found.setdefault(int(value), {})[row.candidate] = row
    return dict(sorted(found.items()))


def measured(files: Files) -> str:
    parts = []
    for name, file in files["scaling"].items():
        parts += [f"## Measured: {file.environment.device}\n", source(name, file) + "\n"]
        parts += [_by_axis(name, file, axis) for axis in AXES]
    return "\n".join(parts) or f"## Measured\n\n{NOT_MEASURED}.\n"


def _by_axis(name: str, file: ResultsFile, axis: str) -> str:
    points = _points(file, axis)
    rows = [row for by in points.values() for row in by.values()]
    names = [candidate for candidate in candidates_of(rows) if candidate != FROZEN]
    fixed = ", ".join(f"{key} {value}" for key, value in _sizes(rows[0]).items() if key != axis)
    title = f"{_LABELS[axis]}; {fixed}"
    lines = []
    for value, by in points.items():
        frozen = f"{by[FROZEN].median:.3g}" if FROZEN in by else NOTHING
        lines.append([value, frozen, *(_ratio(by.get(candidate)) for candidate in names)])
    head = f"### By {_LABELS[axis]}\n\n![{title}](pictures/{_plot_name(name, axis)})\n\n"
    return head + markdown([axis, "frozen, ms", *(f"{n} ÷ frozen" for n in names)], lines)


def _ratio(row: Row | None) -> str:
    return NOTHING if row is None or row.ratio is None else f"{row.ratio.median:.2f}"


def _measured_plot(file: ResultsFile, axis: str) -> str:
    points = _points(file, axis)
    names = [name for name in candidates_of(file.rows) if name != FROZEN]
    colour = charts.colours(names, our_default(file))
    curves = {}
    for name in names:
        ratios = [(float(value), by[name].ratio) for value, by in points.items() if name in by]
        curves[name] = Curve([(x, ratio.median) for x, ratio in ratios if ratio is not None], colour[name])
    title = f"{file.environment.device}, a step: {_LABELS[axis]}"
    return charts.as_svg(charts.curve_figure(curves, title, _LABELS[axis], _Y_LABEL), title)


def _sizes(row: Row) -> dict[str, int]:
    """Without the axis and its value, with which the shape begins."""
    return sizes(replace(row, shape=row.shape.partition("(")[2]))


def kept(files: Files) -> str:
    """What formulas say is kept for the backward, beside what was counted."""
    parts = []
    for name, file in files["scaling"].items():
        names, lines = candidates_of(file.rows), []
        for axis in AXES[:-1]:
            by = list(_points(file, axis).values())[-1]
            first = next(iter(by.values()))
            found = _sizes(first)
            formula = found["M"] * (found["K"] + found["R"]) * (4 if first.dtype == "float32" else 2)
            counted = [size(by[candidate].saved_bytes) if candidate in by else NOTHING for candidate in names]
            lines.append([", ".join(map(str, found.values())), size(formula), *counted])
        parts.append(f"{source(name, file)}\n\n{markdown(['M, K, N, R', 'M · (K + R)', *names], lines)}")
    return "\n".join(parts) or f"{NOT_MEASURED}.\n"


# --------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------


def _layers(axis: str) -> dict[int, Layer]:
    sweep = SWEEPS["cuda"]
    middle = Layer(sweep.middle.M, sweep.middle.K, sweep.middle.N, sweep.middle.R)
    return {value: replace(middle, **{axis: value}) for value in sweep.values[axis]}


def _ratio_of(way: str, layer: Layer, gpu: Gpu, known: Sequence[Row]) -> float:
    return predict.step_ms(way, layer, gpu, known) / predict.step_ms(traffic.FROZEN, layer, gpu, known)


def _model_plot(axis: str, known: Sequence[Row]) -> str:
    gpu = GPUS[1]
    colour = charts.colours([traffic.OURS, *WAYS[2:]], traffic.OURS)
    curves = {
        way: Curve(
            [(float(v), _ratio_of(way, layer, gpu, known)) for v, layer in _layers(axis).items()], colour[way], True
        )
        for way in WAYS[1:]
    }
    title = f"MODEL, not measured: {gpu.name}, a step in 16 bits: {_LABELS[axis]}"
    return charts.as_svg(charts.curve_figure(curves, title, _LABELS[axis], _Y_LABEL), title)


def model(files: Files) -> str:
    known, middle = compiled_rows(files), SWEEPS["cuda"].middle
    gpus = [(g.name, f"{g.tflops:g}", f"{g.gb_per_s:g}", g.device.sms) for g in GPUS]
    parts = [
        f'!!! warning "A model, not a measurement"\n    {_ASSUMPTIONS}\n',
        markdown(["GPU", "TFLOP/s, 16-bit", "GB/s", "SMs"], gpus),
        _tiles(known),
        f"A step's time over the frozen baseline's; but for the one that varies, sizes are M {middle.M}, K {middle.K}, "
        f"N {middle.N}, R {middle.R}.\n",
    ]
    heads = [f"{g.name}: {what}" for g in GPUS for what in ("ours, ms", "ours ÷ frozen", "eager ÷ frozen")]
    for axis in AXES[:-1]:
        lines = [[value, *_modelled(layer, known)] for value, layer in _layers(axis).items()]
        picture = f"![A model of {GPUS[1].name}](pictures/scaling-model-{axis}.svg)"
        parts.append(f"### Model: {_LABELS[axis]}\n\n{picture}\n\n{markdown([axis, *heads], lines)}")
    return "\n".join(parts)


def _modelled(layer: Layer, known: Sequence[Row]) -> list[str]:
    found = []
    for gpu in GPUS:
        ratios = (f"{_ratio_of(way, layer, gpu, known):.2f}" for way in (traffic.OURS, traffic.EAGER))
        found += [f"{predict.step_ms(traffic.OURS, layer, gpu, known):.3g}", *ratios]
    return found


def _tiles(known: Sequence[Row]) -> str:
    """What the offline compile says of the launches with the base product, and what the model takes from it."""
    lines = []
    for gpu in GPUS:
        for M, layer in _layers("M").items():
            for pass_ in (predict.FORWARD, predict.INPUT_GRADIENT):
                grid = predict.grid_of(pass_, layer, gpu, known)
                if grid is None or (found := grid.found) is None:
                    continue
                about = found.extra
                lines.append([
                    gpu.name, M, pass_, about["tile"], about["schedule"], f"{found.median:g}", about["shared_kb"],
                    resident(found), grid.tiles, -(-grid.tiles // grid.sms), f"{1 - 1 / grid.rounded:.0%}",
                    f"{grid.pace:.2f}",
                ])  # fmt: skip
    heads = (
        "GPU", "M", "pass", "tile, warps, stages", "schedule", "registers", "shared KB", "held", "tiles", "rounds",
        "idle", "pace",
    )  # fmt: skip
    return f"{_COMPILED}\n\n{markdown(heads, lines)}"


_ASSUMPTIONS = (
    f"A launch takes the longer of its arithmetic at {predict.GEMM_SHARE:.0%} of the datasheet's rate and its memory "
    f"traffic at {predict.MEMORY_SHARE:.0%}, and {predict.START_US:g} µs to start. Operands are read once and results "
    "written once by each launch; caches and waiting are not modelled. The base product comes in the tiles that our "
    "rules choose, for every way alike, and ends with the SM that has the most of them: at small M, a library may "
    "split the frozen baseline's product better than that. The pace of our tiles is the bare GEMM's times the ratio of "
    "the instructions in their main loops, as the offline compile counts them; where it has not compiled a tile, the "
    "bare GEMM's. But for the library's choice it is a lower bound: where it errs it should err low."
)
_COMPILED = (
    "What the offline compile ([codegen](codegen.md)) says of our launch with the base product. *Held* is how many "
    "tiles registers and shared memory let one SM have at once; where it is 1, a tile's last writes are not hidden "
    "behind another's products, which the model leaves out. *Rounds* is the tiles of the busiest SM, *idle* what the "
    "others wait for it."
)
