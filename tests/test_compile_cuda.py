"""The CUDA branch under torch.compile, where there is no GPU: Dynamo traces a layer on fake tensors.

Real: Dynamo, the fake tensors' devices, shapes and dtypes, the choice of an implementation, the traced forward and
backward of our autograd Function. Patched: what the driver would say, by functions that Dynamo may call and may not
trace. Not run: AOTAutograd and inductor (PyTorch's autograd engine wants a driver for CUDA tensors), and any kernel.
"""

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode

from fused_lora import FusedLoRALinear, backends
from fused_lora.backends import environment

IN_FORWARD, IN_BACKWARD = "fused_lora.lora_matmul.default", "fused_lora.adapter_grad.default"
OLD, NEW = (7, 5), (9, 0)


def untraceable(answers):
    """The driver's answer: any argument -> value. A compiler that traces it breaks its graph here, on every version."""

    def ask(*args):
        torch._dynamo.graph_break()
        return answers(*args)

    return ask


@pytest.fixture
def guard():
    """A node of autograd's asks the guard of its tensor's device for a stream; without a GPU it gets one from a guard
    that does nothing, the meta device's. FakeTensorMode sets such a one too, in later versions of builds with CUDA."""
    if torch.cuda.is_available():
        yield
        return
    cuda, meta = 1, 14  # of c10::DeviceType
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (meta + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before, guards[cuda] = guards[cuda], guards[meta]
    yield
    guards[cuda] = before


@pytest.fixture
def gpus(guard, monkeypatch):
    """Two GPUs, of which the second is current, and Triton; ``capabilities`` says which. In FakeTensorMode."""
    said = SimpleNamespace(capabilities=[NEW, NEW], current=1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", untraceable(lambda device: said.capabilities[device]))
    monkeypatch.setattr(torch.cuda, "current_device", untraceable(lambda: said.current))
    monkeypatch.setattr(environment, "TRITON_INSTALLED", True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    environment._capability.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True), FakeTensorMode(allow_non_fake_inputs=True):
        yield said
    torch._dynamo.reset()
    environment._capability.cache_clear()


def fake_layer(device="cuda:0", dtype=torch.bfloat16, **options):
    layer = FusedLoRALinear(64, 48, rank=4, dtype=dtype, **options)
    for module in layer.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            # .to() would swap the tensors, which fake ones refuse
            on_gpu = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
            setattr(module, name, on_gpu)
    return layer


def fake_x(device="cuda:0", dtype=torch.bfloat16, rows=8, requires_grad=True):
    return torch.empty(rows, 64, device=device, dtype=dtype, requires_grad=requires_grad)


def traced(function, *inputs):
    """One graph for all inputs in turn: what it would give for each, and (operator, impl) of its fused nodes."""
    graphs = []

    def record(module, _):
        graphs.append(module)
        (output,) = (node for node in module.graph.nodes if node.op == "output")
        values = [node.meta["example_value"].detach() for node in output.args[0]]
        return lambda *args: values

    compiled = torch.compile(function, fullgraph=True, backend=record)
    results = [compiled(x) for x in inputs]
    assert len(graphs) == counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    parts = [part for part in graphs[0].modules() if hasattr(part, "graph")]
    nodes = [node for part in parts for node in part.graph.nodes if node.op == "call_function"]
    fused = [node for node in nodes if str(node.target).startswith("fused_lora.")]
    operators = [(str(node.target), node.args[-1]) for node in fused]
    return SimpleNamespace(results=results, nodes=nodes, fused=fused, operators=operators)


def step_of(impl):
    """Forward, then the input gradient and the adapters'."""
    return [(IN_FORWARD, impl), (IN_FORWARD, impl), (IN_BACKWARD, impl)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_step_on_a_gpu_is_one_graph_of_the_triton_operators(gpus, dtype):
    found = traced(fake_layer(dtype=dtype), fake_x(dtype=dtype))
    assert found.operators == step_of("triton")
    (y,) = found.results
    assert (y.shape, y.dtype, y.device) == ((8, 48), dtype, torch.device("cuda", 0))


def test_a_forward_without_gradients_is_one_graph(gpus):
    layer = fake_layer().requires_grad_(False).eval()
    assert traced(layer, fake_x(requires_grad=False)).operators == [(IN_FORWARD, "triton")]


def test_other_numbers_of_tokens_recompile_nothing(gpus):
    inputs = [fake_x(rows=rows) for rows in (8, 9, 300)]
    torch._dynamo.mark_dynamic(inputs[0], 0)
    assert traced(fake_layer(), *inputs).operators == step_of("triton")


def test_dropout_draws_its_seed_on_the_gpu_and_both_directions_use_it(gpus):
    found = traced(fake_layer(dropout=0.1), fake_x())
    assert found.operators == step_of("triton")
    (drawn,) = (node for node in found.nodes if node.target is torch.randint)
    assert drawn.kwargs["device"] == torch.device("cuda", 0)
    # torch.ops.fused_lora's arguments are those of ops.py
    seeds = [node.args[5 if str(node.target) == IN_BACKWARD else 6] for node in found.fused]
    assert [str(seed) for seed in seeds] == [str(drawn)] * 3


def test_autocast_around_a_compiled_call(gpus):
    layer = fake_layer(dtype=torch.float32)
    # as torch.autocast("cuda") sets them, which switches itself off where there is no GPU
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        # casting what requires a gradient makes a node of autograd's, which wants a driver
        found = traced(layer, fake_x(dtype=torch.float32, requires_grad=False))
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", torch.float16)
    assert found.results[0].dtype == torch.bfloat16
    assert found.operators == [(IN_FORWARD, "triton"), (IN_BACKWARD, "triton")]


@pytest.mark.parametrize(("device", "impl"), [("cuda:0", "eager"), ("cuda:1", "triton")])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_each_gpu_is_asked_for_its_own_capability(gpus, device, impl, dropout):
    gpus.capabilities = [OLD, NEW]
    assert traced(fake_layer(device, dropout=dropout), fake_x(device)).operators == step_of(impl)


def test_a_device_without_an_index_is_the_current_one_at_every_call(gpus):
    gpus.capabilities = [OLD, NEW]
    for gpus.current, impl in ((1, "triton"), (0, "eager"), (1, "triton")):
        assert backends.choose("auto", torch.device("cuda"), torch.float16) == impl


def without_triton(monkeypatch, has_cuda=True):
    monkeypatch.setattr(environment, "TRITON_INSTALLED", False)
    monkeypatch.setattr(environment, "EXTENSION_PROBLEM", None)
    monkeypatch.setattr(environment, "EXTENSION_HAS_CUDA", has_cuda)


def test_the_extension_where_triton_is_missing(gpus, monkeypatch):
    without_triton(monkeypatch)
    assert traced(fake_layer(), fake_x()).operators == step_of("native")


def test_eager_where_both_are_missing(gpus, monkeypatch):
    without_triton(monkeypatch, has_cuda=False)
    assert traced(fake_layer(), fake_x()).operators == step_of("eager")


def test_float64_is_eager(gpus):
    found = traced(fake_layer(dtype=torch.float64), fake_x(dtype=torch.float64))
    assert found.operators == step_of("eager")


@pytest.mark.parametrize("impl", ["triton", "native", "eager"])
def test_an_implementation_that_was_asked_for(gpus, monkeypatch, impl):
    monkeypatch.setattr(environment, "EXTENSION_PROBLEM", None)
    monkeypatch.setattr(environment, "EXTENSION_HAS_CUDA", True)
    assert traced(fake_layer(impl=impl), fake_x()).operators == step_of(impl)
