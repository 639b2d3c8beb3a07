"""What the ranks of test_distributed.py run: every check, in every rank of one process group.

    python distributed_checks.py FOLDER     with RANK and WORLD_SIZE in the environment

A check returns when its rank is content and raises when it is not. The first that raises ends the rank, and with it the
others: half a group would wait for ever. FOLDER/<rank>.json tells what came of each.
"""

import copy
import json
import os
import re
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed._functional_collectives import all_gather_tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fused_lora import FusedLoRALinear, apply_lora, disable_adapters, load_adapter, lora_linear, save_adapter
from fused_lora.distributed import tensor_parallel_plan
from fused_lora.model import lora_layers

CHECKS = {}
STEPS, BATCH, TOKENS, WIDTH, HIDDEN = 3, 8, 5, 64, 96
TP = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}


def check(*worlds):
    """Register a check for process groups of these sizes."""

    def register(function):
        for world in worlds:
            CHECKS.setdefault(world, []).append(function)
        return function

    return register


class Block(nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.checkpointed = checkpointed

    def forward(self, x):
        return checkpoint(self.compute, x, use_reentrant=False) if self.checkpointed else self.compute(x)

    def compute(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, checkpointed=False):
        super().__init__()
        self.blocks = nn.ModuleList([Block(checkpointed), Block(checkpointed)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def adapted(dropout=0.0, checkpointed=False, dtype=torch.float32, **fields):
    """The same network in every rank, B not zero, so that every gradient counts."""
    torch.manual_seed(1)
    net = apply_lora(Net(checkpointed), rank=4, alpha=6, dropout=dropout, **fields)
    with torch.no_grad():
        for _, layer in lora_layers(net):
            layer.lora_B.normal_(std=0.3)
    return net.to(dtype)


def data(step):
    generator = torch.Generator().manual_seed(100 + step)
    return (torch.randn(BATCH, TOKENS, WIDTH, generator=generator) for _ in range(2))


def train(net, call=None, part=slice(None), dtype=torch.float32, after=lambda: None):
    """STEPS of SGD on this part of each batch; the trained values, whole and flat."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    for step in range(STEPS):
        x, target = (tensor[part].to(dtype) for tensor in data(step))
        F.mse_loss((net if call is None else call)(x).to(torch.promote_types(dtype, torch.float32)), target).backward()
        after()
        optimizer.step()
        optimizer.zero_grad()
    return values(net)


def values(net):
    return torch.cat([whole(p).detach().flatten() for p in net.parameters() if p.requires_grad])


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mine():
    share = BATCH // dist.get_world_size()
    return slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)


def in_one_process(dtype, **fields):
    return train(adapted(dtype=dtype, **fields), dtype=dtype)


def within_budget(got, **fields):
    oracle.within("A and B", got, in_one_process(torch.float32, **fields), in_one_process(torch.float64, **fields))


def raises(error, part, call):
    with pytest.raises(error, match=re.escape(part)):
        call()


# ---------------------------------------------------------------- data parallel


@check(2, 4)
def ddp():
    for options in ({}, {"static_graph": True}, {"gradient_as_bucket_view": True}):
        net = adapted()
        within_budget(train(net, DistributedDataParallel(net, **options), mine()))


@check(2)
def ddp_with_checkpointing():
    net = adapted(checkpointed=True)
    within_budget(train(net, DistributedDataParallel(net, static_graph=True), mine()))


def shard(net, **options):
    for block in net.blocks:
        fully_shard(block, **options)
    return fully_shard(net, **options)


@check(2)
def fsdp_shards_base_and_adapters_and_keeps_the_base():
    net = shard(adapted())
    frozen = [whole(p).clone() for p in net.parameters() if not p.requires_grad]
    within_budget(train(net, part=mine()))
    assert all(isinstance(p, DTensor) and p.placements == (Shard(0),) for p in net.parameters())
    after = [whole(p) for p in net.parameters() if not p.requires_grad]
    assert all(torch.equal(one, two) for one, two in zip(frozen, after, strict=True))


@check(2)
def fsdp_mixed_precision():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    net = shard(adapted(), mp_policy=policy)
    got = train(net, part=mine())
    assert {p.dtype for p in net.parameters()} == {torch.float32}

    # one process: float32 masters, their bfloat16 copies in the computation
    masters = adapted()

    def call(x):
        low = {name: p.bfloat16() for name, p in masters.named_parameters()}
        return torch.func.functional_call(masters, low, x.bfloat16())

    oracle.within("A and B", got, train(masters, call), in_one_process(torch.float64))


@check(2)
def fsdp_float32_adapters_over_a_bfloat16_base():
    def low():
        torch.manual_seed(1)
        net = apply_lora(Net().bfloat16(), rank=4, alpha=6)
        for _, layer in lora_layers(net):
            layer.lora_B.data.normal_(std=0.3)
        return net

    one = low()
    exact = copy.deepcopy(one).double()
    start = values(one)
    net = shard(low())
    assert {p.dtype for p in net.parameters() if p.requires_grad} == {torch.float32}
    got = train(net, part=mine(), dtype=torch.bfloat16)
    assert not torch.equal(got, start)
    rounded = [tensor.to(torch.bfloat16).double() for step in range(STEPS) for tensor in data(step)]
    assert all(tensor.isfinite().all() for tensor in rounded)
    eager = train(one, dtype=torch.bfloat16)
    oracle.within("A and B", got, eager, train(exact, lambda x: exact(x.bfloat16().double()), dtype=torch.float64))


@check(2)
def fsdp_with_checkpointing_and_dropout_repeats_the_masks():
    trained = []
    for checkpointed in (False, True):
        net = shard(adapted(dropout=0.5, checkpointed=checkpointed))
        torch.manual_seed(7 + dist.get_rank())
        trained.append(train(net, part=mine()))
    assert torch.equal(*trained)


# ---------------------------------------------------------------- tensor parallel


def parallel(net, mesh, plan=TP):
    return parallelize_module(net, mesh, tensor_parallel_plan(plan))


@check(2)
def tensor_parallel():
    mesh = init_device_mesh("cpu", (2,))
    net = parallel(adapted(), mesh)
    block = net.blocks[0]
    layouts = [p.placements[0] for p in (block.up.weight, block.up.lora_A, block.up.lora_B, block.up.bias)]
    assert layouts == [Shard(0), Replicate(), Shard(0), Shard(0)]
    layouts = [p.placements[0] for p in (block.down.weight, block.down.lora_A, block.down.lora_B, block.down.bias)]
    assert layouts == [Shard(1), Shard(1), Replicate(), Replicate()]
    within_budget(train(net))


@check(2)
def tensor_parallel_moves_activations_and_thin_gradients_alone():
    net = parallel(adapted(), init_device_mesh("cpu", (2,)))
    with CommDebugMode() as comms:
        net(next(iter(data(0))))
    # one sum for each rowwise layer
    assert {str(op): n for op, n in comms.get_comm_counts().items()} == {"c10d_functional.all_reduce": 2}
    with CommDebugMode() as comms:
        net(next(iter(data(0))).requires_grad_()).sum().backward()
    # and for each block those of dx, A's gradient in up and B's in down
    assert {str(op): n for op, n in comms.get_comm_counts().items()} == {"c10d_functional.all_reduce": 8}


@check(2)
def tensor_parallel_over_sequence_shards():
    plan = {
        "blocks.*.up": ColwiseParallel(input_layouts=Shard(1)),
        "blocks.*.down": RowwiseParallel(output_layouts=Shard(1)),
    }
    mesh = init_device_mesh("cpu", (2,))
    net, one = parallel(adapted(), mesh, plan), adapted()
    x = torch.randn(3, 6, WIDTH, generator=torch.Generator().manual_seed(3))
    part = slice(0, 3) if dist.get_rank() == 0 else slice(3, 6)
    y, expected = net(x[:, part]), one(x)
    torch.testing.assert_close(y, expected[:, part])
    y.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip(net.parameters(), one.parameters(), strict=True):
        if theirs.requires_grad:
            torch.testing.assert_close(whole(ours.grad), theirs.grad, rtol=1e-4, atol=1e-4)


@check(2)
def tensor_parallel_compiles_whole():
    mesh = init_device_mesh("cpu", (2,))
    net = parallel(adapted(), mesh)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    within_budget(train(net, compiled))


@check(2)
def tensor_parallel_trained_bias_and_uneven_shards():
    mesh = init_device_mesh("cpu", (2,))
    for style, sizes in (("colwise", (7, 5)), ("rowwise", (7, 5))):
        torch.manual_seed(2)
        one = FusedLoRALinear(*sizes, rank=3)
        one.lora_B.data.normal_()
        one.bias.requires_grad_()
        layer = parallelize_module(copy.deepcopy(one), mesh, tensor_parallel_plan({"": style}))
        x = torch.randn(4, 7)
        given = distribute_tensor(x, mesh, [Replicate() if style == "colwise" else Shard(1)])
        y = layer(given.requires_grad_())
        expected = one(x)
        y = DTensor.from_local(y, mesh, [Shard(1) if style == "colwise" else Replicate()], shape=(4, 5), stride=(5, 1))
        torch.testing.assert_close(y.full_tensor(), expected)
        y.full_tensor().square().sum().backward()
        expected.square().sum().backward()
        for name in ("lora_A", "lora_B", "bias"):
            torch.testing.assert_close(whole(getattr(layer, name).grad), getattr(one, name).grad)


@check(2)
def tensor_parallel_trains_the_biases_that_adapters_bring():
    net = parallel(adapted(bias="lora_only"), init_device_mesh("cpu", (2,)))
    assert net.blocks[0].up.adapters["default"].bias.placements == (Shard(0),)
    within_budget(train(net), bias="lora_only")


@check(2)
def results_of_functional_collectives_are_operands():
    one = adapted().blocks[0].up
    x = torch.ones(2, 3, WIDTH) * (dist.get_rank() + 1)
    gathered = all_gather_tensor(x, 0, dist.group.WORLD)
    assert type(gathered).__name__ == "AsyncCollectiveTensor"
    torch.testing.assert_close(one(gathered), one(torch.cat([torch.ones(2, 3, WIDTH), torch.ones(2, 3, WIDTH) * 2])))


@check(2)
def tensor_parallel_dropout():
    mesh = init_device_mesh("cpu", (2,))
    M, K = 64, 256
    eye = torch.eye(K)
    x, weight = torch.ones(M, K), torch.zeros(K, K)

    def masks(layouts):
        operands = [distribute_tensor(t, mesh, [at]) for t, at in zip((x, weight, eye, eye), layouts, strict=True)]
        torch.manual_seed(4)
        return lora_linear(*operands, 1.0, dropout_p=0.5).full_tensor() > 0

    torch.manual_seed(4)
    one = lora_linear(x, weight, eye, eye, 1.0, dropout_p=0.5) > 0
    # every rank masks the replicated x alike: as one process does
    assert torch.equal(masks((Replicate(), Shard(0), Replicate(), Shard(0))), one)
    for layouts, halves in (
        ((Shard(1), Shard(1), Shard(1), Replicate()), 1),
        ((Shard(0), Replicate(), Replicate(), Replicate()), 0),
    ):
        # different parts of x do not share a mask: their agreement is a coin's
        first, second = masks(layouts).chunk(2, halves)
        agree = (first == second).double()
        assert abs(agree.mean().item() - 0.5) < 5 * 0.5 / agree.numel() ** 0.5


@check(2)
def tensor_parallel_switches_and_merges():
    mesh = init_device_mesh("cpu", (2,))
    one, net = adapted(), parallel(adapted(), mesh)
    (x, _) = data(0)
    torch.testing.assert_close(net(x), one(x))
    with disable_adapters(net), disable_adapters(one):
        torch.testing.assert_close(net(x), one(x))
    for _, layer in (*lora_layers(net), *lora_layers(one)):
        layer.merge()
    torch.testing.assert_close(net(x), one(x), rtol=1e-4, atol=1e-4)
    before = whole(net.blocks[0].up.weight).clone()
    for _, layer in (*lora_layers(net), *lora_layers(one)):
        layer.unmerge()
    assert not torch.equal(before, whole(net.blocks[0].up.weight))
    torch.testing.assert_close(net(x), one(x))
    assert torch.equal(whole(net.blocks[0].down.weight), one.blocks[0].down.weight)
    # one rank's NaN stops every rank
    if dist.get_rank() == 0:
        net.blocks[0].down.lora_A.data.to_local()[0, 0] = float("nan")
    raises(ValueError, "finite", net.blocks[0].down.merge)


@check(2)
def unsupported_layouts_name_themselves():
    mesh, other = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    x, weight, A, B = torch.ones(4, 6), torch.ones(8, 6), torch.ones(2, 6), torch.ones(8, 2)

    def spread(*layouts, mesh=mesh):
        return [distribute_tensor(t, mesh, [at]) for t, at in zip((x, weight, A, B), layouts, strict=True)]

    R = Replicate()
    for layouts in (
        (R, Shard(0), R, R),
        (R, Shard(1), Shard(1), R),
        (Shard(0), Shard(0), R, Shard(0)),
        (R, R, Shard(0), Shard(1)),
    ):
        raises(ValueError, "got x (", lambda at=layouts: lora_linear(*spread(*at), 1.0))
    owed = DTensor.from_local(x, mesh, [Partial()])
    raises(ValueError, "Partial", lambda: lora_linear(owed, *spread(R, R, R, R)[1:], 1.0))
    raises(TypeError, "got a plain x", lambda: lora_linear(x, *spread(R, R, R, R)[1:], 1.0))
    raises(TypeError, "got a plain weight", lambda: lora_linear(spread(R, R, R, R)[0], weight, A, B, 1.0))
    elsewhere = distribute_tensor(x, other, [R, R])
    raises(ValueError, "weight must be on x's mesh", lambda: lora_linear(elsewhere, *spread(R, R, R, R)[1:], 1.0))
    merged = adapted()
    merged.blocks[0].up.merge()
    raises(ValueError, "unmerge", lambda: parallel(merged, mesh))
    raises(ValueError, "plan['a'] must be 'colwise'", lambda: tensor_parallel_plan({"a": "columns"}))


# ---------------------------------------------------------------- two dimensions, and checkpoints


def grid():
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))


def two_dimensional():
    mesh = grid()
    return shard(parallel(adapted(), mesh["tensor"]), mesh=mesh["data"])


@check(4)
def fsdp_times_tensor_parallel():
    rows = BATCH // 2
    first = grid()["data"].get_local_rank() * rows
    within_budget(train(two_dimensional(), part=slice(first, first + rows)))


@check(4)
def sharded_layers_merge_and_unmerge():
    (x, _) = data(0)
    one = adapted()
    before = one(x)
    merged = copy.deepcopy(one)
    for _, layer in lora_layers(merged):
        layer.merge()
    for net in (two_dimensional(), shard(adapted())):
        base = whole(net.blocks[0].up.weight).clone()
        for _, layer in lora_layers(net):
            layer.merge()
        torch.testing.assert_close(net(x), merged(x), rtol=1e-4, atol=1e-4)
        net.reshard()
        for _, layer in lora_layers(net):
            layer.unmerge()
        torch.testing.assert_close(net(x), before)
        net.reshard()
        assert torch.equal(whole(net.blocks[0].up.weight), base)


@check(4)
def hybrid_sharded():
    within_budget(train(shard(adapted(), mesh=grid()), part=mine()))


@check(4)
def adapters_alone_are_saved_and_loaded_into_other_shards():
    folder = os.path.join(sys.argv[1], "dcp")
    options = StateDictOptions(ignore_frozen_params=True)
    trained = two_dimensional()
    train(trained, part=slice(0, 4))
    state = get_model_state_dict(trained, options=options)
    assert all("lora_" in name for name in state)
    assert len(state) == 8
    dcp.save({"adapters": state}, checkpoint_id=folder)
    for other in (shard(adapted()), adapted(), parallel(adapted(), init_device_mesh("cpu", (4,)))):
        with torch.no_grad():
            for p in other.parameters():
                if p.requires_grad:
                    p.zero_()
        fresh = {"adapters": get_model_state_dict(other, options=options)}
        dcp.load(fresh, checkpoint_id=folder)
        set_model_state_dict(other, fresh["adapters"], options=StateDictOptions(strict=False))
        assert torch.equal(values(other), values(trained))


@check(4)
def sharded_adapters_are_saved_whole_for_others_to_read():
    folder = os.path.join(sys.argv[1], "peft")
    trained = two_dimensional()
    train(trained, part=slice(0, 4))
    save_adapter(trained, folder)
    dist.barrier()
    plain = load_adapter(Net(), folder)
    assert torch.equal(values(plain), values(trained))
    raises(ValueError, "before", lambda: load_adapter(trained, folder))


def main(folder):
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    outcome = {}
    for function in CHECKS[world]:
        try:
            function()
            dist.barrier()
            outcome[function.__name__] = None
        except BaseException:
            outcome[function.__name__] = traceback.format_exc()
            break
    Path(folder, f"{rank}.json").write_text(json.dumps(outcome))
    if None not in outcome.values() or any(outcome.values()):
        os._exit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
