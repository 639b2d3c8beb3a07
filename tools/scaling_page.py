"""docs/scaling.md and its plots: what was measured on each machine, and what the model says of GPUs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from fused_lora.bench import charts, groups, table
from fused_lora.bench.baselines import FROZEN
from fused_lora.bench.charts import Curve
from fused_lora.bench.results import Results, Row

from . import predict, traffic
from .compiled import Compiled, resident
from .predict import GPUS, Gpu
from .scaling import ADAPTERS, AXES, SWEEPS
from .traffic import Layer

WAYS = (traffic.FROZEN, traffic.OURS, traffic.ADDMM, traffic.EAGER, traffic.PEFT)
_LABELS = {
    "M": "tokens M", "K": "in_features K", "N": "out_features N", "R": "rank R",
    ADAPTERS: "adapters loaded, one active",
}  # fmt: skip


def page(files: Mapping[str, Results], where: Callable[[Results], str], known: Sequence[Compiled] = ()) -> str:
    """files: those of benchmarks/results/scaling/.  where: a line that says what a file was measured on.

    known: what the offline compile found.
    """
    parts = [_INTRODUCTION]
    for name, results in files.items():
        parts.append(_measured(name, results, where(results)))
    parts.append(_kept(files))
    parts.append(_model(known))
    on_gpus = [(results, gpu) for results in files.values() if (gpu := _gpu_of(results)) is not None]
    if on_gpus:
        parts += [_errors(results, gpu, known) for results, gpu in on_gpus]
    else:
        parts.append(
            "### The model's error\n\n**not measured**: no file in `benchmarks/results/scaling/` is a GPU's.\n"
        )
    return "\n".join(parts)


def plots(files: Mapping[str, Results], known: Sequence[Compiled] = ()) -> dict[str, str]:
    """File name -> SVG."""
    made = {}
    for name, results in files.items():
        for axis in AXES:
            made[_plot_name(name, axis)] = _measured_plot(results, axis)
    for axis in AXES[:-1]:
        made[f"scaling-model-{axis}.svg"] = _model_plot(axis, known)
    return made


# --------------------------------------------------------------------------------------------------
# Measured
# --------------------------------------------------------------------------------------------------


def _plot_name(file: str, axis: str) -> str:
    return f"scaling-{file.removesuffix('.json')}-{axis}.svg"


def _points(results: Results, axis: str) -> dict[int, dict[str, Row]]:
    """Value of the axis -> candidate -> row, ascending."""
    found: dict[int, dict[str, Row]] = {}
    for row in results.rows:
        name, _, value = row.shape.split(" ")[0].partition("=")
        if name == axis:
            found.setdefault(int(value), {})[row.candidate] = row
    return dict(sorted(found.items()))


def _measured(name: str, results: Results, where: str) -> str:
    lines = [f"## Measured: {results.environment.device}", "", f"{where}; from `scaling/{name}`.", ""]
    for axis in AXES:
        points = _points(results, axis)
        names = [c for c in groups.candidates_of(results) if c != FROZEN and any(c in rows for rows in points.values())]
        sizes = _sizes(next(iter(next(iter(points.values())).values())).shape)
        fixed = ", ".join(f"{key} {value}" for key, value in sizes.items() if key != axis)
        title = f"{_LABELS[axis]}; {fixed}"
        lines += [f"### By {_LABELS[axis]}", "", f"![{title}](pictures/{_plot_name(name, axis)})", ""]
        lines += [
            f"| {axis} | frozen, ms | {' | '.join(f'{n} ÷ frozen' for n in names)} |",
            "|---" * (len(names) + 2) + "|",
        ]
        for value, rows in points.items():
            cells = [_ratio(rows.get(candidate)) for candidate in names]
            frozen = f"{rows[FROZEN].median_ms:.3g}" if FROZEN in rows else "–"
            lines.append(f"| {value} | {frozen} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _ratio(row: Row | None) -> str:
    return "–" if row is None or row.ratio_to_frozen is None else f"{row.ratio_to_frozen:.2f}"


def _measured_plot(results: Results, axis: str) -> str:
    points = _points(results, axis)
    names = [name for name in groups.candidates_of(results) if name != FROZEN]
    colour = charts.colours(names, groups.our_default(results))
    curves = {}
    for name in names:
        found = [(float(v), rows[name].ratio_to_frozen) for v, rows in points.items() if name in rows]
        curves[name] = Curve([(x, y) for x, y in found if y is not None], colour[name])
    title = f"{results.environment.device}, a step: {_LABELS[axis]}"
    return charts.curve_plot(curves, title, _LABELS[axis], "time ÷ frozen linear's", log_y=False)


def _sizes(shape: str) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"\b([MKNR])=(\d+)", shape.partition("(")[2])}


def _kept(files: Mapping[str, Results]) -> str:
    """Memory: what formulas say is kept for the backward, beside what was counted."""
    lines = [
        "## Memory",
        "",
        "Kept between forward and backward, without parameters: `x` and `h` by ours, so `M · (K + R)` elements: what",
        "`nn.Linear` with a trained W keeps, and the thin `h`. Neither N nor the number of adapters adds to it.",
        "Each adapter takes `R · (K + N)` parameters.",
        "",
    ]
    for name, results in files.items():
        lines += [f"Counted in the runs of `scaling/{name}`:", ""]
        names = groups.candidates_of(results)
        lines += [f"| M, K, N, R | M · (K + R) | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
        for axis in AXES[:-1]:
            for rows in list(_points(results, axis).values())[-1:]:
                first = next(iter(rows.values()))
                sizes = _sizes(first.shape)
                itemsize = 4 if first.dtype == "float32" else 2
                formula = sizes["M"] * (sizes["K"] + sizes["R"]) * itemsize
                cells = [table.size(rows[c].saved_bytes) if c in rows else "–" for c in names]
                lines.append(f"| {', '.join(map(str, sizes.values()))} | {table.size(formula)} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------


def _layers(axis: str) -> dict[int, Layer]:
    sweep = SWEEPS["cuda"]
    middle = Layer(sweep.middle.M, sweep.middle.K, sweep.middle.N, sweep.middle.R)
    return {value: replace(middle, **{axis: value}) for value in sweep.values[axis]}


def _ratio_of(way: str, layer: Layer, gpu: Gpu, known: Sequence[Compiled]) -> float:
    return predict.step_ms(way, layer, gpu, known) / predict.step_ms(traffic.FROZEN, layer, gpu, known)


def _model_plot(axis: str, known: Sequence[Compiled]) -> str:
    gpu = GPUS[1]
    colour = charts.colours([traffic.OURS, *WAYS[2:]], traffic.OURS)
    curves = {
        way: Curve(
            [(float(v), _ratio_of(way, layer, gpu, known)) for v, layer in _layers(axis).items()], colour[way], True
        )
        for way in WAYS[1:]
    }
    title = f"MODEL, not measured: {gpu.name}, a step in 16 bits: {_LABELS[axis]}"
    return charts.curve_plot(curves, title, _LABELS[axis], "time ÷ frozen linear's", log_y=False)


def _model(known: Sequence[Compiled]) -> str:
    middle = SWEEPS["cuda"].middle
    lines = [
        "## A model of GPUs",
        "",
        f'!!! warning "A model, not a measurement"\n    {_ASSUMPTIONS}',
        "",
        "| GPU | TFLOP/s, 16-bit | GB/s | processors |",
        "|---|---|---|---|",
        *(f"| {g.name} | {g.tflops:g} | {g.gb_per_s:g} | {g.device.multiprocessors} |" for g in GPUS),
        "",
        *_tiles(known),
        f"A step's time over the frozen linear's; but for the one that varies, sizes are M {middle.M}, K {middle.K}, "
        f"N {middle.N}, R {middle.R}.",
        "",
    ]
    for axis in AXES[:-1]:
        lines += [
            f"### Model: {_LABELS[axis]}",
            "",
            f"![A model of {GPUS[1].name}](pictures/scaling-model-{axis}.svg)",
            "",
        ]
        lines += [
            f"| {axis} | {' | '.join(f'{g.name}: ours, ms | ÷ frozen | eager ÷ frozen' for g in GPUS)} |",
            "|---" * (1 + 3 * len(GPUS)) + "|",
        ]
        for value, layer in _layers(axis).items():
            cells = [
                f"{predict.step_ms(traffic.OURS, layer, g, known):.3g} | "
                f"{_ratio_of(traffic.OURS, layer, g, known):.2f} | {_ratio_of(traffic.EAGER, layer, g, known):.2f}"
                for g in GPUS
            ]
            lines.append(f"| {value} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _tiles(known: Sequence[Compiled]) -> list[str]:
    """What the offline compile says of the launches with the base product, and what the model takes from it."""
    lines = [
        "What the offline compile ([codegen](codegen.md)) says of our launch with the base product. *Held* is how many "
        "tiles registers and shared memory let one processor have at once; where it is 1, a tile's last writes are not "
        "hidden behind another's products, which the model leaves out. *Rounds* is the tiles of the busiest processor, "
        "*idle* what the others wait for it.",
        "",
        "| GPU | M | work | tile, warps, stages | form | registers | shared KB | held | tiles | rounds | idle | pace |",
        "|---" * 12 + "|",
    ]
    for gpu in GPUS:
        for M, layer in _layers("M").items():
            for work in (predict.FORWARD, predict.INPUT_GRADIENT):
                grid = predict.grid_of(work, layer, gpu, known)
                if grid is None or (found := grid.found) is None:
                    continue
                cells = (
                    gpu.name, M, work, found.tile, found.form, found.registers, found.shared_kb, resident(found),
                    grid.tiles, -(-grid.tiles // grid.multiprocessors), f"{1 - 1 / grid.rounded:.0%}",
                    f"{grid.pace:.2f}",
                )  # fmt: skip
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, ""]


def _gpu_of(results: Results) -> Gpu | None:
    return predict.gpu_called(results.environment.device) if groups.is_gpu(results) else None


def _errors(results: Results, gpu: Gpu, known: Sequence[Compiled]) -> str:
    """Measured beside modelled."""
    lines = [
        f"### The model's error on {results.environment.device}", "",
        "| sizes | way | measured, ms | model, ms | model ÷ measured |", "|---|---|---|---|---|",
    ]  # fmt: skip
    ways: Sequence[tuple[str, str]] = (
        (FROZEN, traffic.FROZEN), (groups.our_default(results), traffic.OURS), ("addmm", traffic.ADDMM),
        ("eager", traffic.EAGER),
    )  # fmt: skip
    for axis in AXES[:-1]:
        for value, rows in _points(results, axis).items():
            for candidate, way in ways:
                if candidate in rows:
                    sizes = _sizes(rows[candidate].shape)
                    layer = Layer(sizes["M"], sizes["K"], sizes["N"], sizes["R"])
                    model = predict.step_ms(way, layer, gpu, known)
                    measured = rows[candidate].median_ms
                    cells = (f"{axis}={value}", candidate, f"{measured:.4g}", f"{model:.4g}", f"{model / measured:.2f}")
                    lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


_INTRODUCTION = """# Scaling

<!-- written by `make report`; edit tools/scaling_page.py instead -->

How the time and the memory of a layer's step (forward and backward) grow with its sizes: the tokens M, in_features K,
out_features N, the rank R, and the number of adapters that are loaded. `make scaling` measures it where you are.
"""

_ASSUMPTIONS = (
    f"A launch takes the longer of its arithmetic at {predict.GEMM_SHARE:.0%} of the datasheet's rate and its memory "
    f"traffic at {predict.MEMORY_SHARE:.0%}, and {predict.START_US:g} µs to start. Operands are read once and results "
    "written once by each launch; caches and waiting are not modelled. The base product comes in the tiles that our "
    "rules choose, for every way alike, and ends with the processor that has the most of them: with few tokens, a "
    "library may split the frozen linear's product better than that. The pace of our tiles is the bare GEMM's times "
    "the ratio of the instructions in their main loops, as the offline compile counts them; where it has not compiled "
    "a tile, the bare GEMM's. But for the library's choice it is a floor: where it errs it should err low."
)
