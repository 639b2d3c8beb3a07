"""Files of tuned choices: what is right in them is taken, all else is refused by name and the rules decide."""

import dataclasses
import json
import warnings

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fused_lora import lora_linear
from fused_lora.backends.triton import launch, straight, tuned
from fused_lora.backends.triton.configs import (
    INTERPRETER,
    DecodeConfig,
    Device,
    Problem,
    ReductionConfig,
    ReductionProblem,
    Schedule,
    ScheduleConfig,
    TileConfig,
)
from fused_lora.backends.triton.entries import Entry, Reduced, Tiled, check, class_of
from fused_lora.cli import main

HOPPER = Device((9, 0), 227 * 1024, 132, "Some GPU")
SMALL = dataclasses.replace(HOPPER, shared_memory=48 * 1024)
TRAINING = Problem(8192, 4096, 4096, 16, 2, 2)
TILED = Tiled(TileConfig(128, 256, 64, 16, 8, 8, 3), ScheduleConfig(Schedule.PUBLISH))
PRODUCED = Tiled(TileConfig(64, 64, 32, 16, 8, 4, 3), ScheduleConfig(Schedule.PRODUCE, 4))
DECODE = DecodeConfig(64, 128, 16, 4, 8, 4, 4)
REDUCED = Reduced(ReductionConfig(64, 64, 16, 4, 4), 4)


def an_entry(problem=TRAINING, choice=TILED, device=HOPPER):
    return Entry(device.name, device.capability, class_of(problem), choice, 1.0, 1.25)


ENTRIES = [
    an_entry(),
    an_entry(dataclasses.replace(TRAINING, along_p=True), PRODUCED),
    an_entry(Problem(1, 4096, 4096, 16, 2, 2), DECODE),
    an_entry(Problem(100, 4096, 4096, 16, 2, 2), dataclasses.replace(DECODE, BLOCK_Q=64, ROWS=128)),
    an_entry(ReductionProblem(8192, 8192, 16, 2), REDUCED),
]


def written(folder, *entries):
    path = folder / "tuned.json"
    table = tuned.Table(path)
    for entry in entries:
        table.put(entry)
    path.write_text(json.dumps(table.as_json()))
    return path


@pytest.fixture
def forget():
    """Nothing is remembered of earlier files, and of this test's after it."""

    def clear():
        tuned.current.cache_clear()
        launch.forget_plans()

    clear()
    yield
    clear()


# ---------------------------------------------------------------- what is right is taken


def test_entries_come_back_from_disk(tmp_path):
    table = tuned.read(written(tmp_path, *ENTRIES))
    assert table.complaints == []
    assert list(table.entries.values()) == ENTRIES


OLD_NAMES = {"schedule": "form", "SPLIT_H": "SPLIT_THIN"}


def renamed(config):
    return {OLD_NAMES.get(name, name): value for name, value in config.items()}


def test_files_with_the_names_that_fields_once_had_are_read_and_written_with_todays(tmp_path):
    path = written(tmp_path, *ENTRIES)
    today = json.loads(path.read_text())
    old = today | {"entries": [entry | {"config": renamed(entry["config"])} for entry in today["entries"]]}
    assert {name for entry in old["entries"] for name in entry["config"]}.issuperset(OLD_NAMES.values())
    path.write_text(json.dumps(old))
    table = tuned.read(path)
    assert table.complaints == []
    assert list(table.entries.values()) == ENTRIES
    assert table.as_json() == today


def test_an_older_entry_of_decode_which_had_one_height_of_tiles_is_read(tmp_path):
    path = written(tmp_path, ENTRIES[2])
    data = json.loads(path.read_text())
    assert data["entries"][0]["config"].pop("ROWS") == 16
    path.write_text(json.dumps(data))
    assert list(tuned.read(path).entries.values()) == [ENTRIES[2]]


def test_a_class_is_all_alike_but_tokens_and_rank_rounded_up_to_powers_of_two(tmp_path):
    table = tuned.read(written(tmp_path, *ENTRIES))

    def choice(device=HOPPER, **changes):
        return table.choice(dataclasses.replace(TRAINING, **changes), device)

    assert choice() == choice(M=4097) == choice(R=1) == TILED
    assert choice(along_p=True) == PRODUCED
    others = [{"M": 4096}, {"M": 8193}, {"R": 17}, {"P": 4097}, {"Q": 4095}, {"dropout": True}, {"itemsize": 4}]
    assert [choice(**other) for other in others] == [None] * len(others)
    assert choice(dataclasses.replace(HOPPER, name="Another GPU")) is None
    assert choice(dataclasses.replace(HOPPER, capability=(8, 0))) is None
    assert table.choice(ReductionProblem(5000, 8192, 9, 2), HOPPER) == REDUCED


def test_launches_take_the_tuned_choice_and_stay_right(tmp_path, monkeypatch, forget):
    if torch.cuda.is_available():
        pytest.skip("made for the interpreter's device")
    sizes = {"itemsize": 4, "adapter_itemsize": 4, "tensor_cores": False}
    forward = Tiled(TileConfig(16, 32, 16, 16, 1, 4, 1), ScheduleConfig(Schedule.PRODUCE, 2))
    backward = Tiled(TileConfig(64, 16, 16, 16, 1, 4, 1), ScheduleConfig(Schedule.RECOMPUTE))
    reduced = Reduced(ReductionConfig(16, 16, 16, 4, 1), 3)
    entries = [
        an_entry(Problem(40, 48, 64, 3, **sizes), forward, INTERPRETER),
        an_entry(Problem(40, 64, 48, 3, **sizes, along_p=True), backward, INTERPRETER),
        an_entry(ReductionProblem(40, 112, 3, 4, tensor_cores=False), reduced, INTERPRETER),
    ]
    monkeypatch.setenv(tuned.VARIABLE, str(written(tmp_path, *entries)))
    taken = []
    real = straight.Launch.through_jit

    def spy(launch, device):
        taken.append((launch.variant, launch.grid))
        return real(launch, device)

    monkeypatch.setattr(straight.Launch, "through_jit", spy)
    inputs = oracle.draw(40, 64, 48, 3)
    oracle.check(inputs, oracle.results(inputs, lora_linear, impl="triton"))
    for (variant, _), config in zip(taken, (forward.tile, backward.tile, reduced.config), strict=True):
        blocks = {name: size for name, size in dataclasses.asdict(config).items() if name.startswith("BLOCK_")}
        assert {name: getattr(variant, name) for name in blocks} == blocks
    assert [(variant.PRODUCE, variant.SPLIT, variant.RECOMPUTE) for variant, _ in taken[:2]] == [
        (True, 2, False),
        (False, 1, True),
    ]
    assert taken[2][1] == (64 // 16 + 48 // 16, 3)


# ---------------------------------------------------------------- where it is


def test_the_file_is_the_named_one_or_the_users_own(tmp_path, monkeypatch, forget):
    monkeypatch.delenv(tuned.VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert tuned.default_path() == tmp_path / "fused_lora" / "tuned.json"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.current().entries == {}
    tuned.current.cache_clear()
    tuned.default_path().parent.mkdir()
    written(tuned.default_path().parent, ENTRIES[0])
    assert list(tuned.current().entries.values()) == [ENTRIES[0]]
    tuned.current.cache_clear()
    monkeypatch.setenv(tuned.VARIABLE, "")
    assert tuned.current().entries == {}
    tuned.current.cache_clear()
    monkeypatch.setenv(tuned.VARIABLE, str(written(tmp_path, *ENTRIES)))
    assert len(tuned.current().entries) == 5
    # a relative XDG_CONFIG_HOME counts as unset, says its specification
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(tuned.default_path()) == "/somewhere/.config/fused_lora/tuned.json"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "there is no such file"),
        (b"", "cannot be read: JSONDecodeError"),
        (b"\xff\xfe\x00", "cannot be read: Unicode"),
        (b"[" * 100_000, "cannot be read: RecursionError"),
        (b"[]", "must be a file of tuned choices"),
        (b'{"format": "fused_lora tuned choices, 1", "entries": 3}', "must be a file of tuned choices"),
    ],
)
def test_a_broken_file_is_one_warning_that_names_it_and_the_rules_decide(tmp_path, monkeypatch, forget, content, why):
    path = tmp_path / "tuned.json"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    inputs = oracle.draw(5, 20, 12, 3)
    with pytest.warns(RuntimeWarning) as said:
        results = oracle.results(inputs, lora_linear, impl="triton")
    assert len(said) == 1
    assert f"tuned choices in {path}: {why}" in str(said[0].message)
    oracle.check(inputs, results)


def test_info_names_the_file_and_whom_its_entries_are_for(tmp_path, monkeypatch, forget, capsys):
    assert main(["info"]) == 0
    assert "Tuned choices in no file\n  none" in capsys.readouterr().out
    tuned.current.cache_clear()
    path = written(tmp_path, *ENTRIES)
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    assert main(["info"]) == 0
    assert f"Tuned choices in {path}\n  5             for Some GPU" in capsys.readouterr().out


# ---------------------------------------------------------------- what is wrong is refused


@pytest.mark.parametrize(
    ("place", "value", "why"),
    [
        ("device", 3, "device must be a name, got 3"),
        ("capability", [9], r"capability must be two whole numbers, got \[9\]"),
        ("capability", [9, True], "capability must be two"),
        ("ms", float("nan"), "ms must be a time in milliseconds, got nan"),
        ("heuristic_ms", -1, "heuristic_ms must be a time in milliseconds, got -1"),
        ("kernel", "gemm", "kernel must be one of lora_matmul, decode, adapter_grad, got 'gemm'"),
        ("kernel", ["decode"], "kernel must be one of"),
        ("kernel", "decode", "config must have the fields .* and lacks SPLIT, SPLIT_H"),
        ("problem", None, "problem must be an object, got None"),
        ("problem.M", 8000, "M and R must be powers of two, R from 16, got 8000 and 16"),
        ("problem.R", 8, "M and R must be powers of two"),
        ("problem.Q", 0, "Q must be a whole number from 1 to"),
        ("problem.P", 4096.0, "P must be of type int, got 4096.0"),
        ("problem.itemsize", 8, "itemsize must be one of 2, 4, got 8"),
        ("problem.tensor_cores", False, "tensor_cores must be true for an itemsize of 2"),
        ("problem.dropout", 1, "dropout must be of type bool, got 1"),
        ("problem.colour", "red", "problem must have the fields .* and has 'colour'"),
        ("config", [], r"config must be an object, got \[\]"),
        ("config.BLOCK_P", 48, "BLOCK_P must be a power of two, got 48"),
        ("config.BLOCK_Q", 8, "BLOCK_Q must be a whole number from 16 to 512, got 8"),
        ("config.BLOCK_M", 10**30, "BLOCK_M must be a whole number from 16 to 512, got 1000"),
        ("config.num_warps", 3, "num_warps must be one of 1, 2, 4, 8, 16, got 3"),
        ("config.num_stages", 0, "num_stages must be a whole number from 1 to 8, got 0"),
        ("config.GROUP_M", "8", "GROUP_M must be of type int, got '8'"),
        ("config.schedule", "PLAIN", "schedule must compute the adapter, got PLAIN"),
        ("config.schedule", "FAST", "schedule must be one of PLAIN, RECOMPUTE, PUBLISH, PRODUCE, got 'FAST'"),
        ("config.form", "PUBLISH", "config must have the fields .* and has 'form'"),
        ("config.kind", "PUBLISH", "config must have the fields .* and has 'kind'"),
        ("config.split", 2, "split must be a whole number from 1 to 1, got 2"),
        ("config.split", None, "split must be of type int, got None"),
    ],
)
def test_a_malformed_entry_is_refused_by_name_and_the_others_stand(tmp_path, place, value, why):
    path = written(tmp_path, ENTRIES[0], ENTRIES[2])
    data = json.loads(path.read_text())
    *outer, last = place.split(".")
    target = data["entries"][0]
    for name in outer:
        target = target[name]
    target[last] = value
    path.write_text(json.dumps(data))
    table = tuned.read(path)
    assert len(table.complaints) == 1
    with pytest.raises(AssertionError, match=f"entry 0: {why}"):
        raise AssertionError(table.complaints[0])
    assert list(table.entries.values()) == [ENTRIES[2]]


@pytest.mark.parametrize(
    ("entry", "problem", "device"),
    [
        (ENTRIES[0], TRAINING, SMALL),
        (ENTRIES[2], ENTRIES[2].problem, dataclasses.replace(SMALL, shared_memory=16 * 1024)),
        (ENTRIES[4], ENTRIES[4].problem, dataclasses.replace(SMALL, shared_memory=16 * 1024)),
        (an_entry(ReductionProblem(8192, 8192, 16, 2), REDUCED), ReductionProblem(8192, 8192, 16, 2), None),
        (an_entry(TRAINING, DECODE), TRAINING, HOPPER),
        (an_entry(Problem(64, 96, 96, 16, 2, 2), PRODUCED), Problem(64, 96, 96, 16, 2, 2), HOPPER),
    ],
    ids=["tile", "decode", "reduction", "fits", "decode of many tokens", "split of a short Q"],
)
def test_what_does_not_fit_this_gpu_is_refused_by_name_once(tmp_path, entry, problem, device):
    path = written(tmp_path, entry)
    table = tuned.read(path)
    if device is None:
        assert table.choice(problem, HOPPER) == entry.choice
        return
    with pytest.warns(RuntimeWarning) as said:
        found = [table.choice(problem, device) for _ in range(2)]
    assert found == [None, None]
    assert len(said) == 1
    text = str(said[0].message)
    assert str(path) in text
    assert f"{entry.kernel} M={problem.M}" in text
    assert "BLOCK_" in text
    assert "the rules' choice is used" in text


VALID = tuned.Table(None, {entry.key: entry for entry in ENTRIES}).as_json()
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([16, 64, 4096]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def corrupted(draw):
    """A right file with a value, a name or some bytes of it changed."""
    data = json.loads(json.dumps(VALID))
    for _ in range(draw(st.integers(1, 3))):
        place, parent, key = data, None, None
        while isinstance(place, dict | list) and place and (parent is None or draw(st.booleans())):
            key = (
                draw(st.sampled_from(sorted(place)))
                if isinstance(place, dict)
                else draw(st.integers(0, len(place) - 1))
            )
            parent, place = place, place[key]
        if parent is None:
            continue
        if draw(st.booleans()):
            parent[key] = draw(ANYTHING)
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=5))] = parent.pop(key)
    raw = bytearray(json.dumps(data).encode())
    for _ in range(draw(st.integers(0, 2))):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw[: draw(st.integers(0, len(raw)))] if draw(st.integers(0, 9)) == 0 else raw)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=corrupted() | st.binary(max_size=200))
def test_no_file_raises_or_gives_a_choice_that_does_not_fit(tmp_path, content):
    path = tmp_path / "tuned.json"
    path.write_bytes(content)
    table = tuned.read(path)
    for entry in table.entries.values():
        check(entry.choice)
        assert Entry.from_json(json.loads(json.dumps(entry.as_json()))) == entry
        for capability in {(9, 0), entry.capability}:
            for memory in (227 * 1024, 48 * 1024):
                device = Device(capability, memory, 132, entry.device)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    choice = table.choice(entry.problem, device)
                assert choice is None or tuned.why_not(choice, entry.problem, device) is None
