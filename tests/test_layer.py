"""``FusedLoRALinear``: a drop-in ``nn.Linear`` with adapters beside a frozen weight."""

import copy
import io
import math
import pickle

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from fused_lora import FusedLoRALinear, reference

pytestmark = pytest.mark.usefixtures("cpu_impl")


def trained(layer):
    """Give every adapter something to say."""
    with torch.no_grad():
        for adapter in layer.adapters.values():
            adapter.lora_B.normal_()
    return layer


def test_is_a_linear_with_linears_signature():
    layer = FusedLoRALinear(6, 4, False, rank=3, dtype=torch.float64)
    assert isinstance(layer, nn.Linear)
    assert layer.bias is None
    assert layer.weight.shape == (4, 6)
    assert layer.lora_A.shape == (3, 6)
    assert layer.lora_B.shape == (4, 3)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == [
        "adapters.default.lora_A",
        "adapters.default.lora_B",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [3, 17])
def test_fresh_layer_equals_its_base_exactly_or_to_rounding_at_small_m(cpu_impl, rows, dtype):
    linear = nn.Linear(300, 200).to(dtype)
    x = torch.randn(rows, 300).to(dtype)
    expected = linear(x)
    y = FusedLoRALinear.from_linear(linear, rank=4)(x)
    if cpu_impl == "native" and rows <= 16:
        exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
        oracle.within("y", y, expected, exact)
    else:
        assert torch.equal(y, expected)


def test_from_linear_shares_the_parameters_and_copies_nothing():
    linear = nn.Linear(6, 4).eval()
    layer = FusedLoRALinear.from_linear(linear, rank=2, init="gaussian")
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.weight.requires_grad
    assert not layer.training


@pytest.mark.parametrize(
    ("alpha", "rslora", "scale"), [(None, False, 1.0), (8, False, 2.0), (8, True, 4.0), (None, True, 2.0)]
)
def test_scale(alpha, rslora, scale):
    assert FusedLoRALinear(6, 5, rank=4, alpha=alpha, use_rslora=rslora).scale == scale


def test_computes_the_parametrized_linear():
    linear = nn.Linear(30, 20, dtype=torch.float64)
    layer = trained(FusedLoRALinear.from_linear(copy.deepcopy(linear), rank=3, alpha=5))
    lora = reference.parametrize_linear(linear, rank=3, alpha=5)
    with torch.no_grad():
        lora.lora_A.copy_(layer.lora_A)
        lora.lora_B.copy_(layer.lora_B)
    x = torch.randn(7, 30, dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x))
    layer(x).sin().sum().backward()
    linear(x).sin().sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, lora.lora_A.grad)
    torch.testing.assert_close(layer.lora_B.grad, lora.lora_B.grad)
    lora.enabled = False
    assert torch.equal(linear(x), F.linear(x, layer.weight, layer.bias))


def test_initialisation_is_linears_own_or_pefts_gaussian_or_the_seeds():
    kaiming = FusedLoRALinear.from_linear(nn.Linear(400, 10), rank=64).lora_A
    assert kaiming.abs().max() <= 1 / math.sqrt(400)
    assert kaiming.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.05)
    for init, std in (("normal", 1), ("gaussian", 1 / 64)):
        drawn = FusedLoRALinear.from_linear(nn.Linear(400, 10), rank=64, init=init).lora_A
        assert drawn.std().item() == pytest.approx(std, rel=0.05)


def test_adapters_take_turns_and_only_the_active_one_trains():
    layer = FusedLoRALinear(6, 4, rank=2)
    layer.add_adapter("other", rank=5, alpha=1)
    trained(layer)
    x = torch.randn(3, 6)
    first = layer(x)
    layer.set_adapter("other")
    assert layer.active_adapter == "other"
    assert layer.lora_A.shape == (5, 6)
    assert layer.scale == 0.2
    assert not torch.equal(layer(x), first)
    layer(x).sum().backward()
    assert layer.adapter("default").lora_A.grad is None
    assert not layer.adapter("default").lora_A.requires_grad
    layer.set_adapter("default")
    assert torch.equal(layer(x), first)
    layer.set_adapter(None)
    assert (layer.lora_A, layer.lora_B, layer.scale) == (None, None, 0.0)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer.delete_adapter("default")
    assert list(layer.adapters) == ["other"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_is_the_sum_rounded_once_and_unmerge_restores_every_bit(dtype):
    layer = trained(FusedLoRALinear(60, 40, rank=4, alpha=8, dtype=dtype))
    before = layer.weight.clone()
    exact = before.double() + 2 * layer.lora_B.double() @ layer.lora_A.double()
    layer.merge()
    layer.merge()
    assert layer.merged
    # one rounding to the weight's dtype, and those of a float32 sum of five terms
    torch.testing.assert_close(layer.weight.double(), exact, rtol=torch.finfo(dtype).eps / 2 + 1e-6, atol=1e-5)
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged
    assert torch.equal(layer.weight, before)


def test_merged_layer_computes_alike_and_keeps_its_parameter():
    layer = trained(FusedLoRALinear(60, 40, rank=4))
    x, weight = torch.randn(3, 60), layer.weight
    expected = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert layer.weight is weight
    plain = layer.to_linear()
    assert type(plain) is nn.Linear
    assert torch.equal(plain(x), layer(x))
    layer.unmerge()
    torch.testing.assert_close(layer.to_linear()(x), expected, rtol=1e-5, atol=1e-5)


def test_switching_or_deleting_a_merged_adapter_unmerges_it():
    for change in (lambda layer: layer.set_adapter(None), lambda layer: layer.delete_adapter("default")):
        layer = trained(FusedLoRALinear(6, 4, rank=2))
        before = layer.weight.clone()
        layer.merge()
        change(layer)
        assert not layer.merged
        assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
def test_merge_refuses_to_make_a_weight_that_is_not_finite(poison):
    layer = trained(FusedLoRALinear(6, 4, rank=2))
    with torch.no_grad():
        layer.lora_A[0, 0], layer.lora_B[0, 0] = poison, 3e38
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="adapter 'default' must merge to a finite weight"):
        layer.merge()
    assert torch.equal(layer.weight, before)
    assert not layer.merged


def test_moves_copies_pickles_and_saves_like_any_module():
    layer = trained(FusedLoRALinear(6, 4, rank=2, dropout=0.5))
    x = torch.randn(3, 6)
    expected = layer.eval()(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
    other = FusedLoRALinear(6, 4, rank=2).eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    assert set(torch.load(buffer)) == {"weight", "bias", "adapters.default.lora_A", "adapters.default.lora_B"}
    assert layer.double()(x.double()).dtype == torch.float64
    layer.merge()
    layer.float()
    layer.unmerge()
    assert layer.weight.dtype == torch.float32


def test_a_plain_checkpoint_loads():
    layer, linear = FusedLoRALinear(6, 4, rank=2), nn.Linear(6, 4)
    missing, unexpected = layer.load_state_dict(linear.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("adapters.") for name in missing)
    assert torch.equal(layer.weight, linear.weight)


def test_dropout_acts_in_training_alone():
    layer = trained(FusedLoRALinear(60, 40, rank=4, dropout=0.5))
    x = torch.randn(3, 60)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_repr_says_what_is_active():
    assert "in_features=6, out_features=4, bias=True, active_adapter='default', impl='auto'" in repr(
        FusedLoRALinear(6, 4)
    )


def test_a_batch_without_rows_has_gradients_under_dropout_too():
    layer = trained(FusedLoRALinear(6, 4, rank=2, dropout=0.3))
    x = torch.empty(0, 6, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, 6)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.adapters.parameters())


class Doubled(nn.Module):
    def forward(self, tensor):
        return 2 * tensor


@pytest.mark.parametrize("name", ["weight", "bias", "adapters.default.lora_A", "adapters.default.lora_B"])
def test_any_tensor_of_a_layer_may_be_parametrized(name):
    layer, x = trained(FusedLoRALinear(8, 6, rank=2)), torch.randn(3, 8)
    layer(x)
    place, _, last = name.rpartition(".")
    module = layer.get_submodule(place)
    parametrize.register_parametrization(module, last, Doubled())
    doubled = layer(x)
    parametrize.remove_parametrizations(module, last)
    # the values are doubled for good
    torch.testing.assert_close(doubled, layer(x))
    operands = (layer.weight, layer.lora_A, layer.lora_B, layer.scale, layer.bias)
    torch.testing.assert_close(doubled, reference.eager_lora_linear(x, *operands))


def test_parameters_may_be_held_as_plain_attributes():
    layer, x = trained(FusedLoRALinear(8, 6, rank=2)), torch.randn(3, 8)
    expected = layer(x)
    for module, names in ((layer, ("weight", "bias")), (layer.adapters["default"], ("lora_A", "lora_B"))):
        for name in names:
            vars(module)[name] = module._parameters.pop(name)
    torch.testing.assert_close(layer(x), expected)
