"""What the ranks of test_distributed.py run: every check, in every rank of one process group.

    python distributed_checks.py FOLDER     with RANK and WORLD_SIZE in the environment

A check returns when its rank is content and raises when it is not. The first that raises ends the rank, and with it the
others: half a group would wait for ever. FOLDER/<rank>.json tells what came of each.
"""

import copy
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_data_checks import shard
from distributed_net import BATCH, CHECKS, Net, adapted, check, data, mine, raises, train, values, whole, within_budget
from distributed_tensor_checks import parallel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

from fused_lora import load_adapter, save_adapter
from fused_lora.models.apply import lora_layers

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
