"""The page that a person reads: it says what the results say, and a browser shows it, on a phone, light and dark."""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from fused_lora import bench
from fused_lora.bench import charts, groups, table
from fused_lora.bench.baselines import CANDIDATES, SCHEDULES
from fused_lora.bench.colours import COLOURS
from fused_lora.bench.page import render
from fused_lora.bench.results import Environment, ResultsFile, Row, Spread, load_all
from tools import publish
from tools.tables import layers

CPU = Environment("Some <CPU>", "2.13.0", "3.7.1", None, "3.11.7", 2, "2026-01-31")
GPU = Environment("Some GPU", "2.13.0", "3.7.1", "13.0", "3.11.7", 8, "2026-02-28")


def row(candidate, ratio, pass_="step", shape="square-2048 (M=512 K=2048 N=2048 R=16)", dtype="float32", **fields):
    values = {"median": 2 * ratio, "p20": 1.9 * ratio, "p80": 2.1 * ratio, "rounds": 20, "tflops": 1.5}
    values |= {"ratios": {"frozen": Spread(ratio, ratio - 0.01, ratio + 0.01)}, "gb_per_s": 20.0, "saved_bytes": 4096}
    return Row(pass_, shape, dtype, candidate, **values | fields)


def a_file(environment, rows):
    return ResultsFile("layers", "fused-lora bench", environment, rows)


def save(file, checkout):
    file.save(checkout / "benchmarks" / "results" / file.environment.file_name)


def some_results(environment=CPU):
    ours = "ours-triton" if environment is GPU else "ours-eager"
    rows = [row("frozen", 1.0), row(ours, 1.07), row("eager", 1.31), row("peft", 1.42), row("parametrize", 7.5)]
    rows += [
        row(name, ratio, pass_="forward", shape="decode-2048-m1 (M=1 K=2048 N=2048 R=16)")
        for name, ratio in (("frozen", 1.0), (ours, 1.36), ("eager", 1.28))
    ]
    return a_file(environment, rows)


# ---------------------------------------------------------------- what it says


def test_the_page_says_what_the_results_say():
    page = render(some_results(), {"step  small  float32: addmm": "dx is off by <0.1>"})
    text = html.unescape(re.sub(r"<[^>]*>", " ", page))
    for number in ("1.07", "1.31", "1.42", "7.50", "2.14 ms", "15 ms", "saved 4.1 KB", "Some <CPU>", "2 threads"):
        assert number.replace("2 threads", "threads") in text
    assert "addmm: dx is off by <0.1>" in text
    assert "ours-eager is 18.3% faster than eager" in text
    # the loss stands at the top, in words
    head = page[: page.index("<article>")]
    assert "decode-2048-m1" in head
    assert "SLOWER" in head


def test_the_page_fetches_nothing_and_runs_nothing():
    page = render(some_results(), {})
    assert not re.search(r"<script|<link|<img|<iframe|url\(|@import|\bsrc=|\bhref=|https?:", page)
    assert "prefers-color-scheme:dark" in page
    assert 'name="viewport"' in page


def test_results_without_the_frozen_baseline_are_shown_by_time():
    results = a_file(CPU, [row("ours-eager", 1.0, ratios={}), row("full", 3.0, ratios={})])
    text = re.sub(r"<[^>]*>", " ", render(results, {}))
    assert "3.00" in text
    assert "6 ms" in text


def test_a_report_is_made_of_a_file_without_measuring(tmp_path, capsys):
    source, page = tmp_path / "results.json", tmp_path / "new" / "report.html"
    some_results().save(source)
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert bench.run(parser.parse_args(["--from", str(source), "--report", str(page)])) == 0
    assert page.read_text() == render(some_results(), {})
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "1 faster, 0 level, 1 SLOWER" in out
    assert f"written: {page}" in out
    assert bench.run(parser.parse_args(["--from", str(tmp_path / "none.json")])) == 2
    assert bench.run(parser.parse_args(["--from", str(source), "--report", "report"])) == 2
    assert "--report must end in .html, got 'report'" in capsys.readouterr().err


# ---------------------------------------------------------------- what is published


@pytest.fixture
def checkout(tmp_path):
    """This one's pages, and a results file of one machine."""
    (tmp_path / "docs").mkdir()
    for name in publish.BLOCKS:
        shutil.copy(publish.CHECKOUT / name, tmp_path / name)
    save(some_results(), tmp_path)
    return tmp_path


def pages(checkout):
    """The README's block and docs/benchmarks.md, both made anew."""
    assert publish.main([], checkout) == 0
    readme = (checkout / "README.md").read_text()
    return readme.partition("<!-- speed -->")[2].partition("<!-- /speed -->")[0], (
        checkout / "docs" / "benchmarks.md"
    ).read_text()


def test_a_table_without_a_gpu_file_says_not_measured_and_with_one_gives_it(checkout):
    before = (checkout / "README.md").read_text()
    readme, page = pages(checkout)
    after = (checkout / "README.md").read_text()
    for half in (lambda text: text.partition("<!-- speed -->")[0], lambda text: text.partition("<!-- /speed -->")[2]):
        assert half(before) == half(after) != ""
    assert readme.startswith("\nOn a CPU, Some <CPU>, 2 threads")
    assert readme.endswith("On a GPU: **not measured**.\n")
    assert "| 512×2048×2048, rank 16, step, float32 | 1.07 (1.06–1.08) | 1.31 | 1.42 | 7.50 |" in readme
    assert "**not measured**: no file" in page
    assert publish.main(["--check"], checkout) == 0

    headline = [
        row(name, ratio, shape="headline (M=8192 K=4096 N=4096 R=16)", dtype="bfloat16")
        for name, ratio in (("frozen", 1.0), ("ours-triton", 1.1), ("eager", 1.5))
    ]
    save(a_file(GPU, headline), checkout)
    assert publish.main(["--check"], checkout) == 1
    readme, page = pages(checkout)
    # whole models have files of their own
    assert "not measured" not in readme + page.partition("## Whole models")[0]
    assert "| … step | 1.10 (1.09–1.11) | 1.50 |" in readme
    # a file without a wall says whose time it may hold
    for text in (readme, page):
        assert "`ours-triton` is ahead of the fastest of eager in 1 of 1 groups, level in 0 and behind in 0**" in text
        assert "the host 0.1 ms ahead" in text
    assert (checkout / "docs" / "pictures" / "measured-some-gpu-2026-02-28.svg").exists()


def headline(**walls):
    """A GPU's file of one group: candidate -> ratio, wall ms, host ms."""
    rows = [
        row(
            name, ratio, shape="headline (M=8192 K=4096 N=4096 R=16)", dtype="bfloat16", wall_ms=wall, host_ms=host,
            host_hidden=name != "eager",
        )
        for name, (ratio, wall, host) in walls.items()
    ]  # fmt: skip
    return a_file(GPU, [replace(row, candidate=row.candidate.replace("_", "-")) for row in rows])


def test_device_wall_and_host_stand_beside_each_other_where_a_file_has_them(checkout):
    results = headline(frozen=(1.0, 2.0, 0.2), ours_triton=(1.1, 4.0, 3.0), peft=(1.4, 3.0, 1.5), eager=(1.6, 3.1, 0.4))
    save(results, checkout)
    readme, page = pages(checkout)
    assert "| ÷ frozen baseline, device / wall | ours-triton | eager | peft |" in readme
    assert "| … step | 1.10 (1.09–1.11) / 2.00 | 1.60 / 1.55 | 1.40 / 1.50 |" in readme
    assert "in 1 of 1 groups, level in 0 and behind in 0**; ahead of each alone: eager in 1, peft in 1" in readme
    # it wins on the device, and its user waits longer
    assert "it takes less than the fastest of them in 0 of 1." in readme
    assert "0.1 ms" not in readme
    assert "| ours-triton | 1.100 | 1.090–1.110 | 2.2 | 2.09–2.31 | 4 | 75% |" in page
    assert "| eager | 1.600 | 1.590–1.610 | 3.2* | 3.04–3.36 | 3.1 | 13% |" in page
    shown = "\n".join(table.lines(groups.groups_of(results)[0]))
    assert "wall ms" in shown
    assert table.EXPOSED in shown
    assert "wall 4 ms · host 75%" in html.unescape(render(results, {}))


def test_losses_on_a_gpu_are_said_in_words(checkout):
    rows = [
        row(name, ratio, pass_=pass_, shape=f"some (M={tokens} K=64 N=64 R=16)", dtype="bfloat16")
        for pass_, tokens, times in (
            ("forward", 4096, {"frozen": 1.0, "ours-triton": 1.3, "ours-native": 5.0, "addmm": 1.2, "peft": 1.5}),
            ("decode", 1, {"frozen": 1.0, "ours-triton": 6.0, "ours-native": 1.4, "addmm": 2.0, "peft": 3.0}),
        )
        for name, ratio in times.items()
    ]
    words = layers.in_words(a_file(GPU, rows))
    assert "is ahead of the fastest of addmm, peft in 0 of 2 groups, level in 0 and behind in 2**" in words
    assert "ahead of each alone: addmm in 0, peft in 1, none of them under 4,096 tokens." in words
    assert "`ours-native` is ahead of it in 1, none of them above 1 tokens." in words
    assert "no forward of `ours-triton` takes less than 2.600 ms, the frozen baseline's quickest 2.000" in words


def test_the_committed_gpu_file_is_older_than_the_wall_and_says_so():
    files = load_all(publish.CHECKOUT / "benchmarks" / "results", "layers")
    for results in filter(groups.is_gpu, files.values()):
        assert (layers.GLIMPSE in layers.in_words(results)) == (not groups.has_wall(results))


def test_models_in_a_gpus_file_are_measured_models(checkout):
    rows = [row(name, 1.0, pass_="model", shape="block (input 1×2, R=4)") for name in ("frozen", "ours-triton", "peft")]
    save(a_file(GPU, rows), checkout)
    _, page = pages(checkout)
    assert "not measured" not in page.partition("## The compiled extension")[0]


def test_a_changed_number_is_found(checkout):
    publish.main([], checkout)
    path = checkout / "README.md"
    path.write_text(path.read_text().replace("| 1.07", "| 1.05"))
    assert publish.main(["--check"], checkout) == 1
    assert "| 1.05" in path.read_text()


def test_only_the_newest_file_of_a_device_counts(checkout):
    newer = a_file(Environment(**vars(CPU) | {"date": "2026-06-01"}), [row("frozen", 1.0), row("ours-eager", 1.02)])
    save(newer, checkout)
    assert list(load_all(checkout / "benchmarks" / "results", "layers")) == ["some-cpu-2026-06-01.json"]


def test_a_page_without_its_markers_is_refused(checkout):
    (checkout / "README.md").write_text("nothing here")
    with pytest.raises(ValueError, match=r"README\.md must have the markers <!-- speed -->"):
        publish.main([], checkout)


def test_losses_are_published(checkout):
    _, page = pages(checkout)
    assert "1 faster, 0 level (their spreads overlap), 1 **slower**:" in page
    assert "- forward  decode-2048-m1  float32: ours-eager is 6.2% SLOWER than eager" in page


def dots(figure, candidate):
    """Where a plot has a candidate: (ratio, line of its group)."""
    (line,) = (line for line in figure.axes[0].lines if line.get_gid() == candidate)
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_plots_place_a_ratio_where_its_axis_says():
    results = some_results()
    figure = charts.ratio_figure(groups.groups_of(results), groups.candidates_of(results.rows), "t")
    assert dots(figure, "ours-eager") == [(1.07, 0), (1.36, 1)]
    assert dots(figure, "eager") == [(1.31, 0), (1.28, 1)]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "step  square-2048  float32", "forward  decode-2048-m1  float32"
    ]  # fmt: skip


def test_a_plot_hides_no_ratio_of_ours():
    rows = [row("frozen", 1.0), row("ours-eager", 0.57), row("eager", 1.3)]
    rows += [row("frozen", 1.0, "forward"), row("ours-eager", 3.62, "forward")]
    found = groups.groups_of(a_file(CPU, rows))
    assert charts.smallest_ratio(found) == pytest.approx(0.4)
    figure = charts.ratio_figure(found, ["frozen", "ours-eager", "eager"], "t")
    low, high = figure.axes[0].get_xlim()
    assert low < 0.4 < charts.LARGEST_RATIO < high
    assert dots(figure, "ours-eager") == [(0.57, 0), (charts.LARGEST_RATIO, 1)]
    assert [text.get_text() for text in figure.axes[0].texts] == ["3.6"]


def test_a_picture_has_the_same_bytes_and_the_readers_light_or_dark():
    def picture():
        found = groups.groups_of(some_results())
        return charts.as_svg(charts.ratio_figure(found, ["frozen", "ours-eager", "eager"], "t"), "t")

    svg = picture()
    assert svg == picture()
    style = svg.partition("<style>")[2].partition("</style>")[0]
    assert "prefers-color-scheme:dark" in style
    for name, pair in COLOURS.items():
        assert all(f"--{name}:{colour};" in style for colour in pair)
    # every colour is one of them
    assert not re.findall(r"#[0-9a-f]{6}\b", svg.replace(style, ""))


@pytest.mark.parametrize("ours", ["ours-triton", "ours-native"])
def test_no_two_candidates_share_a_colour_and_every_name_fits(ours):
    results = a_file(GPU, [row(name, 1.2) for name in CANDIDATES])
    names = groups.candidates_of(results.rows)
    assert set(names) == set(CANDIDATES) - set(SCHEDULES)
    colours = charts.colours(names, ours)
    assert len(set(colours.values())) == len(colours)
    assert colours[ours] == COLOURS["ours"][0]
    figure = charts.ratio_figure(groups.groups_of(results), names, "t")
    figure.draw_without_rendering()
    (legend,) = figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert set(shown) == set(names) - {"frozen"}
    ends = legend.get_window_extent()
    assert 0 <= ends.x0 < ends.x1 <= figure.bbox.x1


def test_passes_come_in_their_order_whatever_was_measured_first():
    rows = [
        row(name, 1.0, pass_=pass_) for pass_ in ("train", "decode", "step", "forward") for name in ("frozen", "peft")
    ]
    page = render(a_file(CPU, rows), {})
    assert re.findall(r"<h2>(\w+)</h2>", page) == ["forward", "step", "decode", "train"]


# ---------------------------------------------------------------- how it looks

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
NARROW, WIDE = 390, 1000
in_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed to look at the page")


def browse(folder, page, *options):
    """A page that shows the report as a phone does and, beside it, as a desktop does; the browser's output."""
    frames = "".join(
        f'<iframe srcdoc="{html.escape(page)}" width="{width}" height="900" style="border:0"></iframe>'
        for width in (NARROW, WIDE)
    )
    measure = """onload = () => {
        const frames = [...document.querySelectorAll("iframe")]
        document.title = JSON.stringify(frames.map(frame => {
        const page = frame.contentDocument
        const ends = [...page.querySelectorAll("body *")].map(element => element.getBoundingClientRect().right)
        return {wide: page.documentElement.scrollWidth, end: Math.max(...ends),
                size: parseFloat(getComputedStyle(page.querySelector(".name")).fontSize)}
    })) }"""
    both = folder / "both.html"
    both.write_text(
        f'<!doctype html><meta charset="utf-8"><body style="margin:0;display:flex">{frames}<script>{measure}</script>'
    )
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--hide-scrollbars", "--virtual-time-budget=5000",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={NARROW + WIDE},900", *options, both.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


@in_browser
def test_nothing_sticks_out_on_a_phone_or_a_desktop(tmp_path):
    dom = browse(tmp_path, render(some_results(), {"a": "b" * 300}), "--dump-dom")
    frames = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom)[1]))
    for frame, width in zip(frames, (NARROW, WIDE), strict=True):
        assert frame["wide"] == width
        assert frame["end"] <= width
        assert frame["size"] >= 14


@in_browser
@pytest.mark.parametrize(("mode", "scheme"), [(0, "1"), (1, "0")], ids=["light", "dark"])
def test_it_is_seen_in_light_and_in_dark(tmp_path, mode, scheme):
    image = pytest.importorskip("PIL.Image", reason="Pillow reads the screenshot")
    shot = tmp_path / "shot.png"
    page = render(some_results(), {})
    browse(tmp_path, page, f"--screenshot={shot}", f"--blink-settings=preferredColorScheme={scheme}")
    picture = image.open(shot).convert("RGB")
    assert picture.size == (NARROW + WIDE, 900)
    phone, desktop = picture.crop((0, 0, NARROW, 900)), picture.crop((NARROW, 0, NARROW + WIDE, 900))
    for view in (phone, desktop):
        seen = {colour: count for count, colour in view.getcolors(1 << 20)}
        # paper, text and the bar of ours, each in its colour of this mode
        for name, least in (("paper", 20_000), ("ink", 300), ("ours", 300), ("muted", 100)):
            rgb = tuple(bytes.fromhex(COLOURS[name][mode][1:]))
            assert seen.get(rgb, 0) >= least, f"{name} {COLOURS[name][mode]}"
        assert tuple(bytes.fromhex(COLOURS["paper"][1 - mode][1:])) not in seen


def test_the_committed_results_make_a_page():
    folder = publish.CHECKOUT / "benchmarks" / "results"
    for file in (file for kind in ("layers", "models") for file in load_all(folder, kind).values()):
        assert "<article>" in render(file, {})
