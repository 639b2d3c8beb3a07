"""A GPU as ``workspace.py`` sees one: the current stream, whether it captures, and an allocator.

The allocator knows one thing: a pool is current on the thread that made it current, and on no other. What it gives are
tensors on the CPU. That PyTorch's own does the same is not tested with it: ``kernels/test_compiled.py`` does, where
there is a GPU.
"""

import contextlib
import threading
from collections import defaultdict
from types import SimpleNamespace

import torch

from fused_lora.backends.triton import workspace

GPU, OTHER_GPU = torch.device("cuda", 0), torch.device("cuda", 1)


class SimulatedGPU:
    def __init__(self):
        self.stream, self.capturing, self.full = 7, False, False
        self.here = threading.local()
        self.made = []
        self.pooled = []
        # tensors that nobody has waited for, by thread
        self.unfinished = defaultdict(list)

    def patches(self):
        """What stands for a GPU, as arguments of setattr. The workspace starts with nothing."""
        return [
            (workspace, "raw_stream", lambda index: self.stream),
            (torch.cuda, "current_stream", self._current_stream),
            (torch.cuda, "device", lambda device: contextlib.nullcontext()),
            (torch.cuda, "is_current_stream_capturing", lambda: self.capturing),
            (torch, "zeros", self._allocating(torch.zeros)),
            (torch, "empty", self._allocating(torch.empty)),
            (workspace, "_counters", {}),
            (workspace, "_scratch", {}),
            (workspace, "_spares", defaultdict(list)),
            (workspace, "_outgrown", []),
        ]

    def _current_stream(self, device):
        thread = threading.get_ident()
        return SimpleNamespace(cuda_stream=self.stream, synchronize=self.unfinished[thread].clear)

    def _allocating(self, real):
        def make(*sizes, device=None, **options):
            if device is None or torch.device(device).type != "cuda":
                return real(*sizes, device=device, **options)
            assert not self.capturing, "an allocation while a graph is captured"
            if self.full:
                raise torch.OutOfMemoryError("the simulated GPU is full")
            made = real(*sizes, **options)
            self.made.append(made)
            if getattr(self.here, "pool", False):
                self.pooled.append(made)
            self.unfinished[threading.get_ident()].append(made)
            return made

        return make

    @contextlib.contextmanager
    def on(self, stream):
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    @contextlib.contextmanager
    def pool(self):
        """A pool is current on this thread, as in the warm-up of ``mode="reduce-overhead"``."""
        self.here.pool = True
        yield
        self.here.pool = False

    @contextlib.contextmanager
    def capture(self, stream=None):
        with self.on(stream or self.stream):
            self.capturing = True
            yield
            self.capturing = False
