"""PyTorch's FlopCounterMode counts every product of a layer, whichever implementation makes it."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fused_lora import FusedLoRALinear, apply_lora

K, N, R = 16, 24, 4


@pytest.fixture(params=["eager", "native", "triton"])
def impl(request):
    if request.param == "native":
        request.getfixturevalue("native")
    if request.param == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("for Triton's interpreter")
    return request.param


def forward_flops(M):
    return 2 * M * (K * N + K * R + R * N)


def backward_flops(M, wants_x=True, wants_A=True, wants_B=True):
    g = 2 * M * N * R if wants_x or wants_A else 0
    return g + wants_x * 2 * M * (N * K + R * K) + wants_A * 2 * M * R * K + wants_B * 2 * M * N * R


def counted(call, *args):
    with FlopCounterMode(display=False) as counter:
        result = call(*args)
    return counter.get_total_flops(), result


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(6,), (2, 3), (3, 1, 2)], ids=str)
def test_a_step_counts_all_of_its_products(impl, lead, bias, dropout):
    layer = FusedLoRALinear(K, N, bias, rank=R, dropout=dropout, impl=impl)
    for x in (torch.randn(*lead, K), torch.randn(*lead[::-1], K).transpose(0, len(lead) - 1)):
        # later calls too, which are planned
        for _ in range(3):
            x.requires_grad_()
            flops, y = counted(layer, x)
            assert flops == forward_flops(6)
            assert counted(y.backward, torch.ones_like(y))[0] == backward_flops(6)
            with torch.no_grad():
                assert counted(layer, x)[0] == forward_flops(6)
                layer(x)
            # a backward is counted where the forward was not
            y = layer(x)
            assert counted(y.backward, torch.ones_like(y))[0] == backward_flops(6)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "x"])
def test_what_is_frozen_costs_nothing(impl, frozen):
    layer, x = FusedLoRALinear(K, N, rank=R, impl=impl), torch.randn(6, K, requires_grad=frozen != "x")
    if frozen != "x":
        getattr(layer, frozen).requires_grad_(False)
    wants = {"wants_x": frozen != "x", "wants_A": frozen != "lora_A", "wants_B": frozen != "lora_B"}
    flops, _ = counted(lambda: layer(x).sum().backward())
    assert flops == forward_flops(6) + backward_flops(6, **wants)


def test_a_models_modules_have_their_own_counts():
    model = apply_lora(nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K)), rank=R, impl="eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(6, K))
    counts = {name: sum(of.values()) for name, of in counter.get_flop_counts().items()}
    assert counts["Sequential.0"] == counts["Sequential.2"] == forward_flops(6)
    assert counts["Global"] == 2 * forward_flops(6)


def test_other_operators_formulas_stay_as_they_were():
    """The counter's table, in a fresh process: only our own operators are added to it."""
    code = (
        "import torch, torch.utils.flop_counter as c; before = dict(c.flop_registry)\n"
        "import fused_lora; from fused_lora import flops; flops.register(); flops.register()\n"
        "assert {k: v for k, v in c.flop_registry.items() if k in before} == before\n"
        "print(sorted(str(k) for k in c.flop_registry if k not in before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['fused_lora.adapter_grad', 'fused_lora.lora_matmul']"
