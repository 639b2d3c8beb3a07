"""Data parallel: DDP and fully_shard, each compared with one process."""

import copy

import oracle
import torch
import torch.distributed as dist
from distributed_net import STEPS, Net, adapted, check, data, in_one_process, mine, train, values, whole, within_budget
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from fused_lora import apply_lora
from fused_lora.models.apply import lora_layers


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
