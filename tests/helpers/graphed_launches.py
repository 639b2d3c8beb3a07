"""A process that captures launches on a simulated GPU, over the stub of libcuda: ``python graphed_launches.py FOLDER``.

It makes each check below and prints, in JSON, what failed. Nothing is computed: what counts is which memory a launch is
given, and by which way it goes. Simulated are streams, captures and the allocator of ``workspace.py``; plans, Triton's
JIT and launcher, PyTorch's autograd and ``make_graphed_callables`` are the real ones.
"""

import contextlib
import gc
import json
import sys
import traceback
import weakref
from pathlib import Path

import torch
import triton
from simulated_gpu import GPU, SimulatedGPU
from torch import nn

from fused_lora import FusedLoRALinear
from fused_lora.backends.triton import launch, straight, workspace
from fused_lora.bench.host import stub

EAGER, SIDE, CAPTURING, OTHER = 7, 20, 30, 40
K, N = 256, 512
# decode, tiles that hand h over, and tiles by descriptors
TOKENS = (1, 2000, 16384)


class Launches:
    """Those made since ``start``: ``every`` is (stream, the integers among its parameters) of each."""

    def __init__(self):
        launcher = triton.runtime.driver.active.launcher_cls
        launched, through_jit = launcher.__call__, straight.Launch.through_jit

        def record(made, *args):
            tensors = [arg.data_ptr() for arg in args[9:] if isinstance(arg, torch.Tensor)]
            self.every.append((args[3], {*tensors, *(arg for arg in args[9:] if type(arg) is int)}))
            return launched(made, *args)

        def count(made, device):
            self.jit += 1
            return through_jit(made, device)

        launcher.__call__, straight.Launch.through_jit = record, count
        self.start()

    def start(self):
        self.every, self.jit = [], 0


class Scene:
    """A fresh GPU, and the launches on it."""

    def __init__(self, launches, gpu):
        self.launches, self.gpu = launches, gpu
        torch.manual_seed(0)
        self.layer = FusedLoRALinear(K, N, rank=16, impl="triton", dtype=torch.bfloat16)

    def forward(self, tokens):
        with torch.no_grad():
            return self.layer(torch.zeros(tokens, K, dtype=torch.bfloat16))

    def step(self, tokens):
        x = torch.zeros(tokens, K, dtype=torch.bfloat16, requires_grad=True)
        y = self.layer(x)
        return torch.autograd.grad(y, (x, self.layer.lora_A, self.layer.lora_B), torch.zeros_like(y))

    def used(self, work, *args):
        """What such work uses of the workspace, by the starts of its tensors, once plans know it."""
        for _ in range(2):
            self.launches.start()
            work(*args)
        return self.held()

    def held(self):
        """What the launches since then use of it."""
        tensors = {**owned(workspace._counters), **owned(workspace._scratch)}
        tensors |= {tensor.data_ptr(): tensor for tensor in (*workspace._outgrown, *workspace._spares[GPU])}
        return {
            start
            for start, tensor in tensors.items()
            for _, numbers in self.launches.every
            if any(start <= number < start + tensor.nbytes for number in numbers)
        }

    def streams(self):
        return {stream for stream, _ in self.launches.every}


def owned(tensors):
    return {tensor.data_ptr(): tensor for tensor in tensors.values()}


def of_stream(stream):
    return {
        known[GPU, stream].data_ptr() for known in (workspace._counters, workspace._scratch) if (GPU, stream) in known
    }


def both(scene):
    """A call without gradients and a step, of every kernel."""
    for tokens in TOKENS:
        scene.forward(tokens)
        scene.step(tokens)


# ---------------------------------------------------------------- checks


def a_warm_up_on_the_stream_that_captures(scene):
    with scene.gpu.on(SIDE):
        used = scene.used(both, scene)
    made = len(scene.gpu.made)
    with scene.gpu.capture(SIDE):
        scene.launches.start()
        both(scene)
    assert scene.launches.jit == 0
    assert scene.streams() == {SIDE}
    assert of_stream(SIDE) <= scene.held() == used
    assert len(scene.gpu.made) == made


def a_capture_on_a_stream_that_was_never_used(scene):
    eager = scene.used(both, scene)
    made = len(scene.gpu.made)
    with scene.gpu.capture(CAPTURING):
        captured = scene.used(both, scene)
    # counters are a spare set, and scratch is the graph's own
    assert captured == of_stream(CAPTURING)
    assert len(captured) == 1
    assert not captured & eager
    assert len(scene.gpu.made) == made
    # and the first stream has what it had
    assert of_stream(EAGER) <= scene.used(both, scene) == eager


def a_capture_on_a_device_that_was_never_used(scene):
    with scene.gpu.capture(CAPTURING):
        assert not scene.used(both, scene)
    assert not scene.gpu.made
    with scene.gpu.on(CAPTURING):
        assert of_stream(CAPTURING) <= scene.used(both, scene)
        assert scene.launches.jit == 0


def scratch_that_must_grow_while_a_graph_is_captured(scene):
    scene.used(both, scene)
    with scene.gpu.on(SIDE):
        small = scene.used(scene.forward, 17)
        had = workspace._scratch[GPU, SIDE]
    with scene.gpu.capture(SIDE):
        assert scene.used(scene.forward, 17) == small
        assert had.data_ptr() not in scene.used(scene.step, TOKENS[-1])
    with scene.gpu.on(SIDE):
        scene.used(both, scene)
    grown = workspace._scratch[GPU, SIDE]
    assert grown.nbytes > had.nbytes
    assert any(tensor is had for tensor in workspace._outgrown)


def launches_on_another_stream_than_a_graph_was_captured_on(scene):
    with scene.gpu.on(SIDE):
        scene.used(both, scene)
    with scene.gpu.capture(SIDE):
        captured = scene.used(both, scene)
    with scene.gpu.on(OTHER):
        assert not scene.used(both, scene) & captured
    # what a replay must not meet
    with scene.gpu.on(SIDE):
        assert scene.used(both, scene) == captured


def graphs_of_two_streams_and_of_one(scene):
    scene.used(both, scene)
    captured = []
    for stream in (SIDE, CAPTURING, CAPTURING):
        with scene.gpu.capture(stream):
            captured.append(scene.used(both, scene))
    assert all(captured)
    assert not captured[0] & captured[1]
    # which is why they are to be replayed in turn
    assert captured[1] == captured[2]


def a_graph_that_outlives_plans_and_workspace(scene):
    with scene.gpu.on(SIDE):
        scene.used(scene.step, 1)
    with scene.gpu.capture(SIDE):
        captured = scene.used(scene.step, 1)
    # and perhaps what was outgrown before
    assert of_stream(SIDE) <= captured
    graph, launch._matmul_plans._most = scene.launches.every, 1
    with scene.gpu.on(SIDE):
        both(scene)
        workspace.counters(GPU, 2 * workspace.LEAST, SIDE)
    launch.forget_plans()
    del scene.layer
    gc.collect()
    assert not captured & of_stream(SIDE)
    scene.launches.every = graph
    assert captured <= scene.held()


def the_real_make_graphed_callables(scene):
    """Warm-up on a side stream; forward and backward captured on one that was never used; replayed on any."""
    graphs = []

    class Graph:
        def __init__(self):
            self.replays = 0
            graphs.append(self)

        def replay(self):
            self.replays += 1

    @contextlib.contextmanager
    def capture(graph, pool, **of_newer_pytorch):
        with scene.gpu.capture(CAPTURING):
            scene.launches.start()
            yield
            graph.held, graph.streams, graph.count = scene.held(), scene.streams(), len(scene.launches.every)

    with patched(
        (torch.cuda, "CUDAGraph", Graph),
        (torch.cuda, "graph", capture),
        (torch.cuda, "Stream", lambda: SIDE),
        (torch.cuda, "stream", scene.gpu.on),
        (torch.cuda, "synchronize", lambda: None),
    ):
        net = nn.Sequential(scene.layer, nn.GELU(), FusedLoRALinear(N, K, rank=4, impl="triton", dtype=torch.bfloat16))
        x = torch.zeros(2000, K, dtype=torch.bfloat16, requires_grad=True)
        graphed = torch.cuda.make_graphed_callables(net, (x,), pool=object())
        scene.launches.start()
        for _ in range(3):
            graphed(x).sum().backward()
    forward, backward = graphs
    assert (forward.count, backward.count) == (2, 4)
    assert forward.streams == backward.streams == {CAPTURING}
    # one set of counters, as backward is replayed after forward
    assert forward.held | backward.held == of_stream(CAPTURING)
    assert not (forward.held | backward.held) & of_stream(SIDE)
    assert forward.replays == backward.replays == 3
    assert not scene.launches.every
    trained = [net[0].lora_A, net[0].lora_B, net[2].lora_A, net[2].lora_B]
    assert all(parameter.grad is not None for parameter in trained)
    assert net[0].weight.grad is None


def a_plan_keeps_no_tensor_of_a_call(scene):
    """Nor would a memory pool that is current while the plan is made find one that stays in it."""
    for tokens in TOKENS:
        for _ in range(2):
            x = torch.zeros(tokens, K, dtype=torch.bfloat16, requires_grad=True)
            y = scene.layer(x)
            dy = torch.zeros_like(y)
            grads = torch.autograd.grad(y, (x, scene.layer.lora_A), dy)
            refs = [weakref.ref(tensor.untyped_storage()) for tensor in (x, y, dy, *grads)]
            del x, y, dy, grads
            gc.collect()
            assert not any(ref() for ref in refs), tokens
    weight = weakref.ref(scene.layer.weight.untyped_storage())
    del scene.layer
    gc.collect()
    assert weight() is None


def a_backward_has_the_precision_of_its_own_time(scene):
    layer = FusedLoRALinear(K, N, rank=16, impl="triton")
    x = torch.zeros(300, K, requires_grad=True)
    precisions = []

    def seen(kept, *args):
        precisions.append(kept._fixed[-1].PRECISION)

    def backward_of(forward, backward):
        torch.set_float32_matmul_precision(forward)
        y = layer(x)
        torch.set_float32_matmul_precision(backward)
        precisions.clear()
        torch.autograd.grad(y, (x, layer.lora_A), torch.zeros_like(y))
        return set(precisions)

    names = {"highest": "ieee", "high": "tf32"}
    with patched((straight.Kept, "launch", seen)):
        for _ in range(3):
            for forward in names:
                for backward, expected in names.items():
                    found = backward_of(forward, backward)
                    assert found <= {expected}, (forward, backward, found)
        assert found
    torch.set_float32_matmul_precision("highest")


CHECKS = [
    a_warm_up_on_the_stream_that_captures,
    a_capture_on_a_stream_that_was_never_used,
    a_capture_on_a_device_that_was_never_used,
    scratch_that_must_grow_while_a_graph_is_captured,
    launches_on_another_stream_than_a_graph_was_captured_on,
    graphs_of_two_streams_and_of_one,
    a_graph_that_outlives_plans_and_workspace,
    the_real_make_graphed_callables,
    a_plan_keeps_no_tensor_of_a_call,
    a_backward_has_the_precision_of_its_own_time,
]


@contextlib.contextmanager
def patched(*patches):
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for patch in patches:
        setattr(*patch)
    try:
        yield
    finally:
        for patch in before:
            setattr(*patch)


def on_simulated_gpu(gpu):
    """Plans of a CPU's tensors ask the simulated GPU for their stream and their memory."""
    driver = triton.runtime.driver.active
    return patched(
        *gpu.patches(),
        (launch, "get_ident", lambda: gpu.stream),
        (launch, "stream_of", lambda device: gpu.stream),
        (launch, "counters", lambda device, count, stream: workspace.counters(GPU, count, stream)),
        (launch, "scratch", lambda device, size, stream: workspace.scratch(GPU, size, stream)),
        (driver, "get_current_stream", lambda device: gpu.stream),
    )


def main():
    stub.install(Path(sys.argv[1]))
    torch.set_num_threads(1)
    launches, failed = Launches(), {}
    for check in CHECKS:
        most = launch._matmul_plans._most
        launch.forget_plans()
        gpu = SimulatedGPU()
        with on_simulated_gpu(gpu):
            try:
                check(Scene(launches, gpu))
            except Exception:
                failed[check.__name__] = traceback.format_exc()
        launch._matmul_plans._most = most
    print(json.dumps(failed))


if __name__ == "__main__":
    main()
