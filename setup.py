"""Builds the optional extension ``fused_lora._C`` if FUSED_LORA_BUILD_EXT=1 asks; all else is in pyproject.toml."""

import os
from pathlib import Path

from setuptools import setup

# one build serves CPython 3.10 and every later version
PYTHON_ABI = "0x030A0000"


def extension_arguments() -> dict:
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        raise SystemExit(
            f"FUSED_LORA_BUILD_EXT=1 builds against the installed PyTorch, and it cannot be imported here ({error}): "
            "install torch first, then `pip install --no-build-isolation`"
        ) from error
    folders = ["csrc", "csrc/cpu"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1"]
    sanitized = sanitizers if os.environ.get("FUSED_LORA_SANITIZE") == "1" else []
    extension = CppExtension(
        "fused_lora._C",
        sorted(str(source) for folder in folders for source in Path(folder).glob("*.cpp")),
        # no -fopenmp for the linker: PyTorch brings the OpenMP runtime, and there must be only one
        extra_compile_args=["-O3", "-g0", "-fopenmp", f"-DPy_LIMITED_API={PYTHON_ABI}", *sanitized],
        extra_link_args=sanitized,
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension_arguments() if os.environ.get("FUSED_LORA_BUILD_EXT") == "1" else {})
