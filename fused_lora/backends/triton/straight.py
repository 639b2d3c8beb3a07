"""Launches that are kept: the first goes through Triton's JIT, later ones go straight to its launcher.

``JITFunction.run`` binds, specialises and looks up every argument of every launch, which takes the host longer than all
the rest of a call. A launch of operands laid out as those before needs none of it: sizes and strides are the same, and
with them all that Triton specialises on, as long as pointers are multiples of 16. Where they are not, where a hook
watches, in the interpreter, and in a Triton whose launcher is not known here, every launch goes through the JIT.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from ...torch_internals import current_device
from ..environment import interpreting

# those whose CompiledKernel.run takes the grid, stream, function, metadata and hooks, then every parameter in order
_LAUNCHER_IS_KNOWN = triton.__version__.startswith(("3.6.", "3.7."))
_ALIGNMENT = 16
_RUNTIME: Any = knobs.runtime
# of one plan: as many layers as share it, and as many places as activations recur in
_MOST_DESCRIPTORS = 4096


@dataclass(frozen=True)
class Launch:
    """One launch, ready to be made, or to be compiled for another GPU (``fused_lora/codegen/``).

    args: the kernel's parameters in order, but for the last, V, which is variant.  Of those, the first ``varying`` are
    a launch's own, pointers and scale; the others follow from the layout of the operands.
    """

    kernel: Any
    grid: tuple[int, int]
    args: tuple[Any, ...]
    varying: int
    variant: Any
    num_warps: int
    num_stages: int

    def through_jit(self, device: torch.device) -> Any:
        """Make it. Returns the compiled kernel, or None where Triton interprets."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        # Triton launches on the current device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return self.kernel[self.grid](*self.args, V=self.variant, **options)


class Kept:
    """A kernel that one launch compiled. It makes others that differ from that one in pointers and scale alone."""

    def __init__(self, launch: Launch, compiled: Any, device: torch.device) -> None:
        # another thread may be compiling it still
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        # run loads the kernel: function is there after it
        self._run, self._function, self._metadata = compiled.run, compiled.function, compiled.packed_metadata
        self._grid, self._fixed = launch.grid, (*launch.args[launch.varying :], launch.variant)
        self.kernel, self._device, self._before_run = launch.kernel, device.index, launch.kernel.pre_run_hooks
        # not the descriptors themselves, which hold the first launch's operands
        self._templates = [
            (arg.shape, arg.strides, arg.block_shape) for arg in launch.args if isinstance(arg, TensorDescriptor)
        ]
        self._described: dict[tuple[int, int], list[Any]] = {}
        if self._templates:
            # Triton's launcher encodes descriptors anew in every launch: the one within it is told the kept ones
            within = inspect.getclosurevars(self._run.launch).nonlocals
            self._run = copy.copy(self._run)
            self._run.launch, self._encodings = within["launcher"], within["tensordesc_meta"]

    def usable(self, pointers: int) -> bool:
        """Whether :meth:`launch` may be called now.  pointers: those of the operands, or-ed."""
        return (
            not pointers % _ALIGNMENT
            and current_device() == self._device
            and not (_RUNTIME.launch_enter_hook.calls or _RUNTIME.launch_exit_hook.calls or self._before_run)
            and _RUNTIME.add_stages_inspection_hook is None
        )

    def launch(self, stream: int, *varying: Any) -> None:
        """varying: the kernel's first parameters, pointers as int, 0 for None, descriptors in their parts."""
        self._run(
            *self._grid, 1, stream, self._function, self._metadata, None, None, None, *varying, *self._fixed
        )  # fmt: skip

    def described(self, tensors: Sequence[Tensor], pointers: Sequence[int]) -> list[Any]:
        """The parts of descriptors of these tensors, laid out as the first launch's. Each place is encoded once."""
        parts: list[Any] = []
        for index, (tensor, pointer) in enumerate(zip(tensors, pointers, strict=True)):
            found = self._described.get((index, pointer))
            if found is None:
                found = self._encode(index, tensor)
                if len(self._described) >= _MOST_DESCRIPTORS:
                    self._described.clear()
                self._described[index, pointer] = found
            parts += found
        return parts

    def _encode(self, index: int, tensor: Tensor) -> list[Any]:
        from triton.backends.nvidia.driver import make_tensordesc_arg

        return make_tensordesc_arg(TensorDescriptor(tensor, *self._templates[index]), self._encodings[index])


def keep(launch: Launch, compiled: Any, device: torch.device) -> Kept | None:
    """For a launch that was just made; None where others like it must go through the JIT too."""
    if compiled is None or interpreting() or not _LAUNCHER_IS_KNOWN:
        return None
    bases = [arg.base if isinstance(arg, TensorDescriptor) else arg for arg in launch.args]
    if any(base.data_ptr() % _ALIGNMENT for base in bases if isinstance(base, Tensor)):
        return None
    return Kept(launch, compiled, device)
