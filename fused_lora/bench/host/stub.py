"""Triton's own driver and launcher where there is no GPU: over a ``libcuda.so.1`` that does nothing.

Only this module makes Triton take a CPU's tensors for a GPU's.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ...backends.triton import backend

LIBRARY = "libcuda.so.1"


def compile_library(folder: Path) -> None:
    """Make LIBRARY in this folder, of stub.c and the header that Triton brings.

    Raises:
        RuntimeError: there is no Triton or no C compiler, or it fails.
    """
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        raise RuntimeError("Triton is not installed")
    # as Triton finds the compiler of its launcher
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("without a GPU a C compiler must be installed, gcc or clang, or named by CC; none is found")
    include = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    options = ("-shared", "-fPIC", "-O2", f"-Wl,-soname,{LIBRARY}", f"-I{include}", "-o", str(folder / LIBRARY))
    try:
        made = subprocess.run(
            [compiler, *options, str(Path(__file__).with_name("stub.c"))], capture_output=True, text=True
        )
    except OSError as error:
        raise RuntimeError(f"the C compiler {compiler!r} does not start: {error}") from error
    if made.returncode != 0:
        raise RuntimeError(f"the C compiler {compiler!r} fails on the stub of libcuda:\n{made.stderr}")


def install(folder: Path) -> ctypes.c_ulonglong:
    """Let Triton launch on a CPU's tensors, through the library in this folder; returns its count of launches.

    For a process that does nothing else, started with ``TRITON_LIBCUDA_PATH=folder``.
    """
    # what Triton compiles and loads asks for a library of this name, and finds the one that is there
    library = ctypes.CDLL(str(folder / LIBRARY), mode=ctypes.RTLD_GLOBAL)
    # not before
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    from ...backends.triton import choice, configs, launch_dequantize, straight

    gpu = configs.Device((9, 0), 232448, 132, "a stub of an H100")
    cuda: Any = CudaDriver()
    cuda.get_current_device = lambda: 0
    cuda.get_current_stream = lambda device: 0
    cuda.get_device_capability = lambda device=0: gpu.capability
    driver.set_active(cuda)
    rules: Any = choice
    rules.known_device = lambda device: gpu
    # descriptors in large launches, as a tuned choice may have them: their cost is the host's too
    tiles: Any = configs
    tiles.takes_descriptors = lambda problem, count, device: configs.can_describe(problem, gpu) and count >= gpu.sms
    # a CPU's tensors have no index and no stream; a PyTorch with CUDA would look for a GPU
    launches: Any = straight
    launches.current_device = lambda: None
    dequantizing: Any = launch_dequantize
    dequantizing.raw_stream = lambda index: 0
    kernels: Any = backend
    kernels.why_not = lambda device, dtype: None
    return ctypes.c_ulonglong.in_dll(library, "stub_launches")
