"""Subclasses of ``nn.Linear`` of other libraries: with a forward of their own, and without one."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import FalconConfig, FalconForCausalLM

from fused_lora import (
    FusedLoRALinear,
    LoRAConfig,
    add_adapter,
    apply_lora,
    base_state_dict,
    disable_adapters,
    load_adapter,
    lora_parameters,
    merge,
    merge_and_unload,
    save_adapter,
    set_adapter,
    summary,
    unmerge,
)

K, N = 6, 5


class Transposed(nn.Linear):
    """As FalconLinear."""

    def forward(self, input):
        hidden = input @ self.weight.T
        return hidden if self.bias is None else hidden + self.bias


class Casting(nn.Linear):
    """As openai-whisper's."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Scaled(nn.Linear):
    """With an attribute ``scale``, which our layers have too."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.scale = 3.0

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias)


class Rectified(nn.Linear):
    def forward(self, x, bound=0.0):
        return super().forward(x).clamp_min(bound)


class Renamed(nn.Linear):
    """Without a forward of its own."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.note = ["kept"]


class Router(nn.Linear):
    """As Llama 4's."""

    def forward(self, x):
        scores = super().forward(x)
        return scores.softmax(-1), scores


OWN_FORWARD = [Transposed, Casting, Scaled, Rectified]
KEPT_WEIGHT = [Transposed, Casting, Renamed]


def seeded(make):
    torch.manual_seed(0)
    return make()


def base(kind, dtype=torch.float64):
    return seeded(lambda: nn.Sequential(nn.Linear(K, K), kind(K, N))).to(dtype)


def shaken(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def x_of(dtype=torch.float64, *shape):
    return torch.randn(*(shape or (4, 3, K)), generator=torch.Generator().manual_seed(2)).to(dtype)


def falcon():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return seeded(lambda: FalconForCausalLM(FalconConfig(**sizes, num_kv_heads=4))).eval()


TOKENS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", [*OWN_FORWARD, Renamed])
def test_outputs_and_gradients_are_those_of_its_own_forward_and_the_product(kind):
    layer, plain = shaken(apply_lora(base(kind), rank=2, alpha=6, target_modules=["1"]))[1], base(kind)[1]
    assert isinstance(layer, kind)
    A, B = (layer.adapters["default"].get_parameter(name) for name in ("lora_A", "lora_B"))
    xs = [x_of().requires_grad_() for _ in range(2)]
    copies = [tensor.detach().clone().requires_grad_() for tensor in (A, B)]
    y, truth = layer(xs[0]), plain(xs[1]) + 3.0 * (xs[1] @ copies[0].T @ copies[1].T)
    torch.testing.assert_close(y, truth)
    y.sin().sum().backward()
    truth.sin().sum().backward()
    for ours, wanted in zip((xs[0], A, B), (xs[1], *copies), strict=True):
        torch.testing.assert_close(ours.grad, wanted.grad)
    assert layer.weight.grad is None
    with disable_adapters(layer):
        assert torch.equal(layer(xs[0]), plain(xs[1]))


def test_a_layer_that_casts_its_weight_takes_x_of_another_dtype():
    model, plain = shaken(apply_lora(base(Casting, torch.float32)[1:], rank=2)), base(Casting, torch.float32)[1]
    x = x_of(torch.bfloat16)
    y = model(x)
    assert y.dtype == torch.bfloat16
    h = F.linear(x, model[0].lora_A.bfloat16())
    torch.testing.assert_close(y, plain(x) + F.linear(h, model[0].lora_B.bfloat16()))


def test_further_arguments_reach_its_forward():
    layer = apply_lora(base(Rectified)[1:], rank=2)[0]
    assert float(layer(x_of(), bound=100.0).detach().min()) == 100.0


@pytest.mark.parametrize("names", ["all-linear", ["query_key_value", "dense"]])
def test_falcon_is_pefts_and_folders_go_both_ways(names, tmp_path):
    theirs = get_peft_model(falcon(), LoraConfig(r=3, lora_alpha=5, target_modules=names))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = load_adapter(falcon(), tmp_path / "theirs")
    wanted = theirs(input_ids=TOKENS).logits
    torch.testing.assert_close(ours(input_ids=TOKENS).logits, wanted, rtol=1e-4, atol=1e-5)
    fresh = apply_lora(falcon(), rank=3, alpha=5, target_modules=names)
    layers = [path for path, m in theirs.base_model.model.named_modules() if hasattr(m, "base_layer")]
    assert [row.path for row in summary(fresh).layers] == layers
    save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(falcon(), str(tmp_path / "ours"))
    torch.testing.assert_close(again(input_ids=TOKENS).logits, wanted, rtol=1e-4, atol=1e-5)
    row = summary(ours).layers[0]
    assert row.implementation == "beside"
    assert "a FalconLinear has a forward of its own" in row.why
    merged = merge_and_unload(ours)
    assert {type(module) for module in merged.modules()} == {type(module) for module in falcon().modules()}
    torch.testing.assert_close(merged(input_ids=TOKENS).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KEPT_WEIGHT)
def test_merging_and_unloading(kind):
    model, x = shaken(apply_lora(base(kind), rank=2)), x_of()
    y = model(x)
    layer = model[1].to_linear()
    assert type(layer) is kind
    torch.testing.assert_close(layer(x), model[1](x))
    assert layer.weight is not model[1].weight
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.testing.assert_close(merge(model)(x), y)
    assert all(torch.equal(base_state_dict(model)[name], tensor) for name, tensor in base(kind).state_dict().items())
    with disable_adapters(model):
        assert torch.equal(model(x), base(kind)(x))
    unmerge(model)
    assert torch.equal(model(x), y)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    merge_and_unload(model)
    assert [type(module) for module in model] == [nn.Linear, kind]
    assert [set(vars(module)) for module in model] == [set(vars(module)) for module in base(kind)]
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("kind", [Scaled, Rectified])
@pytest.mark.parametrize("way", [merge, merge_and_unload])
def test_merging_refuses_a_forward_that_does_more_with_its_weight(kind, way):
    model, x = shaken(apply_lora(base(kind), rank=2)), x_of()
    y = model(x)
    with pytest.raises(ValueError, match=rf"1: a {kind.__name__} must compute with its weight as nn\.Linear does"):
        way(model)
    assert torch.equal(model(x), y)
    assert not model[0].merged


@pytest.mark.parametrize("kind", [*OWN_FORWARD, Renamed])
def test_copies_and_pickles(kind):
    model, x = shaken(apply_lora(base(kind), rank=2)), x_of()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[1]) is type(model[1])
        assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("kind", [*OWN_FORWARD, Renamed])
def test_from_linear_shares_parameters_and_keeps_the_forward(kind):
    linear, x = base(kind)[1], x_of()
    layer = FusedLoRALinear.from_linear(linear, rank=2)
    assert layer.weight is linear.weight
    assert type(linear) is kind
    torch.testing.assert_close(layer(x), linear(x))
    assert not hasattr(linear, "adapters")


def test_several_adapters_at_once():
    model, x = shaken(apply_lora(base(Transposed), rank=2)), x_of()
    add_adapter(model, "other", LoRAConfig(rank=3, dropout=0.25))
    set_adapter(model, "other")
    shaken(model, 5)
    parts = []
    for names in ("default", "other", None, ["default", "other"]):
        set_adapter(model, names)
        parts.append(model.eval()(x))
    (layer,) = model[1:]
    with torch.no_grad():
        x = x_of()
        pairs = [(layer.adapters[name].lora_A, layer.adapters[name].lora_B) for name in ("default", "other")]
        wanted = base(Transposed)[1](x) + sum(x @ A.T @ B.T for A, B in pairs)
    torch.testing.assert_close(layer(x), wanted)
    assert not torch.equal(parts[0], parts[1])


def test_dropout_drops_at_its_rate_and_only_in_training():
    model = apply_lora(nn.Sequential(Transposed(1000, 1, bias=False)), rank=1, dropout=0.25)
    with torch.no_grad():
        model[0].lora_A.fill_(1.0)
        model[0].lora_B.fill_(1.0)
        model[0].weight.zero_()
    x = torch.ones(200, 1000)
    assert torch.equal(model.eval()(x), torch.full((200, 1), 1000.0))
    dropped = model.train()(x).detach()
    # the sum of 200,000 draws of 1 / (1 - p) or 0: a mean of 1, of a standard deviation of sqrt(p / (1 - p) / 200,000)
    assert abs(float(dropped.mean()) / 1000 - 1.0) < 6 * (0.25 / 0.75 / 200_000) ** 0.5
    assert dropped.unique().numel() > 10


@pytest.mark.parametrize("kind", [Transposed, Rectified])
def test_biases_are_trained_in_a_copy(kind):
    model, x = shaken(apply_lora(base(kind), rank=2, bias="lora_only")), x_of()
    layer, plain = model[1], base(kind)[1]
    adapter = layer.adapters["default"]
    assert not torch.equal(adapter.bias, plain.bias)
    assert torch.equal(layer.bias, plain.bias)
    changed = copy.deepcopy(plain)
    changed.bias.data.copy_(adapter.bias.data)
    y = layer(x)
    torch.testing.assert_close(y, changed(x) + x @ adapter.lora_A.T @ adapter.lora_B.T)
    y.sum().backward()
    assert adapter.bias.grad.abs().max() > 0
    assert layer.bias.grad is None


@pytest.mark.parametrize("options", [{}, {"bias": "lora_only"}])
def test_it_compiles_in_one_graph(options):
    model, x = shaken(apply_lora(base(Transposed), rank=2, **options)), x_of()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(x)


def test_what_returns_something_else_is_left_out_and_named():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.out = Router(K, N), nn.Linear(K, N)

    model = apply_lora(Routed(), rank=2)
    assert [row.path for row in summary(model).layers] == ["out"]
    assert [row.name for row in summary(model).frozen] == ["router.weight"]
    with pytest.raises(ValueError, match=r"router \(Router\), which can't take an adapter"):
        apply_lora(Routed(), target_modules=["router"])
    with pytest.warns(UserWarning, match="'router' is a Router"):
        apply_lora(Routed(), target_modules=["router", "out"])


class Sized(nn.Linear):
    """One whose forward can't be tried before it is called."""

    def forward(self, x):
        if x.device.type == "meta":
            raise RuntimeError("no such device")
        return super().forward(x)[..., :-1]


def test_a_call_that_returns_something_else_raises():
    model = apply_lora(nn.Sequential(Sized(K, N)), rank=2)
    with pytest.raises(ValueError, match=r"the forward of a Sized must return \(\.\.\., N\) = \(4, 3, 5\)"):
        model(x_of(torch.float32))


class Clashing(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.merged = False


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: nn.LazyLinear(3), "model must be initialized to be adapted, got a LazyLinear at '1'; call it once"),
        (lambda: Clashing(K, N), "1 must not have attributes .* a Clashing with 'merged'; exclude_modules"),
    ],
)
def test_what_cannot_be_adapted_is_refused_before_anything_changes(layer, message):
    model = nn.Sequential(nn.Linear(K, K), layer())
    with pytest.raises(ValueError, match=message):
        apply_lora(model)
    assert type(model[0]) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_cannot_be_adapted_can_be_left_out():
    model = nn.Sequential(nn.Linear(K, K), Clashing(K, N))
    apply_lora(model, exclude_modules=["1"])
    assert [row.name for row in summary(model).frozen] == ["1.weight"]


class Eight(nn.Linear):
    """A weight of eight bits and its scale, as layers of other libraries keep it."""

    def __init__(self):
        super().__init__(K, N, bias=False)
        self.weight = nn.Parameter(torch.randint(-128, 128, (N, K), dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * 0.01)


def test_a_weight_of_other_dtypes_gets_adapters_of_float32(tmp_path):
    model, x = shaken(apply_lora(seeded(lambda: nn.Sequential(Eight())), rank=2)), x_of(torch.float32)
    assert {parameter.dtype for parameter in lora_parameters(model)} == {torch.float32}
    y = model(x)
    torch.testing.assert_close(y, seeded(Eight)(x) + x @ model[0].lora_A.T @ model[0].lora_B.T)
    with pytest.raises(ValueError, match=r"a Eight must have a weight of 16 bits or more to merge into"):
        merge(model)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(seeded(lambda: nn.Sequential(Eight())), tmp_path)(x), y)


def test_torchaos_layers_of_quantization_aware_training():
    qat = pytest.importorskip("torchao.quantization.qat")
    config = qat.IntxFakeQuantizeConfig(torch.int4, group_size=32)
    layer = qat.FakeQuantizedLinear(64, 32, weight_config=config)
    model, x = shaken(apply_lora(nn.Sequential(copy.deepcopy(layer)), rank=2)), torch.randn(3, 64)
    torch.testing.assert_close(model(x), layer(x) + x @ model[0].lora_A.T @ model[0].lora_B.T)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 8))


def test_summary_names_what_is_large_and_stays_frozen():
    blocks = nn.ModuleList(
        nn.ModuleDict({"experts": Experts(), "attention": nn.MultiheadAttention(8, 2), "conv": nn.Conv1d(8, 8, 1)})
        for _ in range(2)
    )
    model = apply_lora(nn.ModuleDict({"blocks": blocks, "head": nn.Linear(8, 8)}), rank=2)
    found = {row.name: (row.module, row.parameters, row.percent) for row in summary(model).frozen}
    total = 2 * (4 * 64 + 3 * 64 + 3 * 8 + 64 + 8 + 64 + 8) + 64 + 8
    assert summary(model).base == total
    assert found == {
        "blocks.*.experts.gate_up_proj": ("Experts", 512, 51200 / total),
        "blocks.*.attention.in_proj_weight": ("MultiheadAttention", 384, 38400 / total),
        "blocks.*.attention.out_proj.weight": ("NonDynamicallyQuantizableLinear", 128, 12800 / total),
        "blocks.*.conv.weight": ("Conv1d", 128, 12800 / total),
    }
    assert f"blocks.*.experts.gate_up_proj (Experts) {51200 / total:.1f} %" in str(summary(model))
    saved = apply_lora(nn.ModuleDict({"e": nn.Embedding(9, 8), "head": nn.Linear(8, 8)}), modules_to_save=["e"])
    assert summary(saved).frozen == ()
