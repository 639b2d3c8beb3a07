"""Triton's own driver and launcher where there is no GPU: over a ``libcuda.so.1`` that does nothing.

What takes a CPU tensor for one of the device stands here and nowhere else.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from ...backends import environment
from ...backends.triton import backend

LIBRARY = "libcuda.so.1"


def compile_library(folder: Path) -> None:
    """Make LIBRARY in this folder, of stub.c and the header that Triton brings.

    Raises:
        RuntimeError: there is no C compiler, or no Triton.
    """
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        raise RuntimeError("Triton is not installed")
    # Triton's own rule: it compiles its launcher with the same
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("the stub of libcuda needs a C compiler: install gcc or clang, or name one by CC")
    include = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    options = ("-shared", "-fPIC", "-O2", f"-Wl,-soname,{LIBRARY}", f"-I{include}", "-o", folder / LIBRARY)
    made = subprocess.run(
        [compiler, *map(str, options), str(Path(__file__).with_name("stub.c"))], capture_output=True, text=True
    )
    if made.returncode != 0:
        raise RuntimeError(f"{compiler} could not compile the stub of libcuda:\n{made.stderr}")


def install(folder: Path) -> ctypes.c_ulonglong:
    """Let Triton launch on CPU tensors, through the library in this folder; its count of launches.

    For a process that does nothing else, started with ``TRITON_LIBCUDA_PATH=folder``.
    """
    # what Triton compiles and loads asks for a library of this name, and finds the one that is there
    library = ctypes.CDLL(str(folder / LIBRARY), mode=ctypes.RTLD_GLOBAL)
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    from ...backends.triton import configs, launch

    device = configs.Device((9, 0), 232448, 132, "stub of an H100")
    cuda: Any = CudaDriver()
    cuda.get_current_device = lambda: 0
    cuda.get_current_stream = lambda device: 0
    cuda.get_device_capability = lambda device=0: device_capability
    device_capability = device.capability
    driver.set_active(cuda)
    rules: Any = launch
    rules.known_device = lambda _: device
    for name in ("_tile_config", "_decode_config", "_reduction_config", "_reduction_parts"):
        _ask_as_of_a_gpu(rules, name)
    here: Any = environment
    here.interpreting = lambda: False
    kernels: Any = backend
    kernels.why_not = lambda device, dtype: None
    return ctypes.c_ulonglong.in_dll(library, "stub_launches")


def _ask_as_of_a_gpu(rules: Any, name: str) -> None:
    rule = getattr(rules, name)
    setattr(rules, name, functools.cache(lambda *problem: rule(*problem[:-1], torch.device("cuda", 0))))
