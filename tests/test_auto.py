"""``impl="auto"`` on a GPU: the rule against every shape that was measured, and what it falls back to."""

import dataclasses
import json

import pytest
import torch
from simulated_gpu import GPU

from fused_lora import FusedLoRALinear, backends, functional, plans, summary
from fused_lora.backends import LayerPass, environment, measured, native
from fused_lora.bench import groups
from fused_lora.bench.results import Environment, ResultsFile, Row, load_all
from fused_lora.bench.shapes import STEP
from fused_lora.cli import info
from tools import publish
from tools.tables import choices

FILES = {"layers": load_all(publish.CHECKOUT / "benchmarks" / "results", "layers")}
COUNTING = choices.files_that_count(FILES)
GROUPS = [
    (capability, file, group)
    for capability, (_, file) in COUNTING.items()
    for group in groups.groups_of(file)
    if choices.asked_of(group) is not None
]
TOLERATED = 1.03


def title(value):
    return value.title if isinstance(value, groups.Group) else ""


def behind(file, group, choice):
    """How far a choice is behind the fastest that does the same: ours, in-place addmm and eager; 1 is level.

    Eager is the same products and two launches more, and reads and writes more. Where it is ahead of in-place addmm
    within their spreads, that is noise.
    """
    by = {row.candidate: row for row in group.rows}
    mine = by[choices.candidate_of(choice, file)]
    rivals = [by[name] for backend in measured.BACKENDS if (name := choices.candidate_of(backend, file)) in by]
    rivals += [by[name] for name in ("addmm",) if name in by]
    eager = by.get("eager")
    if eager is not None and (mine.candidate != "addmm" or eager.p80 < mine.p20):
        rivals.append(eager)
    return choices.user_ms(mine) / min(map(choices.user_ms, rivals))


def answer(capability, group, rule=measured.fastest):
    base = getattr(torch, group.dtype.partition("+")[0])
    return rule(measured.tables()[capability], base, choices.asked_of(group), measured.BACKENDS)


# ---------------------------------------------------------------- the rule and the files


def test_the_packaged_table_is_what_the_results_files_say():
    assert measured.FILE.read_text(encoding="utf-8") == choices.text(FILES)
    assert measured.FILE == publish.CHECKOUT / choices.PATH
    assert set(measured.BACKENDS) == set(backends.BACKENDS)


@pytest.mark.parametrize(("capability", "file", "group"), GROUPS, ids=title)
def test_where_a_shape_was_measured_the_choice_is_the_fastest(capability, file, group):
    assert behind(file, group, answer(capability, group)) <= TOLERATED


def test_a_rule_that_takes_the_second_best_is_found_out(monkeypatch):
    monkeypatch.setattr(measured, "least", lambda names, time: sorted(names, key=time)[1])
    late = [group for capability, file, group in GROUPS if behind(file, group, answer(capability, group)) > TOLERATED]
    assert len(late) > len(GROUPS) / 2


def timed(M=64, K=64, N=64, R=16, pass_="step", dtype="bfloat16", **us):
    return measured.Timed(pass_, dtype, M, K, N, R, us, {})


def a_table(*rows):
    return measured.Table("Some GPU", "some.json", "2026-01-31", "wall", rows)


def ask(
    table, dtype=torch.bfloat16, able=measured.BACKENDS, gradients=True, adapter_dtype=None, dropout=False, **sizes
):
    sizes = {"M": 64, "K": 64, "N": 64, "R": 16} | sizes
    asked = LayerPass(gradients, *sizes.values(), adapter_dtype or dtype, dropout)
    return measured.fastest(table, dtype, asked, able)


def test_the_nearest_shapes_decide_and_nearer_ones_more():
    table = a_table(timed(64, native=10.0, triton=20.0), timed(1024, native=100.0, triton=40.0))
    assert [ask(table, M=M) for M in (1, 64, 128, 512, 1024, 1 << 20)] == ["native"] * 3 + ["triton"] * 3
    # half way in logarithms: 2 times faster against 2.5 times slower
    assert ask(table, M=256) == "triton"
    # of rows of the very same sizes, all count
    assert ask(a_table(*table.rows, timed(64, native=50.0, triton=20.0)), M=64) == "triton"
    # far away they all but average, and an empty x is asked for as one row
    assert ask(table, M=0) == "native"


def test_passes_and_dtypes_are_kept_apart():
    table = a_table(
        timed(native=1.0, triton=2.0),
        timed(native=2.0, triton=1.0, pass_="forward"),
        timed(native=3.0, triton=2.0, eager=1.0, dtype="bfloat16+float32"),
    )
    assert ask(table) == "native"
    assert ask(table, gradients=False) == "triton"
    assert ask(table, adapter_dtype=torch.float32) == "eager"
    # of the base's dtype, then of as many bytes
    assert ask(table, gradients=False, adapter_dtype=torch.float32) == "triton"
    assert ask(table, torch.float16) in ("native", "eager")
    assert ask(a_table(timed(native=1.0, triton=2.0)), torch.float16) == "native"


def test_what_was_not_measured_is_not_chosen():
    table = a_table(timed(triton=2.0, eager=3.0), timed(512, triton=2.0, eager=3.0, native=1.0))
    assert ask(table) == "triton"
    assert ask(table, M=512) == "native"
    assert ask(table, M=512, able=("triton", "eager")) == "triton"
    assert ask(a_table(timed(eager=1.0, native=2.0)), able=("triton", "eager")) == "eager"
    # of another size of dtype, and with dropout: the first that can run and has a time anywhere
    for unknown in ({"dtype": torch.float32}, {"dropout": True}):
        assert ask(table, **unknown) == "triton"
        assert ask(a_table(timed(eager=1.0, native=2.0)), **unknown) == "native"
        assert ask(a_table(timed(eager=1.0, triton=2.0)), **unknown, able=("native", "eager")) == "eager"


def test_the_nearest_generation_is_of_the_same_major_number_and_the_newer_of_two():
    known = dict.fromkeys([(8, 0), (8, 9), (10, 0)])
    for capability, nearest in {(8, 6): (8, 9), (8, 0): (8, 0), (9, 0): (10, 0), (12, 0): (10, 0)}.items():
        assert measured.nearest(capability, known) == nearest
    assert measured.nearest((9, 0), {}) is None


def test_a_row_with_wall_times_is_chosen_by_them_and_keeps_the_devices():
    def row(candidate, ms, wall_ms):
        shape = "some (M=8 K=64 N=32 R=4)"
        return Row(STEP, shape, "bfloat16", candidate, 5, ms, ms, ms, wall_ms=wall_ms, host_ms=0.1, host_hidden=True)

    rows = [row("ours-triton", 0.1, 0.3), row("ours-eager", 0.2, 0.25), row("addmm", 0.2, 0.2)]
    gpu = Environment("A new GPU", "2.13.0", "3.7.1", "13.0", "3.11.7", 8, "2027-01-31", "10.0")
    older = dataclasses.replace(gpu, date="2026-12-31", device="Another of them")
    files = {"layers": {
        "new.json": ResultsFile("layers", "c", gpu, rows), "old.json": ResultsFile("layers", "c", older, rows[:1]),
    }}  # fmt: skip
    (table,) = measured.parse(json.loads(choices.text(files))).values()
    assert (table.file, table.clock) == ("new.json", "wall")
    (one,) = table.rows
    # in files with a wall "eager" is our own row
    assert one == ("step", "bfloat16", 8, 64, 32, 4, {"triton": 300, "eager": 250}, {"triton": 100, "eager": 200})
    assert ask(table, M=8, K=64, N=32, R=4) == "eager"


# ---------------------------------------------------------------- the choice on a GPU


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of some generation on which all backends can run, and a packaged table of one's choice."""

    def make(capability=(9, 0), tables=None):
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        monkeypatch.setattr(environment, "TRITON_INSTALLED", True)
        monkeypatch.setattr(environment, "EXTENSION_PROBLEM", None)
        monkeypatch.setattr(environment, "EXTENSION_HAS_CUDA", True)
        monkeypatch.setattr(environment, "_capability", lambda index: capability)
        if tables is not None:
            monkeypatch.setattr(measured, "tables", lambda: tables)
        measured.choose.cache_clear()

    yield make
    measured.choose.cache_clear()


SMALL_AND_LARGE = {
    (9, 0): a_table(
        *(timed(16, native=1.0, triton=2.0, eager=3.0, pass_=pass_) for pass_ in ("forward", "step")),
        *(timed(4096, native=3.0, triton=2.0, eager=1.0, pass_=pass_) for pass_ in ("forward", "step")),
    )
}


@pytest.mark.parametrize("capability", [(9, 0), (8, 6), (12, 0)])
def test_auto_is_the_fastest_for_what_is_asked(gpu, capability):
    gpu(capability, SMALL_AND_LARGE)
    asked = LayerPass(True, 16, 64, 64, 16, torch.bfloat16)
    assert backends.choose("auto", GPU, torch.bfloat16, asked) == "native"
    assert backends.choose("auto", GPU, torch.bfloat16, asked._replace(M=4096)) == "eager"
    assert backends.choose("triton", GPU, torch.bfloat16, asked) == "triton"
    assert backends.runs("auto", GPU, torch.bfloat16, asked) == ("native", "eager")
    # by device and dtype alone, as under a compiler, and where no GPU was measured
    assert backends.choose("auto", GPU, torch.bfloat16) == "triton"
    gpu(capability, {})
    assert backends.choose("auto", GPU, torch.bfloat16, asked) == "triton"


def test_a_gpu_on_which_nothing_of_ours_can_run_is_asked_nothing(gpu):
    gpu((7, 5), SMALL_AND_LARGE)
    asked = LayerPass(True, 16, 64, 64, 16, torch.bfloat16)
    assert backends.choose("auto", GPU, torch.bfloat16, asked) == "eager"


@pytest.fixture
def asked(monkeypatch):
    """What ``choose`` is asked, call by call; on a CPU, as if it were a GPU."""
    calls, choose = [], backends.choose

    def recording(impl, device, dtype, asked=None):
        calls.append(asked)
        return choose(impl, device, dtype)

    monkeypatch.setattr(backends, "choose", recording)
    monkeypatch.setattr(functional, "_decides", lambda x: not torch.compiler.is_compiling())
    plans.CALLS.clear()
    return calls


def test_a_call_asks_once_for_its_sizes_and_for_what_it_wants(asked):
    layer = FusedLoRALinear(6, 5, rank=2, dropout=0.5)
    for M, rows in ((3, (3,)), (8, (2, 4)), (3, (3,))):
        x, before = torch.randn(*rows, 6), len(asked)
        for _ in range(3):
            layer(x)
        # the first call of each asks for itself, and for the plan of those to come
        assert asked[before:] == ([] if M == 3 and before else [LayerPass(True, M, 6, 5, 2, torch.float32, True)] * 2)
    asked.clear()
    for _ in range(2):
        with torch.no_grad():
            layer.eval()(torch.randn(3, 6))
    assert asked == [LayerPass(False, 3, 6, 5, 2, torch.float32, False)] * 2
    asked.clear()
    torch.compile(layer, backend="eager", fullgraph=True)(torch.randn(7, 6))
    assert set(asked) <= {None}


def test_info_says_what_is_taken_and_by_whose_file(gpu, monkeypatch):
    gpu((8, 6), SMALL_AND_LARGE)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(native, "why_not_hopper", lambda device, M, *sizes: "too few" if M < 129 else None)
    text = info._text(info.collect())
    assert "9.0: Some GPU, 2026-01-31, some.json; time: wall" in text
    assert "cuda:0 takes, of what can run on it, by a table that is that of 9.0: 8.6 has no file" in text
    assert text.count("without gradients  M 1 to 256: native; M 512 to 16384: eager") == 2
    gpu((9, 0), SMALL_AND_LARGE)
    assert "by a table that is its own" in info._text(info.collect())
    kernels = text.partition("Kernels of the compiled extension on cuda:0, for the same layer\n")[2]
    assert kernels.startswith("  M 1 to 128: portable (too few)\n  M 256 to 16384: hopper\n")
    gpu((9, 0), {})
    assert "nothing was measured on a GPU" in info._text(info.collect())


def test_the_summary_names_all_that_a_layer_runs_by_its_size(gpu):
    gpu((9, 0), SMALL_AND_LARGE)
    with torch.device("meta"):
        layer = FusedLoRALinear(64, 64, rank=16, dtype=torch.bfloat16)
    layer.weight = torch.nn.Parameter(CudaAlike(layer.weight), requires_grad=False)
    (row,) = summary(layer).layers
    assert row.implementation == "native or eager"
    assert "measured to be the fastest" in row.why


class CudaAlike(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    @property
    def device(self):
        return GPU
