"""PyTorch's settings of float32 products, the newer ones (2.9 and later) and the older: a layer obeys either."""

import itertools

import oracle
import pytest
import torch
from torch import nn

from fused_lora import FusedLoRALinear, lora_linear, plans
from fused_lora.torch_internals import allows_tf32

# of (object, attribute), and the values that PyTorch takes there
NEWER = {
    "fp32_precision": (torch.backends, ("ieee", "tf32", "none")),
    "cuda.matmul": (torch.backends.cuda.matmul, ("ieee", "tf32", "none")),
    "cudnn": (torch.backends.cudnn, ("ieee", "tf32", "none")),
    "mkldnn": (torch.backends.mkldnn, ("ieee", "tf32", "bf16", "none")),
    "mkldnn.matmul": (getattr(torch.backends.mkldnn, "matmul", None), ("ieee", "tf32", "bf16", "none")),
}
has_newer = pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="this PyTorch has only the older settings"
)


@pytest.fixture(autouse=True)
def _as_it_was():
    yield
    if hasattr(torch.backends, "fp32_precision"):
        for where, _ in NEWER.values():
            where.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


def settings(first):
    """Every value of the setting ``first``, followed by every other setting."""
    single = [(name, value) for name, (_, values) in NEWER.items() for value in values]
    return [pair for pair in itertools.permutations(single, 2) if pair[0][0] == first]


def make(setting):
    for name, value in setting:
        NEWER[name][0].fp32_precision = value


@has_newer
@pytest.mark.parametrize("first", NEWER)
def test_a_step_works_under_every_newer_setting_and_follows_each_change(cpu_impl, first):
    layer, plain = FusedLoRALinear(12, 9, rank=3), nn.Linear(12, 9)
    x = torch.randn(5, 12, requires_grad=True)
    for setting in settings(first):
        for one in setting:
            make([one])
            for _ in range(2):
                plain(x).sum().backward()
                layer(x).sum().backward()
                with torch.no_grad():
                    layer(x)
            assert allows_tf32() == (torch.backends.cuda.matmul.fp32_precision == "tf32")


@has_newer
@pytest.mark.parametrize("name", NEWER)
def test_results_are_right_under_every_newer_setting(cpu_impl, name):
    inputs = oracle.draw(7, 40, 30, 4)
    for value in NEWER[name][1]:
        make([(name, value)])
        oracle.check(inputs, oracle.results(inputs, lora_linear))


@has_newer
def test_kernels_multiply_as_the_newer_setting_says():
    pytest.importorskip("triton")
    from fused_lora.backends.triton import prepare

    for value, expected in (("tf32", "tf32"), ("ieee", "ieee"), ("none", "ieee"), ("tf32", "tf32")):
        torch.backends.cuda.matmul.fp32_precision = value
        assert prepare.precision(torch.float32) == expected
        assert prepare.precision(torch.bfloat16) == "ieee"


@has_newer
def test_a_planned_call_is_planned_anew_where_a_newer_setting_changes_its_products():
    layer, x = FusedLoRALinear(12, 9, rank=3, impl="eager"), torch.randn(5, 12)
    adapter = layer.adapters["default"]
    operands = x, layer.weight, adapter.lora_A, adapter.lora_B, layer.bias

    def find():
        return plans.find(operands, adapter.scale, adapter.dropout, True, "eager")

    layer(x)
    before = find()
    assert before is not None
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert find() is None
    layer(x)
    assert find() not in (None, before)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert find() is before


@pytest.mark.parametrize(("setting", "expected"), [("highest", False), ("high", True), ("medium", True)])
def test_the_older_setting_is_obeyed_as_before(setting, expected):
    torch.set_float32_matmul_precision(setting)
    assert allows_tf32() == expected


def test_a_pytorch_without_the_newer_settings_is_asked_the_older_question(monkeypatch):
    from fused_lora import torch_internals

    monkeypatch.setattr(torch_internals, "_float32_precision", None)
    for setting, expected in (("highest", False), ("high", True)):
        torch.set_float32_matmul_precision(setting)
        assert allows_tf32() == expected
