"""README and docs are true: their Python runs, their commands exist, their numbers and pictures are what makes them."""

import re
import shlex
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
import torch
import triton
import triton.language as tl

import fused_lora
from fused_lora import cli
from fused_lora.backends.triton.kernels.lora_matmul import _tile
from tools import draw, publish

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOM_PAGES = [ROOT / "csrc" / "README.md", ROOT / "examples" / "README.md"]


def by_name(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.name)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run(page, folder, monkeypatch):
    """Its Python, in order, in an empty folder; the names that it leaves."""
    monkeypatch.chdir(folder)
    names = {"__name__": "page"}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)
    return names


# ---------------------------------------------------------------- code


@by_name([page for page in PAGES if blocks(page, "python") and page.name not in ("README.md", "quickstart.md")])
def test_its_python_runs(page, tmp_path, monkeypatch):
    run(page, tmp_path, monkeypatch)


def test_the_readme_keeps_its_promise(tmp_path, monkeypatch):
    names = run(ROOT / "README.md", tmp_path, monkeypatch)
    # the reloaded copy, merged, is the tuned model
    torch.testing.assert_close(names["other"](names["x"]), names["model"](names["x"]), rtol=1e-4, atol=1e-4)


def test_the_first_model_learns_what_the_quick_start_says(tmp_path, monkeypatch, capsys):
    names = run(ROOT / "docs" / "quickstart.md", tmp_path, monkeypatch)
    out = capsys.readouterr().out
    assert "before: 8 and 9 right in 0%" in out
    assert names["accuracy"](names["net"], [8, 9]) > 0.8
    table = re.search(r"(^    layer .*?)\n\n", (ROOT / "docs" / "quickstart.md").read_text(), re.DOTALL | re.MULTILINE)
    for line in table[1].splitlines():
        assert line.strip() in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.pt", "eights-and-nines"]


def commands(page):
    for block in blocks(page, "sh"):
        for line in block.splitlines():
            yield shlex.split(line, comments=True)


@by_name([page for page in PAGES if blocks(page, "sh")])
def test_its_commands_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(page):
        if words[:1] == ["make"]:
            assert words[1] in targets
        elif words[:1] == ["fused-lora"]:
            # a wrong option ends the program with code 2
            cli.parser().parse_args(words[1:])


def test_every_page_marks_its_code_as_what_it_is():
    known = {"python", "sh"}
    for page in PAGES:
        fences = re.findall(r"^ *```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(fences[::2]) <= known, f"{page.name}: a block that no test reads"


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^::: fused_lora\.(\w+)$", page, re.MULTILINE))
    assert named == set(fused_lora.__all__)


def test_every_install_command_names_the_projects_own_address():
    address = re.search(r'^Homepage = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    for page in [*PAGES, *ROOM_PAGES]:
        for found in re.findall(r"git\+(https://[^\s'`]+)", page.read_text(encoding="utf-8")):
            assert found == address, page.name
    assert f"pip install git+{address}\n" in (ROOT / "README.md").read_text()


def test_the_readmes_map_names_every_room():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    chart = text[text.index("\n## Where things are\n") :]
    inside, outside = re.findall(r"^      (\S+)", chart, re.MULTILINE), re.findall(r"^    (\S+/)", chart, re.MULTILINE)
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a checkout")
    paths = [Path(file).parts for file in files.stdout.splitlines()]
    rooms = {parts[0] + "/" for parts in paths if len(parts) > 1}
    package = {parts[1] + "/" * (len(parts) > 2) for parts in paths if parts[0] == "fused_lora"}
    assert sorted(outside) == sorted(rooms)
    assert sorted(inside) == sorted(package - {"__init__.py", "py.typed"})


# ---------------------------------------------------------------- links


@pytest.mark.parametrize("page", [*PAGES, *ROOM_PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_its_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("https://", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target


class Resources(HTMLParser):
    """What a page fetches by itself."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag in ("script", "img", "iframe"):
            self.found.append(values.get("src"))
        if tag == "link" and values.get("rel") in ("stylesheet", "preload", "preconnect", "icon"):
            self.found.append(values.get("href"))


def test_the_site_builds_strictly_and_needs_no_network(tmp_path):
    config = pytest.importorskip("mkdocs.config", reason="the docs extra is not installed")
    from mkdocs.commands.build import build

    build(config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 8
    for page in pages:
        for source in Resources(page.read_text(encoding="utf-8")).found:
            assert source is None or not re.match(r"(https?:)?//", source), f"{page.name} fetches {source}"


# ---------------------------------------------------------------- numbers and pictures


# another matplotlib draws the same plots in other bytes
PINNED = f"matplotlib=={matplotlib.__version__}" in (ROOT / "constraints.txt").read_text()


def test_tables_and_plots_are_the_results_files():
    for path, text in publish.outputs(publish.CHECKOUT).items():
        if PINNED or path.suffix != ".svg":
            assert path.read_text(encoding="utf-8") == text, f"{path.name}: `make report` writes it anew"


@by_name(PAGES)
def test_no_table_of_measured_numbers_is_written_by_hand(page):
    text = page.read_text(encoding="utf-8")
    for marker in publish.BLOCKS.get(str(page.relative_to(ROOT)), {}):
        before, _, rest = text.partition(f"<!-- {marker} -->\n")
        content, _, after = rest.partition(f"<!-- /{marker} -->")
        assert re.search(r"\d|not measured", content), f"nothing stands in {marker}"
        text = before + after
    heads = re.findall(r"^(\|.*)\n\|[ -]*---", text, re.MULTILINE)
    assert [head for head in heads if re.search(r"÷|\bms\b|µs|\bMB\b|FLOP|GB/s|registers", head)] == []


@pytest.mark.skipif(not PINNED, reason="drawn by another matplotlib than the one in constraints.txt")
def test_pictures_are_what_the_script_draws():
    for name in draw.DRAWINGS:
        assert (draw.PICTURES / f"{name}.svg").read_text(encoding="utf-8") == draw.drawn(name), "run tools/draw.py"


@triton.jit
def _tiles_by_ticket(out_ptr, tiles_m, tiles_p, V: tl.constexpr):
    pid_m, pid_p = _tile(tl.program_id(0), tiles_m, tiles_p, V)
    tl.store(out_ptr + 2 * tl.program_id(0), pid_m)
    tl.store(out_ptr + 2 * tl.program_id(0) + 1, pid_p)


@pytest.mark.parametrize(("tiles_m", "tiles_p", "group"), [(6, 7, 3), (5, 4, 8), (7, 2, 2)])
def test_the_order_of_tiles_in_the_picture_is_the_kernels_own(tiles_m, tiles_p, group):
    tickets = range(tiles_m * tiles_p)
    out = torch.zeros(len(tickets), 2, dtype=torch.int32, device="cuda" if torch.cuda.is_available() else "cpu")
    _tiles_by_ticket[(len(tickets),)](out, tiles_m, tiles_p, SimpleNamespace(PUBLISH=True, GROUP_M=group))
    assert out.tolist() == [list(draw.tile_of(ticket, tiles_m, tiles_p, group)) for ticket in tickets]
