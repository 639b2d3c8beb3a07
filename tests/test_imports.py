"""The layering: imports run downward only, and importing the package touches neither Triton nor a GPU."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fused_lora"

# what a module may import, lowest first; a name stands for a module or a whole folder, the longest name counts
LAYERS = [
    {"torch_internals", "renamed", "plain_checkpoints", "instances", "models.patterns"},
    {"validation", "dropout", "backends.environment"},
    {"reference", "plans", "composed", "flops"},
    {"backends"},
    {"ops", "quantized"},
    {"parallel.sharding"},
    {"functional"},
    {"switching", "adapter", "parameters", "quantized.linear"},
    {"called"},
    {"layer", "models.config", "models.modules_to_save"},
    {"conv1d", "quantized.layer", "subclasses", "models.peft_config"},
    {"models.selection", "parallel"},
    {"models"},
    {"checkpoint"},
    {"__init__"},
    {"demo", "integrations"},
    {"bench"},
    {"codegen", "tuning"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def home(module):
    """The longest name in LAYERS that a module is, or lies in."""
    parts = module.split(".")
    return next((name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in LEVEL), None)


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def is_module(name):
    place = PACKAGE.joinpath(*name.split("."))
    return (place / "__init__.py").exists() or place.with_suffix(".py").exists()


def imports(path):
    """The package's own modules that a file imports, at its top or inside a function."""
    inside = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named = [alias.name.split(".")[1:] for alias in node.names if alias.name.split(".")[0] == "fused_lora"]
        elif isinstance(node, ast.ImportFrom) and node.level:
            named = [[*inside[: len(inside) + 1 - node.level], *(node.module or "").split(".")]]
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "fused_lora":
            named = [node.module.split(".")[1:]]
        else:
            continue
        for parts in named:
            base = ".".join(filter(None, parts))
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            inner = [f"{base}.{name}".lstrip(".") for name in names if is_module(f"{base}.{name}".lstrip("."))]
            yield from inner
            if len(inner) < max(len(names), 1):
                yield base or "__init__"


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downward_only(path):
    module = module_of(path)
    for target in imports(path):
        if home(module) != home(target):
            assert LEVEL[home(target)] < LEVEL[home(module)], f"{module} must not import {target}"


def test_no_circle_of_modules():
    graph = {module_of(path): {t for t in imports(path) if t != module_of(path)} for path in FILES}
    graphlib.TopologicalSorter(graph).prepare()


def test_every_module_has_its_level():
    assert [module for path in FILES if home(module := module_of(path)) is None] == []
    assert [name for name in LEVEL if not is_module(name)] == []


def test_files_stay_short():
    long = {str(p): n for p in [*FILES, *ROOT.glob("tools/*.py")] if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_imports_no_triton_and_touches_no_gpu():
    # torch itself may import Triton: what counts is what fused_lora adds
    code = "import sys, torch; before = set(sys.modules); import fused_lora; print(set(sys.modules) - before)"
    added = ast.literal_eval(run(code))
    assert "fused_lora.layer" in added
    assert not {name for name in added if name.split(".")[0] == "triton" or name == "fused_lora.backends.triton.launch"}
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


def test_without_pytorchs_guards_every_call_is_checked_anew_and_nothing_else_changes():
    seen = run("""
import warnings, torch
from torch._C._dynamo import guards
call = "y = layer(x); y.sum().backward(); results = [y, x.grad, layer.lora_A.grad, layer.lora_B.grad]"
del guards.TensorGuards
warnings.simplefilter("error", DeprecationWarning)
from fused_lora import FusedLoRALinear, plans
from fused_lora.cli import info
torch.manual_seed(0)
layer, x = FusedLoRALinear(6, 5, rank=2), torch.randn(7, 6, requires_grad=True)
torch.nn.init.normal_(layer.lora_B)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(3):
        y = layer(x)
        dx, dA, dB = torch.autograd.grad(y.sum(), (x, layer.lora_A, layer.lora_B))
W, A, B, s = (t.detach().double() for t in (layer.weight, layer.lora_A, layer.lora_B, torch.tensor(layer.scale)))
h, g = x.detach().double() @ A.t(), B.sum(0)
for got, truth in ((y, x.double() @ W.t() + s * h @ B.t() + layer.bias), (dx, W.sum(0) + s * g @ A),
                   (dA, s * g[:, None] * x.double().sum(0)), (dB, s * h.sum(0).expand(5, 2))):
    torch.testing.assert_close(got.double(), truth.expand_as(got), atol=1e-5, rtol=1e-5)
print(len(plans.CALLS), len(said), said[0].message, info.collect()["slow"]["checks"], sep="|")
""")
    kept, warned, message, why = seen.split("|")
    assert (kept, warned) == ("0", "1")
    assert "every call is checked anew" in message
    assert "TensorGuards" in why
