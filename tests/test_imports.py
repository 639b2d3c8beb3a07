"""The layering: imports run downward only, and importing the package touches neither Triton nor a GPU."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fused_lora"

# what a module may import, lowest first; a name stands for a module or a whole folder
LAYERS = [
    {"extension", "patterns", "reference", "validation"},
    {"ops"},
    {"kernels", "sharding"},
    {"functional"},
    {"switching", "config", "lora_adapter"},
    {"layer", "trained"},
    {"selection", "distributed"},
    {"merging", "model"},
    {"writing", "overview"},
    {"reading"},
    {"adapters"},
    {"__init__"},
    {"demo", "info", "integrations", "offline"},
    {"bench"},
    {"tune"},
    {"cli"},
]
# ops.py reaches up to the kernels when an implementation is asked for, never at import; extension.py to what it builds
LAZY = {("ops", "kernels"), ("extension", "_C")}


def level(room):
    return next(i for i, rooms in enumerate(LAYERS) if room in rooms)


def imports(path):
    """(importing room, imported room) for every import of the package's own modules in a file."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        targets = []
        if isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if node.level:
                base = parts[: len(parts) - node.level]
                whole = [*base, *(node.module.split(".") if node.module else [])]
            elif (node.module or "").split(".")[0] == "fused_lora":
                whole = node.module.split(".")[1:]
            else:
                continue
            targets = [whole[0]] if whole else [n if exists(n) else "__init__" for n in names]
        elif isinstance(node, ast.Import):
            own = [alias.name.split(".") for alias in node.names if alias.name.split(".")[0] == "fused_lora"]
            targets = [name[1] if len(name) > 1 else "__init__" for name in own]
        for target in targets:
            yield parts[0], target


def exists(name):
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists() or name == "_C"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downward_only(path):
    for room, target in imports(path):
        if room == target or (room, target) in LAZY:
            continue
        assert level(target) < level(room), f"{room} must not import {target}"


def test_every_room_has_its_level():
    files = {path.stem for path in PACKAGE.glob("*.py")}
    folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert files | folders == set().union(*LAYERS)


def test_files_stay_short():
    long = {str(p): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_imports_no_triton_and_touches_no_gpu():
    # torch itself may import Triton: what counts is what fused_lora adds
    code = "import sys, torch; before = set(sys.modules); import fused_lora; print(set(sys.modules) - before)"
    added = ast.literal_eval(run(code))
    assert "fused_lora.layer" in added
    assert not {name for name in added if name.split(".")[0] == "triton" or name.startswith("fused_lora.kernels")}
    assert run("import torch, fused_lora; print(torch.cuda.is_initialized())").strip() == "False"


def test_the_cpu_path_works_where_triton_is_not_installed():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import torch; from fused_lora import FusedLoRALinear, lora_linear\n"
        "print(FusedLoRALinear(4, 3)(torch.ones(2, 4)).shape)\n"
        "try: FusedLoRALinear(4, 3, impl='triton')(torch.ones(2, 4))\n"
        "except RuntimeError as error: print(error)"
    )
    out = run(code)
    assert "torch.Size([2, 3])" in out
    assert "impl='triton' cannot run here: Triton is not installed" in out
