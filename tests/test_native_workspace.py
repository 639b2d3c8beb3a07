"""What the extension's launches on a GPU use beside their results: a stream's own, made once, outside of graphs."""

import ctypes
import shutil
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int32, c_int64

import pytest
from cuda_shim.host import SHIM, compile

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here")


@pytest.fixture
def workspace(tmp_path):
    """A fresh one: its ``of`` returns a buffer's number, 0 for none, and the size of a buffer that was made for it."""
    path = tmp_path / "workspace.so"
    compile(SHIM / "workspace.cpp", path, "-fPIC", "-shared", "-pthread")
    library = ctypes.CDLL(str(path))
    library.buffer_of.argtypes = (c_int64, c_int32, c_int64, c_int32, ctypes.POINTER(c_int64))
    library.buffer_of.restype = library.buffers_alive.restype = c_int64

    def of(count, stream=7, device=0, captures=False):
        size = c_int64(0)
        return library.buffer_of(count, device, stream, not captures, ctypes.byref(size)), size.value

    library.of = of
    return library


def test_a_stream_finds_its_own_and_nothing_is_made_for_a_second_call(workspace):
    first, size = workspace.of(100)
    assert size >= 100
    assert workspace.of(100) == workspace.of(size) == workspace.of(1) == (first, 0)
    others = {workspace.of(100, stream=8)[0], workspace.of(100, device=1)[0]}
    assert len(others | {first}) == 3
    assert workspace.of(100) == (first, 0)


def test_growing_sizes_cost_few_allocations_and_what_is_outgrown_stays(workspace):
    """A captured graph may hold its address."""
    numbers = {workspace.of(count)[0] for count in range(1, 1_000_000, 997)}
    assert len(numbers) < 10
    assert workspace.buffers_alive() == len(numbers)


def test_while_a_graph_is_captured_nothing_is_kept_that_was_not_there(workspace):
    assert workspace.of(100, captures=True) == (0, 0)
    first, size = workspace.of(100)
    assert workspace.of(size, captures=True) == (first, 0)
    assert workspace.of(size + 1, captures=True) == (0, 0)
    assert workspace.of(size) == (first, 0)
    assert workspace.of(size + 1)[0] > first


def test_threads_on_one_stream_find_one(workspace):
    with ThreadPoolExecutor(8) as threads:
        found = set(threads.map(lambda _: workspace.of(100)[0], range(200)))
    assert len(found) == 1
