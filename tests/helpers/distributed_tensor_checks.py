"""Tensor parallel: layers over DTensors, each compared with one process."""

import copy

import torch
import torch.distributed as dist
from distributed_net import TP, WIDTH, adapted, check, data, raises, train, whole, within_budget
from torch.distributed._functional_collectives import all_gather_tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fused_lora import FusedLoRALinear, disable_adapters, lora_linear
from fused_lora.models.apply import lora_layers
from fused_lora.parallel.tensor_parallel import tensor_parallel_plan


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
def tensor_parallel_moves_activations_and_low_rank_gradients_alone():
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
