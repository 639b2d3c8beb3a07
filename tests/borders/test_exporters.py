"""Programs that others record of a model: torch.export, torch.jit.trace, torch.onnx.export, make_fx.

What is recorded are PyTorch's own operations: it gives the layer's values and gradients, and runs without this package.
"""

import contextlib
import io
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

from fused_lora import add_adapter, apply_lora, disable_adapters, lora_parameters, set_adapter
from fused_lora.integrations.peft import fuse

GRAD_MODES = [contextlib.nullcontext, torch.no_grad]
SHAPES = [(6, 16), (2, 3, 16), (2, 2, 3, 16)]


def net():
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))


def trained(model):
    """As after some training: no B is zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def ours(**options):
    return trained(apply_lora(net(), rank=4, alpha=8, **options))


def several(**options):
    model = ours(**options)
    add_adapter(model, "second", rank=3)
    set_adapter(model, ["default", "second"])
    return trained(model)


def fused(**options):
    import peft

    config = peft.LoraConfig(r=4, target_modules=["0", "2"], lora_dropout=options.get("dropout", 0.0))
    return trained(fuse(peft.get_peft_model(net(), config))).base_model.model


MODELS = pytest.mark.parametrize("make", [ours, several, fused])


def dynamic(shape):
    return ({i: Dim(f"d{i}", min=2, max=64) for i in range(len(shape) - 1)},)


def grown(shape):
    return torch.randn(*(size + 1 for size in shape[:-1]), shape[-1])


def assert_same_gradients(program, model, x):
    """Of the adapters: the program's Parameters are the model's, or copies by the same names."""
    wanted = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert wanted
    expected = torch.autograd.grad(model(x).square().sum(), [p for _, p in wanted])
    own = dict(program.named_parameters())
    got = torch.autograd.grad(program(x).square().sum(), [own[name] for name, _ in wanted])
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def assert_of_pytorch_alone(graphs):
    names = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}
    assert names
    assert not [name for name in names if "fused_lora" in name]


@MODELS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("exported_in", GRAD_MODES)
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_the_values_and_gradients_of_the_model(cpu_impl, make, shape, exported_in, strict):
    model = make()
    with exported_in():
        program = torch.export.export(model, (torch.randn(shape),), dynamic_shapes=dynamic(shape), strict=strict)
    assert_of_pytorch_alone([program.graph])
    module = program.module()
    for x in (torch.randn(shape), grown(shape)):
        with torch.no_grad():
            torch.testing.assert_close(module(x), model(x))
        torch.testing.assert_close(module(x), model(x))
        assert_same_gradients(module, model, x)


def test_an_exported_program_is_loaded_where_this_package_is_not_imported(tmp_path):
    model, x = ours(), torch.randn(2, 3, 16)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "program.pt2")
    torch.jit.save(torch.jit.trace(model, (x,)), tmp_path / "traced.pt")
    torch.save((x, model(x).detach()), tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        "x, y = torch.load('expected.pt')\n"
        "for module in (torch.export.load('program.pt2').module(), torch.jit.load('traced.pt')):\n"
        "    torch.testing.assert_close(module(x), y, check_stride=False)\n"
        "    module(x).sum().backward()\n"
        "    assert [p.grad is not None for n, p in module.named_parameters() if 'lora_' in n] == [True] * 4\n"
        "assert not [name for name in sys.modules if name.startswith('fused_lora')]\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)


def test_training_mode_is_exported_with_the_masks_of_the_same_seed():
    model, x = ours(dropout=0.5).train(), torch.randn(5, 16)
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic(x.shape)).module()
    for batch in (x, torch.randn(9, 16)):
        torch.manual_seed(3)
        expected = model(batch)
        torch.manual_seed(3)
        torch.testing.assert_close(program(batch), expected)
        assert not torch.equal(program(batch), program(batch))


def test_autocast_and_wider_adapters_are_exported():
    half = apply_lora(net().to(torch.bfloat16), rank=4)
    assert half[0].lora_A.dtype == torch.float32
    x = torch.randn(2, 3, 16)
    program = torch.export.export(half, (x.bfloat16(),)).module()
    torch.testing.assert_close(program(x.bfloat16()), half(x.bfloat16()), rtol=0.02, atol=0.02)
    model = ours()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        program = torch.export.export(model, (x,)).module()
        expected = model(x)
    got = program(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)


def test_adapters_that_are_switched_off_are_not_in_the_program():
    model, x = ours(), torch.randn(5, 16)
    with disable_adapters(model):
        program, base = torch.export.export(model, (x,)).module(), model(x)
    assert torch.equal(program(x), base)
    assert not torch.equal(program(x), model(x))


def test_compiling_after_an_export_calls_the_operators_again():
    from torch._dynamo.testing import AotEagerAndRecordGraphs

    model, x = ours(), torch.randn(5, 16)
    torch.export.export(model, (x,))
    torch._dynamo.reset()
    recorded = AotEagerAndRecordGraphs()
    torch.compile(model, fullgraph=True, backend=recorded)(x)
    targets = [str(node.target) for graph in recorded.fw_graphs for node in graph.graph.nodes]
    assert targets.count("fused_lora.lora_matmul.default") == 2
    torch._dynamo.reset()


@MODELS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("traced_in", GRAD_MODES)
@pytest.mark.parametrize("warm", [False, True])
def test_a_traced_model_has_the_values_and_gradients_of_the_model(cpu_impl, make, shape, traced_in, warm):
    model, x = make(), torch.randn(shape)
    if warm:
        for mode in GRAD_MODES:
            with mode():
                model(x), model(x)
    with traced_in():
        traced = torch.jit.trace(model, (x,))
    for batch in (x, grown(shape)):
        torch.testing.assert_close(traced(batch), model(batch))
        assert_same_gradients(traced, model, batch)
    # what was recorded is not what later calls of the model do
    torch.testing.assert_close(model(x), traced(x))


def test_tracing_warns_of_nothing_that_a_plain_linear_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        torch.jit.trace(ours(), (torch.randn(2, 3, 16),))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("recorded_in", GRAD_MODES)
def test_make_fx_records_values(cpu_impl, shape, recorded_in):
    model, x = ours(), torch.randn(shape)
    with recorded_in():
        graph = make_fx(model)(x)
        torch.testing.assert_close(graph(x), model(x))


def onnx_values(file, x):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(file)
    (given,) = session.get_inputs()
    return torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])


@MODELS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("exported_in", GRAD_MODES)
def test_onnx_by_tracing_computes_the_model(cpu_impl, make, shape, exported_in):
    pytest.importorskip("onnx")
    model, file = make().eval(), io.BytesIO()
    axes = {"x": {i: f"d{i}" for i in range(len(shape) - 1)}}
    with exported_in():
        torch.onnx.export(model, (torch.randn(shape),), file, dynamo=False, input_names=["x"], dynamic_axes=axes)
    for x in (torch.randn(shape), grown(shape)):
        torch.testing.assert_close(onnx_values(file.getvalue(), x), model(x).detach())


@MODELS
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("exported_in", GRAD_MODES)
def test_onnx_by_export_computes_the_model(make, shape, exported_in, tmp_path):
    pytest.importorskip("onnxscript")
    model, file = make().eval(), tmp_path / "model.onnx"
    with exported_in():
        torch.onnx.export(model, (torch.randn(shape),), file, dynamo=True, dynamic_shapes=dynamic(shape), verbose=False)
    for x in (torch.randn(shape), grown(shape)):
        torch.testing.assert_close(onnx_values(file, x), model(x).detach())


def test_the_models_parameters_are_as_they_were_after_an_export():
    model = ours()
    before = [(p.requires_grad, p.detach().clone()) for p in model.parameters()]
    torch.export.export(model, (torch.randn(5, 16),))
    torch.jit.trace(model, (torch.randn(5, 16),))
    for p, (wants, value) in zip(model.parameters(), before, strict=True):
        assert p.requires_grad == wants
        assert torch.equal(p, value)
    model(torch.randn(5, 16)).sum().backward()
    assert all(p.grad is not None for p in lora_parameters(model))
