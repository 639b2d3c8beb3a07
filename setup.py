"""Builds the optional extension ``fused_lora._C`` if FUSED_LORA_BUILD_EXT=1 asks; all else is in pyproject.toml.

CUDA sources join where nvcc is and PyTorch is a CUDA build. FUSED_LORA_CUDA_ARCHS: for which compute capabilities, as
80 for 8.0, or "all"; of the last the PTX goes along, for GPUs to come. Unset, it is for the GPUs that are here, or for
all where none is. 90a is Hopper with its own instructions: csrc/cuda/hopper is compiled where it is asked for.
"""

import os
from pathlib import Path

from setuptools import setup

# one build serves CPython 3.10 and every later version
PYTHON_ABI = "0x030A0000"
CUDA_ARCHS = ("80", "86", "89", "90a", "100", "120")


def extension_arguments() -> dict:
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        raise SystemExit(
            f"FUSED_LORA_BUILD_EXT=1 builds against the installed PyTorch, and it cannot be imported here ({error}): "
            "install torch first, then `pip install --no-build-isolation`"
        ) from error
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1"]
    sanitized = sanitizers if os.environ.get("FUSED_LORA_SANITIZE") == "1" else []
    folders, make, include = ["csrc", "csrc/cpu"], CppExtension, []
    # no -fopenmp for the linker: PyTorch brings the OpenMP runtime, and there must be only one
    options = {"cxx": ["-O3", "-g0", "-fopenmp", f"-DPy_LIMITED_API={PYTHON_ABI}", *sanitized]}
    if torch.version.cuda is not None and CUDA_HOME is not None:
        archs = cuda_archs()
        folders, make = [*folders, "csrc/cuda", "csrc/cuda/kernels"], CUDAExtension
        options["nvcc"] = ["-O3", *cuda_targets(archs)]
        if "90a" in archs:
            folders.append("csrc/cuda/hopper")
            options["cxx"].append("-DFUSED_LORA_HOPPER")
        include = [str(Path("csrc/cuda/device").resolve())]
    sources = [source for folder in folders for suffix in ("cpp", "cu") for source in Path(folder).glob(f"*.{suffix}")]
    extension = make(
        "fused_lora._C",
        sorted(map(str, sources)),
        include_dirs=include,
        extra_compile_args=options,
        extra_link_args=sanitized,
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def cuda_archs() -> list[str]:
    """Compute capabilities to compile for, in the order asked for."""
    asked = os.environ.get("FUSED_LORA_CUDA_ARCHS")
    if asked is None:
        return archs_here() or list(CUDA_ARCHS)
    archs = list(CUDA_ARCHS) if asked == "all" else ["90a" if arch == "90" else arch for arch in asked.split(";")]
    if not all(arch == "90a" or (arch.isdigit() and int(arch) >= 80) for arch in archs):
        raise SystemExit(
            "FUSED_LORA_CUDA_ARCHS must be all, or numbers of 80 or more, "
            f"as {';'.join(CUDA_ARCHS)}, got {';'.join(archs)}"
        )
    return archs


def archs_here() -> list[str]:
    """Those of the GPUs in this machine; Hopper's, 90, as 90a."""
    import torch

    here = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    archs = [f"{major}{minor}" for major, minor in sorted(here) if major >= 8]
    return ["90a" if arch == "90" else arch for arch in archs]


def cuda_targets(archs: list[str]) -> list[str]:
    """nvcc's options."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*targets, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


setup(**extension_arguments() if os.environ.get("FUSED_LORA_BUILD_EXT") == "1" else {})
