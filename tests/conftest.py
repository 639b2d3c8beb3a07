"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before Triton is imported."""

import os
import shutil
import sys

import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# a file of tuned choices that its owner keeps is not under test
os.environ["FUSED_LORA_TUNED"] = ""
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # the workers share the cores
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

import pytest
from native_build import build

from fused_lora import plans
from fused_lora.backends import environment
from fused_lora.backends import native as native_backend


@pytest.fixture(autouse=True)
def _seeded_and_nan_filled():
    """Every test starts from one seed, and every torch.empty comes full of NaN: what is not written is seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def libcuda(tmp_path_factory):
    """A folder with the stub of libcuda, for ``stub_process.run``."""
    pytest.importorskip("triton")
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("the stub of libcuda is compiled by gcc, for Linux")
    from fused_lora.bench.host import stub

    folder = tmp_path_factory.mktemp("libcuda")
    stub.compile_library(folder)
    return folder


INSTALLED = native_backend.available()


@pytest.fixture(autouse=True)
def _extension_hidden(monkeypatch):
    """Whether it is built where the tests run changes none of them: those about it ask for it."""
    monkeypatch.setattr(environment, "EXTENSION_PROBLEM", "hidden by the tests")
    # calls that were planned with another choice of backends
    plans.CALLS.clear()


@pytest.fixture(scope="session")
def extension_library(tmp_path_factory):
    """The path of the extension, built once for all workers and loaded into this one; None for the installed one."""
    if "FUSED_LORA_TEST_LIBRARY" in os.environ:
        # built by whoever started this process
        torch.ops.load_library(os.environ["FUSED_LORA_TEST_LIBRARY"])
        return os.environ["FUSED_LORA_TEST_LIBRARY"]
    if INSTALLED:
        return None
    if shutil.which("g++") is None:
        pytest.skip("g++ is not here")
    folder = tmp_path_factory.getbasetemp()
    library = build((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "native")
    torch.ops.load_library(library)
    return library


@pytest.fixture
def native(extension_library, _extension_hidden, monkeypatch):
    """``fused_lora.backends.native``, and it is there: ``impl="auto"`` takes it on the CPU."""
    monkeypatch.setattr(environment, "EXTENSION_PROBLEM", None)
    plans.CALLS.clear()
    return native_backend


def named(impl, request):
    """The implementation, and it is there: "native" unhides the extension for the test that names it."""
    if impl == "native":
        request.getfixturevalue("native")
    return impl


@pytest.fixture(params=["eager", "native"])
def cpu_impl(request):
    """Each implementation in turn is what ``impl="auto"`` means on the CPU."""
    return named(request.param, request)


@pytest.fixture
def impl(request):
    """For tests that are parametrized by it, ``indirect``: what they name is there."""
    return named(request.param, request)
