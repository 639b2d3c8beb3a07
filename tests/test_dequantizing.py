"""Which kernel dequantizes 4-bit weights: bitsandbytes' own, and ours where a GPU was measured to be faster with it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import quantized_layers
import torch

from fused_lora import backends, quantized
from fused_lora.bench import dequantizing, measure, runner
from fused_lora.bench.groups import groups_of, is_gpu, standing
from fused_lora.bench.results import Environment, ResultsFile, Row, load_all
from fused_lora.quantized import bitsandbytes

pytest.importorskip("triton")
CPU, ROOT = torch.device("cpu"), Path(__file__).parents[1]
FOUR_BITS = [name for name, make in quantized_layers.KINDS.items() if "int" not in name and "fp8" not in name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", FOUR_BITS)
def test_every_layer_of_four_bits_has_the_librarys_bits_by_our_kernel(kind, dtype, monkeypatch):
    layer = quantized_layers.KINDS[kind](128, 72)
    expected = quantized_layers.values(layer, dtype)
    monkeypatch.setattr(bitsandbytes, "our_kernel_serves", lambda *_: True)
    monkeypatch.setattr(bitsandbytes, "by_the_library", None)
    assert torch.equal(quantized_layers.values(layer, dtype), expected)


def test_ours_serves_on_gpus_where_it_was_measured_to_be_faster_and_nobody_watches(monkeypatch):
    data = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "why_not", lambda *_: None)
    serves = bitsandbytes.our_kernel_serves
    assert not serves(data, torch.bfloat16)
    monkeypatch.setattr(bitsandbytes, "OURS_IS_FASTER", frozenset({(9, 0)}))
    assert serves(data, torch.bfloat16)
    assert not serves(torch.zeros(1), torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not serves(data, torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(bitsandbytes, "watched", lambda: True)
        assert not serves(data, torch.bfloat16)
    monkeypatch.setattr(backends, "why_not", lambda *_: "Triton is not installed")
    assert not serves(data, torch.bfloat16)


def measured_ahead(files):
    """Compute capabilities of which every file has ours clearly ahead in every row."""
    found = {}
    for file in filter(is_gpu, files):
        groups = [group for group in groups_of(file) if group.pass_ == dequantizing.DEQUANTIZE]
        places = [standing(replace(group, ours=dequantizing.OURS)) for group in groups]
        # older files tell no capability, and have no such rows
        if places:
            major, minor = file.environment.compute_capability.split(".")
            found.setdefault((int(major), int(minor)), []).extend(place is not None and place.won for place in places)
    return {capability for capability, won in found.items() if all(won)}


def test_the_gpus_with_our_kernel_are_those_of_the_results_files():
    assert measured_ahead(load_all(ROOT / "benchmarks" / "results", "layers").values()) == bitsandbytes.OURS_IS_FASTER


def test_what_counts_as_measured_ahead():
    def file(ours, library):
        about = (dequantizing.DEQUANTIZE, "nf4", "bfloat16")
        rows = [
            Row(*about, name, 9, time, time * 0.99, time * 1.01)
            for name, time in ((dequantizing.OURS, ours), (dequantizing.LIBRARY, library))
        ]
        environment = Environment("A GPU", "2.13", "3.7.1", "13.0", "3.11", 1, "2026-01-01")
        object.__setattr__(environment, "compute_capability", "9.0")
        return ResultsFile("layers", "make gpu", environment, rows)

    assert measured_ahead([file(1.0, 1.5)]) == {(9, 0)}
    assert measured_ahead([file(1.0, 1.01)]) == measured_ahead([file(1.0, 1.5), file(1.5, 1.0)]) == set()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_make_gpu_times_both_on_the_same_bytes(dtype):
    workload = dequantizing.DequantizeWorkload(*dequantizing.SIZES["cpu"][0], dtype, CPU)
    group = runner.run_group(workload, measure.Plan(0.0, 2, 2, 0.0), dry=True)
    assert (group.failed, group.absent) == ({}, {})
    assert {row.candidate for row in group.rows} == {"ours-triton", "bitsandbytes"}
    # q, 128 scales of a byte, the scale of those, both codes, the offset; then the result
    assert workload.useful("ours-triton") == (0, 64 * 64 + 128 + 4 + 4 * (16 + 256) + 4 + 2 * 64 * 128)


def test_a_wrong_kernel_gets_no_time(monkeypatch):
    wrong = dequantizing._WAYS | {dequantizing.OURS: lambda *args: bitsandbytes.by_the_library(*args) * 1.01}
    monkeypatch.setattr(dequantizing, "_WAYS", wrong)
    workload = dequantizing.DequantizeWorkload(64, 128, "bfloat16", CPU)
    group = runner.run_group(workload, measure.Plan(0.0, 2, 2, 0.0), dry=True)
    assert list(group.failed) == ["ours-triton"]
    assert "is off by" in group.failed["ours-triton"]


def test_where_the_library_is_missing_ours_is_timed_alone(monkeypatch):
    monkeypatch.setattr(type(quantized.KINDS["4-bit"]), "problem", lambda self: "bitsandbytes must be 0.50 or newer")
    workload = dequantizing.DequantizeWorkload(64, 128, "bfloat16", CPU)
    group = runner.run_group(workload, measure.Plan(0.0, 2, 2, 0.0), dry=True)
    assert [row.candidate for row in group.rows] == ["ours-triton"]
    assert group.absent == {"bitsandbytes": "bitsandbytes must be 0.50 or newer"}
