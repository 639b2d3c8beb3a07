"""Traffic and the model are the arithmetic that they claim; a sweep is measured and published, the model beside it."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch

from fused_lora.bench import measure, runner
from fused_lora.bench.results import Environment, ResultsFile, Row, load_all
from fused_lora.bench.shapes import FORWARD, STEP, Shape
from fused_lora.bench.workloads import LayerWorkload
from fused_lora.codegen import record
from tools import compiled, predict, scaling, traffic
from tools.compiled import resident
from tools.tables import growth, model_error
from tools.traffic import ADDMM, EAGER, FROZEN, OURS, PEFT, Layer

CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
HEADLINE = Layer(8192, 4096, 4096, 16)
SIZES = {"M": (2, 6), "K": (20,), "N": (12,), "R": (3,), "adapters": (1, 3)}
SMALL = scaling.Sweep(Shape("middle", 6, 20, 12, 3, ()), SIZES, "float32")


# ---------------------------------------------------------------- counting


@pytest.mark.parametrize("layer", [HEADLINE, Layer(100, 30, 50, 7, 4)])
def test_ours_moves_what_the_table_of_shapes_counts_and_the_low_rank_products(layer):
    shape = Shape("s", layer.M, layer.K, layer.N, layer.R, ())
    h = layer.M * layer.R * layer.itemsize
    forward, step = traffic.forward(OURS, layer), traffic.forward(OURS, layer) + traffic.backward(OURS, layer)
    assert sum(launch.moved for launch in forward) == shape.bytes(FORWARD, layer.itemsize, lora=True) + h
    # x and dy are both read again for dA and dB, and so are g and h
    again = layer.M * layer.N * layer.itemsize
    assert sum(launch.moved for launch in step) == shape.bytes(STEP, layer.itemsize, lora=True) + again + 4 * h
    assert sum(launch.flops for launch in step) == shape.flops(STEP, lora=True)
    assert (len(forward), len(step)) == (1, 3)


@pytest.mark.parametrize(
    ("way", "name"), [(OURS, "ours-eager"), (ADDMM, "addmm"), (EAGER, "eager"), (FROZEN, "frozen")]
)
def test_what_is_kept_is_what_is_counted_in_a_run(way, name):
    candidate = LayerWorkload(STEP, SMALL.middle, "float32", CPU).candidate(name)
    assert measure.saved_bytes(candidate.call, candidate.parameters) == traffic.kept(way, Layer(6, 20, 12, 3, 4))


def test_peft_keeps_a_float32_copy_of_x():
    candidate = LayerWorkload(STEP, SMALL.middle, "bfloat16+float32", CPU).candidate("peft")
    assert measure.saved_bytes(candidate.call, candidate.parameters) == traffic.kept(PEFT, Layer(6, 20, 12, 3, 2))


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("gpu", predict.GPUS, ids=lambda gpu: gpu.name)
def test_the_model_is_a_roofline(gpu):
    # much arithmetic: the datasheet's rate at its share, until the busiest SM has done its tiles
    tile = predict.grid_of(predict.FORWARD, HEADLINE, gpu).tile
    of_the_busiest = math.ceil(HEADLINE.M * HEADLINE.N / (tile.BLOCK_M * tile.BLOCK_P) / gpu.device.sms)
    flops = 2 * tile.BLOCK_M * tile.BLOCK_P * HEADLINE.K * of_the_busiest * gpu.device.sms
    arithmetic = flops / (gpu.tflops * 1e12 * predict.GEMM_SHARE) * 1e3
    assert predict.forward_ms(FROZEN, HEADLINE, gpu) == pytest.approx(arithmetic + predict.START_US * 1e-3)
    # one token: reading W, at the memory's
    token = Layer(1, 4096, 4096, 16)
    moved = 2 * (4096 * 4096 + 2 * 4096) / (gpu.gb_per_s * 1e9 * predict.MEMORY_SHARE) * 1e3
    assert predict.forward_ms(FROZEN, token, gpu) == pytest.approx(moved + predict.START_US * 1e-3)
    for layer in (HEADLINE, token):
        times = [predict.step_ms(way, layer, gpu) for way in (FROZEN, OURS, ADDMM, EAGER, PEFT)]
        assert times == sorted(times)


def a_launch(registers=128, **fields):
    about = {"arch": 90, "tile": "t", "warps": 8, "schedule": "PUBLISH", "shared_kb": 34, "loop": 100, "plain": 100}
    count = (registers, registers, registers)
    return Row("forward", "R=16", "bfloat16", "ours-triton", 1, *count, unit="registers", extra=about | fields)


def test_what_an_sm_holds_is_bounded_by_registers_memory_and_threads():
    # 65536 registers: 8 warps of 32 threads with 128 each take half of them, one more than that half leaves one
    assert resident(a_launch()) == 2
    assert resident(a_launch(registers=129)) == 1
    # 228 KB, of which each program takes 1 more than its own
    assert resident(a_launch(warps=4, registers=32, shared_kb=75)) == 3
    assert resident(a_launch(warps=4, registers=32, shared_kb=76)) == 2
    # 2048 threads, and on a card for games 1536
    assert resident(a_launch(registers=16, shared_kb=1)) == 8
    assert resident(a_launch(registers=16, shared_kb=1, arch=89)) == 6


def test_the_offline_compile_gives_the_pace_of_our_loop():
    known = growth.compiled_rows({"codegen": load_all(RESULTS, "codegen")})
    assert {row.extra["arch"] for row in known} == {80, 86, 89, 90, 100, 120} == set(compiled.SMS)
    assert all(resident(row) >= 1 for row in known)
    for gpu in predict.GPUS:
        grids = [predict.grid_of(pass_, HEADLINE, gpu, known) for pass_ in (predict.FORWARD, predict.INPUT_GRADIENT)]
        assert all(1 <= grid.pace <= 1.05 and record.sizes(grid.found)["R"] == HEADLINE.R for grid in grids)
    slower = [
        dataclasses.replace(row, extra=row.extra | {"loop": 2 * (row.extra["plain"] or 0)}) for row in known
    ]  # fmt: skip
    h100 = predict.gpu_called("H100")
    assert predict.grid_of(predict.FORWARD, HEADLINE, h100, slower).pace == 2
    times = [predict.forward_ms(OURS, HEADLINE, h100, rows) for rows in ((), known, slower)]
    assert times[0] <= times[1] <= 1.05 * times[0]
    assert times[1] < 0.6 * times[2]
    assert predict.forward_ms(FROZEN, HEADLINE, h100, slower) == predict.forward_ms(FROZEN, HEADLINE, h100)
    # tiles that have not been compiled, and decode, which has no tiles of this kind
    assert predict.grid_of(predict.FORWARD, dataclasses.replace(HEADLINE, R=256), h100, known).pace == 1
    assert predict.grid_of(predict.FORWARD, dataclasses.replace(HEADLINE, M=1), h100, known) is None


def test_gpus_are_known_by_the_drivers_names():
    assert predict.gpu_called("NVIDIA H100 80GB HBM3").name == "H100 SXM"
    assert predict.gpu_called("NVIDIA A100-SXM4-80GB").name == "A100 80 GB SXM"
    assert predict.gpu_called("NVIDIA GeForce RTX 4090").name == "RTX 4090"
    assert predict.gpu_called("AMD EPYC") is None


# ---------------------------------------------------------------- a sweep


@pytest.fixture
def swept(tmp_path, monkeypatch):
    monkeypatch.setitem(scaling.SWEEPS, "cpu", SMALL)
    monkeypatch.setattr(measure, "plan_for", lambda device, quick: measure.Plan(0.0, 2, 2, 0.0))
    path = tmp_path / "scaling.json"
    assert scaling.main(["--device", "cpu", "--seconds", "0", "--out", str(path)]) == 0
    return {"scaling": {"scaling.json": ResultsFile.load(path)}, "codegen": {}, "layers": {}}


def test_every_place_of_a_sweep_is_measured_and_published(swept):
    page = growth.measured(swept)
    for axis, values in SMALL.values.items():
        table = re.search(rf"### By [^\n]*\n\n!\[[^\n]*-{axis}\.svg\)\n\n(.*?)\n(\n|$)", page, re.DOTALL)[1]
        assert [int(line.split("|")[1]) for line in table.splitlines()[2:]] == list(values)
    assert "**not measured**: no file in `benchmarks/results/` is a GPU's" in model_error.errors(swept, [])
    assert "A model, not a measurement" in growth.model(swept)
    # the frozen baseline keeps nothing, ours x and h
    kept = growth.kept(swept)
    assert re.search(r"\| 6, 20, 12, 3 \| 552 B \| 0 B \| 552 B", kept)
    plots = growth.plots(swept)
    assert len(plots) == 5 + 4
    assert all("MODEL, not measured" in plot for name, plot in plots.items() if "model" in name)


def test_a_gpus_file_is_set_beside_the_model(swept):
    (file,) = swept["scaling"].values()
    gpu = Environment("NVIDIA H100 80GB HBM3", "2.13.0", "3.7.1", "13.0", "3.11.7", 8, "2026-02-28")
    files = swept | {"scaling": {"gpu.json": dataclasses.replace(file, environment=gpu)}}
    found = model_error.errors(files, [])
    assert "not measured" not in found
    row = next(row for row in file.rows if row.candidate == "frozen" and row.shape.startswith("M=6"))
    model = predict.step_ms(FROZEN, Layer(6, 20, 12, 3), predict.gpu_called("H100"))
    assert f"| M=6 | frozen | {row.median:.4g} | {model:.4g} | {model / row.median:.2f} |" in found


def test_a_gpus_layers_are_set_beside_the_model():
    gpu = Environment("NVIDIA H100 80GB HBM3", "2.13.0", "3.7.1", "13.0", "3.11.7", 8, "2026-02-28")
    h100, layer = predict.gpu_called(gpu.device), Layer(8192, 4096, 4096, 16)
    twice = 2 * predict.step_ms(FROZEN, layer, h100)
    rows = [
        Row("step", f"{name} (M=8192 K=4096 N=4096 R=16)", "bfloat16", candidate, 5, ms, ms, ms)
        for name, ms in (("one", twice), ("other", twice / 4))
        for candidate in ("frozen", "ours-triton", "addmm")
    ]
    rows += [dataclasses.replace(row, dtype="bfloat16+float32", median=9.0, p80=9.0) for row in rows]
    file = ResultsFile("layers", "fused-lora bench", gpu, rows)
    found = model_error.errors({"layers": {"gpu.json": file}, "scaling": {}}, [])
    assert "| step | frozen | 2 | 1.25 | 0.80–1.70 | 0.50–2.00 |" in found
    # ours and addmm took as long: the model that has ours ahead is right by the order of names
    assert "the model says right in 2 of 2 groups" in found


def test_adapters_that_are_loaded_change_no_result():
    workload = scaling.ScalingWorkload("adapters", 3, SMALL, CPU)
    group = runner.run_group(workload, measure.Plan(0.0, 2, 2, 0.0))
    assert group.failed == {}
    assert {row.candidate for row in group.rows} == {*scaling.WANTED, group.ours}
    layer = workload.candidate(group.ours).parameters
    assert layer == workload.weights.parameters
