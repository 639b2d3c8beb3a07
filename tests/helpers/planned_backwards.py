"""A process that tells which backward goes straight to the kernels by a plan: ``python planned_backwards.py FOLDER``.

FOLDER has the stub of libcuda. Nothing is computed.
"""

import contextlib
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lora import FusedLoRALinear, functional
from fused_lora.bench.host import stub


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def main():
    launches = stub.install(Path(sys.argv[1]))
    layer = FusedLoRALinear(64, 48, rank=4, bias=False, impl="triton", dtype=torch.bfloat16)
    x = torch.randn(20, 64).to(torch.bfloat16).requires_grad_()
    dy = torch.randn(20, 48).to(torch.bfloat16)
    wanted = (x, layer.lora_A, layer.lora_B)
    long_way, backward = [], functional._backward

    def counted(*args):
        long_way.append(args)
        return backward(*args)

    functional._backward = counted

    def step(dy=dy, watch=None, **options):
        """Gradients, and whether they came straight from the kernels."""
        y, before = layer(x), launches.value
        long_way.clear()
        with watch or contextlib.nullcontext():
            grads = torch.autograd.grad(y, wanted, dy, **options)
        return grads, launches.value == before + 2 and not long_way

    for _ in range(3):
        step()
    assert step()[1]
    # a second derivative is of operations that autograd knows
    grads, straight = step(create_graph=True)
    assert not straight
    assert all(grad.grad_fn is not None for grad in grads)
    # what a kernel must not read as it lies there
    for other in (torch._neg_view(dy), dy.t().contiguous().t()):
        assert not step(other)[1]
    assert not step(watch=Watch())[1]
    grads, straight = step()
    assert straight
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in wanted]
    assert all(grad.grad_fn is None for grad in grads)


if __name__ == "__main__":
    main()
