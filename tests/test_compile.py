"""torch.compile without graph breaks or recompiling, the operators' contracts, torch.export."""

import io

import oracle
import peft_models
import pytest
import torch
import torch._inductor.config
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch._dynamo.utils import counters

from fused_lora import FusedLoRALinear, LoRAConfig, add_adapter, apply_lora, lora_linear, reference, set_adapter
from fused_lora.bench.measure import saved_bytes
from fused_lora.dropout import dropout_mask

IN_FORWARD, IN_BACKWARD = "fused_lora.lora_matmul.default", "fused_lora.adapter_grad.default"


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()
    # a recompilation is an error, wherever it happens
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def compiled_once(function, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


def assert_one_graph():
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def targets(graphs):
    return [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neither_tokens_nor_scale_recompile_and_results_keep_the_budget(dtype):
    function = compiled_once(lora_linear)
    for tokens, scale in ((17, 1.5), (40, 0.3), (129, -2.0), (33, 1.0)):
        inputs = oracle.draw(tokens, 33, 20, 4, dtype=dtype, scale=scale)
        oracle.check(inputs, oracle.results(inputs, function))
    assert_one_graph()


def test_an_adapter_of_equal_rank_recompiles_nothing():
    layer = FusedLoRALinear(16, 12, rank=4, alpha=8)
    layer.add_adapter("other", rank=4, alpha=3)
    for adapter in layer.adapters.values():
        nn.init.normal_(adapter.lora_B)
    function = compiled_once(layer)
    outputs = {}
    for name, tokens in (("default", 5), ("other", 7), ("default", 5)):
        layer.set_adapter(name)
        x = torch.ones(tokens, 16)
        y = function(x)
        torch.testing.assert_close(y, layer(x))
        (grad,) = torch.autograd.grad(y.sum(), layer.lora_B)
        torch.testing.assert_close(grad, torch.autograd.grad(layer(x).sum(), layer.lora_B)[0])
        outputs[name] = y[0]
    assert not torch.allclose(outputs["default"], outputs["other"])
    assert_one_graph()


def test_another_strength_recompiles_nothing():
    net = apply_lora(nn.Sequential(nn.Linear(16, 12)), rank=4)
    nn.init.normal_(net[0].lora_B)
    function = compiled_once(net)
    x = torch.ones(5, 16)
    for strength in (1.0, 0.5, -2.0, 0.25):
        set_adapter(net, {"default": strength})
        torch.testing.assert_close(function(x), net(x))
    assert_one_graph()


@pytest.mark.parametrize("fused", [False, True], ids=["ours", "fused"])
def test_several_active_adapters_are_compiled_whole_and_other_strengths_recompile_nothing(fused):
    pair = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    if fused:
        import peft

        from fused_lora.integrations.peft import fuse

        model = peft.get_peft_model(pair, peft.LoraConfig(r=2, target_modules=["0", "2"]))
        model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2"]))
        model.base_model.set_adapter(["default", "second"])
        model = fuse(model)
    else:
        model = apply_lora(pair, rank=2)
        add_adapter(model, "second", LoRAConfig(rank=3, alpha=5))
        set_adapter(model, ["default", "second"])
    wanted = [p for name, p in model.named_parameters() if "lora_" in name]
    for parameter in wanted:
        nn.init.normal_(parameter, std=0.3)
    function = compiled_once(model)

    def outcome(call, x):
        y = call(x)
        return [y, *torch.autograd.grad(y.square().sum(), wanted)]

    for tokens, strengths in ((5, (1.0, 1.0)), (7, (1.0, 1.0)), (5, (0.5, 2.0)), (5, (-3.0, 0.25))):
        if not fused:
            set_adapter(model, dict(zip(("default", "second"), strengths, strict=True)))
        x = torch.randn(tokens, 8)
        for got, expected in zip(outcome(function, x), outcome(model, x), strict=True):
            torch.testing.assert_close(got, expected)
    assert_one_graph()


@pytest.mark.parametrize("shape", [(6, 20), (2, 3, 20)], ids=str)
def test_a_compiled_step_runs_the_fused_operators_forward_and_backward(shape):
    backend = AotEagerAndRecordGraphs()
    inputs = oracle.draw(6, 20, 12, 3).leaves()
    x = inputs.x.detach().view(shape).requires_grad_()
    function = compiled_once(lora_linear, backend)
    y = function(x, inputs.weight, inputs.lora_A, inputs.lora_B, 1.5, inputs.bias, dropout_p=0.5)
    y.sum().backward()
    assert x.grad.shape == shape
    assert targets(backend.fw_graphs).count(IN_FORWARD) == 1
    backward = [name for name in targets(backend.bw_graphs) if name.startswith(("fused_lora", "aten.mm", "aten.addmm"))]
    assert backward == [IN_FORWARD, IN_BACKWARD]
    assert_one_graph()


def test_a_compiled_step_masks_forward_and_backward_alike():
    # A is the identity and W zero: y = scale · D(x), and dx must have y's zeros
    eye, zero = torch.eye(64), torch.zeros(64, 64)
    x = torch.ones(32, 64, requires_grad=True)
    y = compiled_once(lora_linear)(x, zero, eye, eye, 1.0, dropout_p=0.5)
    y.sum().backward()
    assert 0.4 < (y == 0).double().mean().item() < 0.6
    assert torch.equal(x.grad == 0, y == 0)


@pytest.mark.parametrize("frozen", [(), ("lora_A",), ("lora_B",)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_compiled_step_keeps_for_its_backward_what_an_eager_one_keeps(frozen, dropout):
    layer = FusedLoRALinear(20, 12, rank=3, dropout=dropout)
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    # inductor's choice of what to keep, without its code
    function = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition")
    x = torch.randn(6, 20, requires_grad=True)
    compiled, eager = (saved_bytes(lambda call=call: call(x), [*layer.parameters()]) for call in (function, layer))
    x_bytes, h_bytes, seed_bytes = 6 * 20 * 4, 6 * 3 * 4, 8 * (dropout > 0)
    assert eager == x_bytes * ("lora_A" not in frozen) + h_bytes * ("lora_B" not in frozen) + seed_bytes
    assert compiled == eager


def test_inductor_keeps_the_seed_and_not_the_mask():
    layer, x = FusedLoRALinear(64, 48, rank=3, dropout=0.5), torch.randn(128, 64, requires_grad=True)
    function = torch.compile(layer, fullgraph=True)
    compiled, eager = (saved_bytes(lambda call=call: call(x), [*layer.parameters()]) for call in (function, layer))
    assert compiled == eager


def test_a_compiled_backward_makes_the_mask_once_for_both_operators():
    backend = AotEagerAndRecordGraphs()
    layer, x = FusedLoRALinear(20, 12, rank=3, dropout=0.5), torch.randn(6, 20, requires_grad=True)
    torch.compile(layer, fullgraph=True, backend=backend)(x).sum().backward()
    (graph,) = (module.graph for module in backend.bw_graphs)
    operators = {str(node.target): node for node in graph.nodes if str(node.target).startswith("fused_lora")}
    in_dx, in_dA = operators[IN_FORWARD].args[6], operators[IN_BACKWARD].args[5]
    assert in_dx is in_dA
    assert in_dx.meta["val"].shape == x.shape


def test_autocast_inside_a_compiled_function():
    inputs = oracle.draw(9, 33, 20, 4).leaves()
    args = (inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, 2.0, inputs.bias)

    def function():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return lora_linear(*args)

    y = compiled_once(function)()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, function())
    ours = torch.autograd.grad(y.sum(), inputs.lora_A)
    torch.testing.assert_close(ours, torch.autograd.grad(function().sum(), inputs.lora_A))


def test_second_derivatives_through_a_compiled_call_are_refused():
    leaves = oracle.draw(4, 5, 3, 2).leaves()
    y = compiled_once(lora_linear)(leaves.x, leaves.weight, leaves.lora_A, leaves.lora_B, 1.5)
    with pytest.raises(RuntimeError, match=r"create_graph=False|double backward"):
        torch.autograd.grad(y.sum(), leaves.x, create_graph=True)[0].sum().backward()


# ---------------------------------------------------------------- inductor


# with fallback_random, inductor draws what eager PyTorch draws: the masks are those of the same torch.manual_seed
inductor = torch._inductor.config.patch(compile_threads=1, fallback_random=True)
WIDTHS, DROPOUT = (33, 24, 16), 0.25


def small_net(dtype):
    """Two layers with dropout, each with two adapters of rank 4 that differ in scale; float32 adapters."""
    net = nn.Sequential(nn.Linear(*WIDTHS[:2]), nn.Tanh(), nn.Linear(*WIDTHS[1:])).to(dtype)
    apply_lora(net, rank=4, alpha=8, dropout=DROPOUT)
    add_adapter(net, "other", LoRAConfig(rank=4, alpha=3, dropout=DROPOUT))
    for layer in (net[0], net[2]):
        for adapter in layer.adapters.values():
            nn.init.normal_(adapter.lora_B, std=0.5)
    return net


def step(net, x, seed):
    """y, dx and the adapters' gradients of a step whose masks are drawn from this seed."""
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    y = net(x)
    y.backward(torch.ones_like(y))
    return {"y": y.detach(), "dx": x.grad}


def gradients(net):
    """Of the active adapters, by name; the layers forget them."""
    found = {}
    for number in (0, 2):
        for name in ("lora_A", "lora_B"):
            parameter = getattr(net[number], name)
            found[f"{number}.{name}"], parameter.grad = parameter.grad, None
    return found


def plainly(net, x, seed, dtype):
    """The same step in ordinary PyTorch of one dtype, from the same masks."""
    x = x.detach().to(dtype).requires_grad_()
    torch.manual_seed(seed)
    y, leaves = x, {}
    for number in (0, 2):
        layer = net[number]
        A, B = (parameter.detach().to(dtype).requires_grad_() for parameter in (layer.lora_A, layer.lora_B))
        leaves |= {f"{number}.lora_A": A, f"{number}.lora_B": B}
        drawn = torch.randint(torch.iinfo(torch.int64).max, (1,))
        mask = dropout_mask(drawn, *y.shape, DROPOUT)
        weight, bias = layer.weight.to(dtype), layer.bias.to(dtype)
        y = reference.eager_lora_linear(y, weight, A, B, layer.scale, bias, mask, DROPOUT)
        y = y.tanh() if number == 0 else y
    y.backward(torch.ones_like(y))
    return {"y": y.detach(), "dx": x.grad} | {name: leaf.grad for name, leaf in leaves.items()}


@inductor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inductor_trains_a_net_on_the_masks_of_eager_through_tokens_adapters_and_scales(dtype):
    net = small_net(dtype)
    function = compiled_once(net, "inductor")
    every = []
    for seed, (tokens, name, alpha) in enumerate(
        ((17, "default", 8.0), (40, "default", 8.0), (40, "other", 3.0), (7, "other", -5.0), (17, "default", 8.0))
    ):
        set_adapter(net, name)
        for number in (0, 2):
            net[number].adapters[name].alpha = alpha
        x = torch.randn(tokens, WIDTHS[0]).to(dtype)
        got = step(function, x, seed) | gradients(net)
        low, exact = plainly(net, x, seed, dtype), plainly(net, x, seed, torch.float64)
        assert {key: value.shape for key, value in got.items()} == {key: value.shape for key, value in exact.items()}
        assert got["0.lora_A"].dtype == torch.float32
        every.append((got, low, exact))
    for key in every[0][0]:
        # the steps together, as the oracle takes its draws: one small tensor is luck
        oracle.within(
            key, *(torch.cat([result[key].flatten() for result in results]) for results in zip(*every, strict=True))
        )
    assert_one_graph()


@torch._inductor.config.patch(compile_threads=1)
def test_a_step_of_inductors_own_random_numbers_masks_forward_and_backward_alike():
    # A is the identity and W zero: y = scale · D(x), and dx must have y's zeros
    eye, zero = torch.eye(64), torch.zeros(64, 64)
    function = compiled_once(lora_linear, "inductor")
    masks = []
    for tokens in (32, 32, 17):
        x = torch.ones(tokens, 64, requires_grad=True)
        y = function(x, zero, eye, eye, 1.0, dropout_p=0.5)
        y.sum().backward()
        assert 0.4 < (y == 0).double().mean().item() < 0.6
        assert torch.equal(x.grad == 0, y == 0)
        masks.append(y == 0)
    assert not torch.equal(masks[0], masks[1])
    assert_one_graph()


@inductor
def test_inductor_trains_a_fused_peft_model_as_peft_would():
    model = peft_models.fused_model(lora_dropout=0.0)
    function = compiled_once(model, "inductor")
    low, exact = peft_models.twins(model)
    for tokens in (17, 40):
        x = peft_models.draw_x(tokens, peft_models.K)
        wanted = [peft_models.results(twin, x.to(dtype)) for twin, dtype in ((low, x.dtype), (exact, torch.float64))]
        got = {name.removeprefix("_orig_mod."): value for name, value in peft_models.results(function, x).items()}
        assert set(got) == set(wanted[1])
        for name in got:
            oracle.within(name, got[name], wanted[0][name], wanted[1][name])
    assert_one_graph()


# ---------------------------------------------------------------- operators


def examples(seed, p):
    """Name of an operator -> argument lists, one for each way in which it is called."""
    i, (h, g) = oracle.draw(6, 10, 8, 3), (torch.randn(6, 3), torch.randn(6, 3))
    half = (torch.float32, torch.bfloat16)
    return {
        "fused_lora::lora_matmul": [
            *((a, i.weight.t(), i.lora_A.t(), i.lora_B.t(), i.bias, 1.5, seed, p, False, "eager")
              for a in (i.x, i.x.view(2, 3, 10), i.x[:0])),
            (i.dy, i.weight, i.lora_B, i.lora_A, None, 1.5, seed, p, True, "eager"),
        ],
        "fused_lora::adapter_grad": [
            (*given, 1.5, seed, p, *half, "eager")
            for given in ((i.x, g, i.dy, h), (i.x, g, None, None), (None, None, i.dy, h))
        ],
    }  # fmt: skip


@pytest.mark.parametrize("seed", [None, torch.tensor([4])], ids=["no dropout", "dropout"])
def test_every_operator_passes_opcheck(seed):
    every = examples(seed, 0.0 if seed is None else 0.5)
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fused_lora::")}
    assert registered == set(every)
    for name, calls in every.items():
        operator = getattr(torch.ops.fused_lora, name.partition("::")[2]).default
        for args in calls:
            torch.library.opcheck(operator, args)


@pytest.mark.parametrize("impl", ["eager", "native", "triton"])
def test_every_operator_gives_shapes_without_computing(impl):
    # on meta tensors there is nothing that an implementation could compute on
    for name, calls in examples(torch.tensor([4]), 0.5).items():
        operator = getattr(torch.ops.fused_lora, name.partition("::")[2]).default
        for args in calls:
            wanted = operator(*args)
            on_meta = [arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in args]
            got = operator(*on_meta[:-1], impl)
            assert [(t.shape, t.dtype, t.stride()) for t in got] == [(t.shape, t.dtype, t.stride()) for t in wanted]
            assert all(t.is_meta for t in got)


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("strict", [False, True])
def test_an_inference_model_is_exported_saved_and_loaded(strict):
    model = apply_lora(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)), rank=2, dropout=0.1).eval()
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        program = torch.export.export(
            model, (torch.randn(5, 12),), dynamic_shapes=({0: torch.export.Dim("tokens")},), strict=strict
        )
    file = io.BytesIO()
    torch.export.save(program.run_decompositions(), file)
    file.seek(0)
    loaded = torch.export.load(file)
    # of PyTorch's own operations: tests/borders/test_exporters.py
    assert not [target for target in targets([loaded.graph_module]) if "fused_lora" in target]
    x = torch.randn(9, 12)
    assert torch.equal(loaded.module()(x), model(x))
