"""Hopper's kernel, on a Hopper GPU or by the shim in cuda_shim/: the oracle, every tile and schedule, any order."""

import itertools
import shutil
from dataclasses import replace

import pytest
import torch
from cuda_shim import hopper
from cuda_shim.host import DropoutArguments, LoraMatmulArguments, Matrix, Turns
from native_operators import OnDevice, check, draw_matmul

from fused_lora.dropout import dropout_mask

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here")
SEED = torch.tensor([-7_000_000_000_000_000_001])
ARITHMETICS = ("bfloat16", "float16")
by_arithmetic = pytest.mark.parametrize("arithmetic", ARITHMETICS)
by_direction = pytest.mark.parametrize("backward", [False, True], ids=["forward", "input gradient"])
by_dropout = pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])

# M, K, N, R and SMs -> (publishes, columns, ranks) of the plan without dropout
PLANS = {
    (130, 72, 136, 8, 32): (0, 128, 16),
    (129, 136, 264, 56, 32): (0, 128, 64),
    (300, 136, 328, 16, 8): (0, 256, 16),
    (300, 328, 320, 40, 8): (0, 256, 64),
    (520, 64, 264, 16, 2): (1, 256, 16),
    (520, 264, 520, 64, 4): (1, 256, 64),
    (130, 72, 136, 256, 32): (1, 128, 64),
    (300, 200, 264, 136, 2): (1, 256, 64),
}


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    return hopper.build(tmp_path_factory.mktemp("hopper"))


@pytest.fixture(scope="session")
def operators(request):
    """On a Hopper GPU its own, where nothing of the plan is chosen; else the host's."""
    return OnDevice() if OnDevice.serves(hopper=True) else request.getfixturevalue("kernels")


def dropped(dropout, backward, scale=1.5):
    """What follows the tensors: dropout is on the input in the forward pass, and on the output in the other."""
    return (scale, SEED if dropout else None, 0.3 if dropout else 0.0, dropout and backward)


def arguments_of(M, P, Q, R, a, w, u, v):
    return LoraMatmulArguments(
        M, P, Q, R, *(Matrix.of(operand, a.dtype) for operand in (a, w, u, v)), None, 1.0, 0,
        DropoutArguments.of(None, 0.0),
    )  # fmt: skip


@by_arithmetic
@by_direction
@by_dropout
def test_matmul_is_as_exact_as_plain_pytorch(operators, arithmetic, backward, dropout):
    for index, (M, K, N, R, sms) in enumerate(PLANS):
        adapter_dtype = torch.float32 if index % 2 else getattr(torch, arithmetic)
        draws = [draw_matmul(arithmetic, M, K, N, R, backward, index % 3 > 0, adapter_dtype)]
        turns = Turns(index, 2 + 2 * (index % 3), sms=sms)
        check(operators, "lora_matmul", arithmetic, draws, K, *dropped(dropout, backward), turns=turns)


def test_the_shapes_above_cover_every_tile_and_schedule(kernels):
    for (M, K, N, R, sms), expected in PLANS.items():
        a, w, u, v, _ = draw_matmul("bfloat16", M, K, N, R, False)
        plan = kernels.plan(0, arguments_of(M, N, K, R, a, w, u, v), Turns(sms=sms))
        assert (plan.publishes, plan.columns, plan.ranks) == expected, (M, K, N, R, sms)


@pytest.mark.parametrize("publishes", [False, True])
def test_nothing_waits_for_a_higher_ticket(kernels, publishes):
    """So no order of clusters, however few are resident, and no tickets taken ahead can make them wait for ever.

    A cluster works on its tickets from the lowest up. Of all tickets that are not done yet, the lowest is thus what its
    cluster works on, and whatever it waits for is done.
    """
    for rows, columns, blocks in itertools.product((1, 2, 7, 8, 9, 33), (1, 2, 5, 17), (1, 2, 3, 4)):
        works = kernels.schedule(256 * rows - 3, 256 * columns - 8, 64 * blocks - 8, 256, publishes)
        tiles = [(row, column) for row, column, _ in works if column >= 0]
        assert sorted(tiles) == list(itertools.product(range(rows), range(columns)))
        if not publishes:
            continue
        # the first column computes the first block of h, and others are alone
        published = {(row, block): ticket for ticket, (row, column, block) in enumerate(works) if column <= 0}
        assert set(published) == set(itertools.product(range(rows), range(blocks)))
        for ticket, (row, column, _) in enumerate(works):
            if column < 0:
                continue
            waits_for = [published[row, block] for block in range(blocks) if (column, block) != (0, 0)]
            assert all(other < ticket for other in waits_for), (row, column)


# every cluster alone, in order; many at once, in any order; the first to start, which publish, hardly having a turn
ORDERS = [Turns(0, 2), Turns(0, 16), Turns(1, 16), Turns(2, 4), Turns(3, 8, 2), Turns(4, 16, 4), Turns(5, 2)]


@by_direction
@pytest.mark.parametrize("shape", [(300, 72, 520, 16), (300, 72, 520, 192)], ids=["one block", "blocks of ranks"])
def test_any_order_of_blocks_gives_the_same_bits(kernels, backward, shape):
    """With fewer clusters than tickets, so that one holds tickets ahead, and no more resident than a turn allows."""
    tensors = draw_matmul("bfloat16", *shape, backward)
    for dropout, clusters in ((False, 3), (True, 2)):
        bits = None
        for turns in ORDERS:
            turns = replace(turns, sms=2 * clusters)
            got = kernels.lora_matmul(*tensors, *dropped(dropout, backward), turns=turns)
            assert not any(result.isnan().any() for result in got)
            bits = bits or got
            assert all(torch.equal(one, other) for one, other in zip(bits, got, strict=True)), turns


@pytest.mark.parametrize("seed", [0, -1, 2**32 + 5, -(2**63)])
def test_dropout_bits_are_those_of_the_reference(kernels, seed):
    seed, p, ones = torch.tensor([seed]), 0.3, torch.ones(150, 136).bfloat16()
    keep = dropout_mask(seed, 150, 136, p)
    eye, nothing = torch.eye(136).bfloat16(), torch.zeros(136, 8).bfloat16()
    _, h = kernels.lora_matmul(ones, nothing.t().contiguous().t(), eye, nothing, None, 1.0, seed, p, False)
    assert torch.equal(h != 0, keep)
    # one column of a and one of u make h, of ones, whose row of v spreads it over out
    first = torch.zeros(136, 8).bfloat16()
    first[0, 0] = 1
    w = torch.zeros(136, 136).bfloat16()
    out, _ = kernels.lora_matmul(ones, w, first, ones[:8].contiguous(), None, 1.0, seed, p, True)
    assert torch.equal(out != 0, keep)


@by_arithmetic
@by_direction
def test_views_and_values_that_overflow(kernels, arithmetic, backward):
    """a with gaps between its rows, u and v that the TMA cannot read as they are; scale · h beyond the type's range."""
    M, K, N, R = 140, 72, 136, 24
    tensors = draw_matmul(arithmetic, M, K, N, R, backward, adapter_dtype=getattr(torch, arithmetic))
    a, w, u, v, bias = tensors
    a = torch.cat([a, a], 1)[:, : a.shape[1]]
    assert a.stride(0) != a.shape[1]
    u, v = torch.cat([u, u])[1:][: len(u)], torch.stack([v, v / 64], 2)[..., 1]
    check(kernels, "lora_matmul", arithmetic, [(a, w, u, v, bias)], K + R, *dropped(False, backward, 2e5))


@by_arithmetic
@by_direction
@by_dropout
def test_an_infinity_stays_in_its_row(kernels, arithmetic, backward, dropout):
    """Ranks that a tile has and the adapter has not are zero, and zero by infinity would be NaN."""
    a, w, u, v, bias = (
        None if tensor is None else tensor.abs() for tensor in draw_matmul(arithmetic, 140, 72, 136, 24, backward)
    )
    a[5, 7] = torch.inf
    for sms in (2, 32):
        out, h = kernels.lora_matmul(a, w, u, v, bias, *dropped(dropout, backward), turns=Turns(1, sms=sms))
        assert out[5].isinf().all()
        assert not h.isnan().any()
        out[5] = h[5] = 0
        assert out.isfinite().all()
        assert h.isfinite().all()


def test_what_it_does_not_serve_is_named(kernels):
    def refused(name, *changes, M=200, P=64, Q=64, R=16, arithmetic=0):
        a, w, u, v, _ = draw_matmul("bfloat16", M, Q, P, R, False)
        tensors = {"a": a, "w": w, "u": u, "v": v}
        for which, view in changes:
            tensors[which] = view(tensors[which])
        reason = kernels.why_not(arithmetic, arguments_of(M, P, Q, R, **tensors))
        assert (name is None) == (reason is None), reason
        assert name is None or name in reason, reason

    misaligned = lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)  # noqa: E731
    padded = lambda t: torch.nn.functional.pad(t, (0, 4))[:, : t.shape[1]]  # noqa: E731
    refused(None)
    refused("bfloat16 and float16", arithmetic=2)
    refused("rank", R=264)
    refused("multiples of 8", Q=60)
    refused("multiple of 16 bytes", ("a", misaligned))
    refused("multiple of 16 bytes", ("a", padded))
    refused("multiple of 16 bytes", ("w", lambda t: misaligned(t.t()).t()))
    refused("contiguous", ("a", lambda t: t.t().contiguous().t()))
    refused("apart", ("a", lambda t: t[:1].expand(200, 64)))
    refused("rows", M=100)
