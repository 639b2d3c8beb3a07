"""Results files: the one schema, what is refused, and what their names say."""

import os
from pathlib import Path

import pytest
import torch
from test_bench import ENVIRONMENT, a_row, arguments

from fused_lora import bench
from fused_lora.bench import results
from fused_lora.bench.results import Environment, ResultsFile

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def test_results_come_back_from_disk(tmp_path):
    path = tmp_path / "folder" / "results.json"
    file = ResultsFile("layers", "fused-lora bench", ENVIRONMENT)
    file.add([a_row(), a_row(candidate="frozen", saved_bytes=None)])
    file.save(path)
    assert ResultsFile.load(path) == file
    assert ResultsFile.open(path, "layers", "", ENVIRONMENT) == file
    assert os.listdir(path.parent) == ["results.json"]


def test_a_group_that_is_measured_again_replaces_its_rows():
    file = ResultsFile("layers", "fused-lora bench", ENVIRONMENT)
    file.add([a_row(candidate="a"), a_row(candidate="b")])
    file.add([a_row(shape="other")])
    file.add([a_row(candidate="a", median=7.0, p80=7.0)])
    assert [(row.shape, row.candidate, row.median) for row in file.rows] == [
        ("other", "eager", 2.0),
        ("s", "a", 7.0),
    ]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    ResultsFile("layers", "fused-lora bench", ENVIRONMENT).save(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        ResultsFile("layers", "fused-lora bench", ENVIRONMENT, [a_row()]).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["results.json"]


OTHER_FILES = [
    "", "[]", '{"rows": []}', '{"environment": {}, "rows": []}', '{"format": "fused_lora results, 0", "rows": []}'
]  # fmt: skip


@pytest.mark.parametrize("text", OTHER_FILES)
def test_another_file_is_neither_read_nor_overwritten(tmp_path, text, capsys):
    path = tmp_path / "notes.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"notes\.json must be a results file"):
        ResultsFile.load(path)
    assert bench.run(arguments("--device", "cpu", "--quick", "--out", str(path))) == 2
    assert "must be a results file" in capsys.readouterr().err
    assert path.read_text() == text


def test_results_of_another_environment_are_not_overwritten(tmp_path):
    path = tmp_path / "results.json"
    ResultsFile("layers", "fused-lora bench", ENVIRONMENT).save(path)
    with pytest.raises(ValueError, match="must hold layers of this environment"):
        ResultsFile.open(path, "layers", "", Environment.here(CPU))


def test_a_file_is_named_after_device_and_date_whatever_is_in_it():
    paths = {kind: results.default_path(kind, ENVIRONMENT) for kind in results.FOLDERS}
    assert {path.name for path in paths.values()} == {"some-gpu-80-gb-2026-01-31.json"}
    assert len(set(paths.values())) == len(paths)


def test_every_committed_file_is_of_the_one_schema_and_named_after_its_device_and_date():
    folder = ROOT / "benchmarks" / "results"
    found = {path for kind in results.FOLDERS for path in (folder / results.FOLDERS[kind]).glob("*.json")}
    assert found == set(folder.rglob("*.json"))
    assert {kind for kind in results.FOLDERS if results.load_all(folder, kind)} == set(results.FOLDERS)
    for path in found:
        file = ResultsFile.load(path)
        assert path == results.default_path(file.kind, file.environment)
        assert file.command
        assert file.rows


def test_a_misnamed_file_is_not_published(tmp_path):
    ResultsFile("layers", "", ENVIRONMENT, [a_row()]).save(tmp_path / "some-gpu-80-gb.json")
    with pytest.raises(ValueError, match=r"named some-gpu-80-gb-2026-01-31\.json, got one of layers"):
        results.load_all(tmp_path, "layers")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"median": 1.0}, "must have 0 <= p20 <= median <= p80, got 2.0, 1.0, 2.0"),
        ({"p80": float("nan")}, "p20 <= median"),
        ({"unit": "furlongs"}, "unit must be one of ms, us, bytes, registers, layers, got 'furlongs'"),
        ({"candidate": None}, "candidate must be text, got None"),
    ],
)
def test_a_row_that_says_nothing_is_refused(fields, why):
    with pytest.raises(ValueError, match=why):
        a_row(**fields)
