"""The CUDA half of the extension without a GPU: what setup.py builds, and what nvcc makes of it for GPUs not here."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from fused_lora import backends
from fused_lora.backends import environment, native

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "csrc" / "cuda"
ARCHS = ("80", "86", "89", "90a", "100", "120")

# --------------------------------------------------------------------------------------------------
# setup.py
# --------------------------------------------------------------------------------------------------

PYTORCH = """
class version:
    cuda = {cuda!r}
class cuda:
    device_count = lambda: len({here!r})
    get_device_capability = lambda index: {here!r}[index]
"""
CPP_EXTENSION = """
from setuptools import Extension
from setuptools.command.build_ext import build_ext
CUDA_HOME = {home!r}
def CppExtension(name, sources, py_limited_api, **options):
    print("C++", *sources, options, sep="\\n")
    return Extension(name, [])
def CUDAExtension(name, sources, py_limited_api, **options):
    print("CUDA", *sources, options, sep="\\n")
    return Extension(name, [])
BuildExtension = build_ext
"""


@pytest.fixture
def setup_with(tmp_path):
    """What setup.py asks of a PyTorch of this CUDA version and with this toolkit, as lines; no compiler runs."""

    def run(cuda, home, archs=None, here=()):
        package = tmp_path / "torch" / "utils"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").touch()
        (package.parent / "__init__.py").write_text(PYTORCH.format(cuda=cuda, here=here))
        (package / "cpp_extension.py").write_text(CPP_EXTENSION.format(home=home))
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "FUSED_LORA_BUILD_EXT": "1"}
        if archs is not None:
            environment["FUSED_LORA_CUDA_ARCHS"] = archs
        command = [sys.executable, "setup.py", "--version"]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize(("cuda", "home"), [(None, "/usr/local/cuda"), ("13.0", None)], ids=["CPU build", "no nvcc"])
def test_cpu_sources_alone_without_nvcc_or_a_cuda_pytorch(setup_with, cuda, home):
    made = setup_with(cuda, home)
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("C++\n")
    assert "csrc/cpu/lora_matmul.cpp" in made.stdout
    assert "cuda" not in made.stdout


def codes(made):
    """What nvcc is to compile for."""
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("CUDA\n")
    return re.findall(r",code=(\w+)", made.stdout)


def test_cuda_sources_join_for_every_gpu(setup_with):
    made = setup_with("13.0", "/usr/local/cuda")
    assert codes(made) == [*(f"sm_{arch}" for arch in ARCHS), "compute_120"]
    sources = made.stdout.splitlines()
    for name in ("bindings.cpp", "cpu/lora_matmul.cpp", "cuda/operators.cpp", "cuda/kernels/lora_matmul.cu"):
        assert f"csrc/{name}" in sources
    assert codes(setup_with("13.0", "/usr/local/cuda", "all")) == codes(made)


def test_a_build_is_for_the_gpus_that_are_here(setup_with):
    here = setup_with("13.0", "/usr/local/cuda", here=((9, 0), (8, 0), (9, 0), (7, 5)))
    assert codes(here) == ["sm_80", "sm_90a", "compute_90a"]
    assert codes(setup_with("13.0", "/usr/local/cuda", here=((7, 5),)))[-1] == "compute_120"


def test_gpus_may_be_chosen(setup_with):
    assert codes(setup_with("13.0", "/usr/local/cuda", "86;120", here=((9, 0),))) == ["sm_86", "sm_120", "compute_120"]


@pytest.mark.parametrize("archs", ["90", "90a"])
def test_hoppers_own_kernels_join_where_it_is_asked_for(setup_with, archs):
    with_it, without = setup_with("13.0", "/usr/local/cuda", archs), setup_with("13.0", "/usr/local/cuda", "80")
    assert codes(with_it) == ["sm_90a", "compute_90a"]
    assert "FUSED_LORA_HOPPER" in with_it.stdout
    assert "csrc/cuda/hopper/" in with_it.stdout
    assert "FUSED_LORA_HOPPER" not in without.stdout
    assert "csrc/cuda/hopper/" not in without.stdout


@pytest.mark.parametrize("archs", ["75", "9.0", "sm_90", "", "100a"])
def test_a_gpu_that_cannot_be_meant_is_refused(setup_with, archs):
    made = setup_with("13.0", "/usr/local/cuda", archs)
    assert made.returncode != 0
    rule = "FUSED_LORA_CUDA_ARCHS must be all, or numbers of 80 or more, as 80;86;89;90a;100;120"
    assert f"{rule}, got {archs}" in made.stderr


# --------------------------------------------------------------------------------------------------
# nvcc and the host compiler
# --------------------------------------------------------------------------------------------------

NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not here")
RESOURCES = re.compile(
    r"Function properties for (?P<name>\w+)\n\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n.*Used (?P<registers>\d+) registers"
)


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("kernel", "instances"), [("lora_matmul", 16), ("adapter_grad", 4)])
def test_kernels_compile_without_spills_or_local_memory(tmp_path, kernel, instances, arch):
    command = [
        NVCC,
        "-cubin",
        "-O3",
        "-std=c++17",
        f"-arch=sm_{arch}",
        f"-I{CUDA / 'device'}",
        "-Xptxas=-v,-warn-spills",
    ]
    command += ["-Werror=all-warnings", "-o", str(tmp_path / "kernel.cubin"), str(CUDA / "kernels" / f"{kernel}.cu")]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    found = [match.groupdict() for match in RESOURCES.finditer(made.stderr)]
    assert len(found) == instances, made.stderr
    for resources in found:
        assert resources["stack"] == resources["stores"] == resources["loads"] == "0", resources
        # what a block of 256 threads may have
        assert int(resources["registers"]) <= 255


@needs_nvcc
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here")
def test_the_operators_are_valid_beside_pytorchs_own_headers(tmp_path):
    """All of it but the linking, which needs a PyTorch with CUDA."""
    include = Path(torch.__file__).parent / "include"
    # made when PyTorch is configured; CPU wheels lack it
    macros = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    macros.parent.mkdir(parents=True)
    macros.write_text("#pragma once\n")
    planned = subprocess.run(
        [NVCC, "--dryrun", "-cubin", "-x", "cu", os.devnull], capture_output=True, text=True
    ).stderr
    toolkit = re.search(r"^#\$ TOP=(.*)$", planned, re.MULTILINE)[1] + "/include"
    folders = [
        include,
        include / "torch" / "csrc" / "api" / "include",
        toolkit,
        sysconfig.get_path("include"),
        tmp_path,
    ]
    command = ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-Werror=return-type", *(f"-I{path}" for path in folders)]
    made = subprocess.run([*command, CUDA / "operators.cpp"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


# --------------------------------------------------------------------------------------------------
# Which implementation a CUDA tensor gets
# --------------------------------------------------------------------------------------------------

GPU = torch.device("cuda", 0)


@pytest.fixture
def built(monkeypatch):
    """An extension that is built, with CUDA or without, before a GPU of some compute capability and no Triton."""

    def build(cuda=True, capability=(9, 0)):
        monkeypatch.setattr(environment, "EXTENSION_PROBLEM", None)
        monkeypatch.setattr(environment, "EXTENSION_HAS_CUDA", cuda)
        monkeypatch.setattr(environment, "_capability", lambda index: capability)
        monkeypatch.setattr(environment, "TRITON_INSTALLED", False)

    return build


def test_without_triton_auto_is_native_where_it_can_run(built):
    built()
    assert native.why_not(GPU, torch.bfloat16) is None
    assert backends.choose("auto", GPU, torch.bfloat16) == "native"
    assert backends.choose("native", GPU, torch.float32) == "native"


@pytest.mark.parametrize(
    ("cuda", "capability", "dtype", "why"),
    [
        (False, (9, 0), torch.float32, "was built without CUDA, which needs nvcc and a PyTorch with CUDA"),
        (
            True,
            (7, 5),
            torch.float16,
            r"has compute capability \(7, 5\); the compiled extension's kernels need \(8, 0\)",
        ),
        (True, (9, 0), torch.float64, "takes float32, bfloat16, float16 on a CUDA device, not torch.float64"),
    ],
    ids=["without CUDA", "old GPU", "dtype"],
)
def test_where_native_cannot_run_auto_is_eager_and_native_says_why(built, cuda, capability, dtype, why):
    built(cuda, capability)
    assert backends.choose("auto", GPU, dtype) == "eager"
    with pytest.raises(RuntimeError, match=f"impl='native' cannot run here: .*{why}"):
        backends.choose("native", GPU, dtype)


def test_other_devices_are_named(built):
    built()
    why = native.why_not(torch.device("meta"), torch.float32)
    assert why == "the compiled extension computes on CPUs and CUDA devices, and the tensors are on meta"
