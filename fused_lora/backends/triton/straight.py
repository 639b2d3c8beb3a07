"""Launches that are kept: the first goes through Triton's JIT, later ones go straight to its launcher.

``JITFunction.run`` binds, specialises and looks up every argument of every launch, which takes the host longer than all
the rest of a call. A launch of operands laid out as those before needs none of it: sizes and strides are the same, and
with them all that Triton specialises on, as long as pointers are multiples of 16. Where they are not, where a hook
watches, in the interpreter, and with a Triton whose launcher is called in another way (``WHY_SLOW``), every launch goes
through the JIT.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from ...torch_internals import current_device
from ..environment import interpreting

# what CompiledKernel.run takes before the kernel's parameters, in this order
_CALLED_WITH = (
    "gridX", "gridY", "gridZ", "stream", "function", "kernel_metadata", "launch_metadata", "launch_enter_hook",
    "launch_exit_hook", "args",
)  # fmt: skip
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


def _why_slow() -> str | None:
    """Why every launch goes through the JIT with this Triton, or None where repeated ones go straight."""
    for name in ("launch_enter_hook.calls", "launch_exit_hook.calls", "add_stages_inspection_hook"):
        try:
            operator.attrgetter(name)(_RUNTIME)
        except AttributeError:
            return f"Triton {triton.__version__} has no knobs.runtime.{name}"
    try:
        from triton.backends.nvidia.driver import CudaLauncher
    except ImportError as error:
        return f"Triton {triton.__version__} has no launcher for CUDA: {error}"
    names = tuple(inspect.signature(CudaLauncher.__call__).parameters)[1:]
    # 3.6 takes the same arguments, and names the first five
    if names not in (_CALLED_WITH, (*_CALLED_WITH[:5], "args")):
        return f"the launcher of Triton {triton.__version__} takes other arguments than those known: {', '.join(names)}"
    return None


WHY_SLOW = _why_slow()


@functools.cache
def _warn(why: str) -> None:
    """Once for each reason."""
    message = f"every launch goes through Triton's JIT, which takes the host longer than a repeated call needs: {why}"
    warnings.warn(message, RuntimeWarning, stacklevel=2)


class _Opened(NamedTuple):
    """Of a launcher that encodes descriptors anew in every launch: the one that it hands them to, and how it encodes
    each of them."""

    launch: Any
    encoders: list[Callable[[TensorDescriptor], list[Any]]]


def _open(launch: Any) -> _Opened | None:
    """None where Triton makes it in a way that is not known here."""
    from triton.backends.nvidia import driver

    within = inspect.getclosurevars(launch).nonlocals if inspect.isfunction(launch) else {}
    encode: Any = getattr(driver, "make_tensordesc_arg", None)
    names = () if encode is None else tuple(inspect.signature(encode).parameters)
    # 3.8 hands over one argument more, and calls it _
    if not within.get("tensordesc_meta") or "launcher" not in within or names[:2] != ("arg", "metadata"):
        return None
    if any(name != "_" for name in names[2:]):
        return None

    def encoder(how: Any) -> Callable[[TensorDescriptor], list[Any]]:
        return lambda arg: encode(arg, how, *([None] * len(names[2:])))

    return _Opened(within["launcher"], [encoder(how) for how in within["tensordesc_meta"]])


class Kept:
    """A kernel that one launch compiled. It makes others that differ from that one in pointers and scale alone."""

    def __init__(self, launch: Launch, compiled: Any, opened: _Opened | None, device: torch.device) -> None:
        """opened: of a launch with descriptors, its launcher."""
        # run loads the kernel: function is there after it
        self._run, self._function, self._metadata = compiled.run, compiled.function, compiled.packed_metadata
        # Triton unloads a kernel that nobody holds
        self._compiled = compiled
        self._grid, self._fixed = launch.grid, (*launch.args[launch.varying :], launch.variant)
        self.kernel, self._device, self._before_run = launch.kernel, device.index, launch.kernel.pre_run_hooks
        # not the descriptors themselves, which hold the first launch's operands
        self._templates = [
            (arg.shape, arg.strides, arg.block_shape) for arg in launch.args if isinstance(arg, TensorDescriptor)
        ]
        self._described: dict[tuple[int, int], list[Any]] = {}
        if opened is not None:
            self._run = copy.copy(self._run)
            self._run.launch, self._encoders = opened

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
        return self._encoders[index](TensorDescriptor(tensor, *self._templates[index]))


def keep(launch: Launch, compiled: Any, device: torch.device) -> Kept | None:
    """For a launch that was just made; None where others like it must go through the JIT too."""
    if compiled is None or interpreting():
        return None
    if WHY_SLOW is not None:
        _warn(WHY_SLOW)
        return None
    bases = [arg.base if isinstance(arg, TensorDescriptor) else arg for arg in launch.args]
    if any(base.data_ptr() % _ALIGNMENT for base in bases if isinstance(base, Tensor)):
        return None
    # another thread may be compiling it still
    compiled = compiled.result() if hasattr(compiled, "result") else compiled
    opened = None
    if any(isinstance(arg, TensorDescriptor) for arg in launch.args):
        opened = _open(compiled.run.launch)
        if opened is None:
            _warn(f"how Triton {triton.__version__} encodes tensor descriptors is not known")
            return None
    return Kept(launch, compiled, opened, device)
