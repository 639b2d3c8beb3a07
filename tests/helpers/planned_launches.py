"""A process that holds launches by a plan to those through Triton's JIT: ``python planned_launches.py FOLDER``.

FOLDER has the stub of libcuda. Nothing is computed: what reaches the launcher is compared, parameter by parameter.
"""

import random
import sys
from pathlib import Path

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_lora import FusedLoRALinear, lora_linear
from fused_lora.backends.triton import launch, straight
from fused_lora.bench.host import stub

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Recorder:
    """What each launch passes to Triton's launcher, and how many went through the JIT."""

    def __init__(self):
        self.launches, self.jit = [], 0
        launcher = triton.runtime.driver.active.launcher_cls
        real, through_jit = launcher.__call__, straight.Launch.through_jit

        def record(made, *args):
            self.launches.append(args)
            return real(made, *args)

        def count(made, device):
            self.jit += 1
            return through_jit(made, device)

        launcher.__call__, straight.Launch.through_jit = record, count

    def of(self, call, operands=()):
        """The launches of ``call``, each as comparable values, and how many went through the JIT."""
        self.launches, self.jit = [], 0
        tensors = [operand for operand in operands if isinstance(operand, torch.Tensor)]
        names = {tensor.data_ptr(): number for number, tensor in enumerate(tensors)}
        results = call()
        return [plain(args, names) for args in self.launches], self.jit, results


def plain(args, names):
    """Grid, function and parameters: sizes, strides, flags and scale as they are, of a pointer its alignment and name.

    names: address -> number, of the operands and then by when it was first seen. Scratch, the last but one before
    scale, has none: a plan's launches share it. A launch without scale has no scratch.
    """
    grid, function, parameters = args[:3], args[4], args[9:]
    shown, pointers = [], {}
    for value in parameters:
        address = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if isinstance(value, TensorDescriptor):
            shown += ["map", *value.shape, *value.strides]
        elif type(value).__name__ == "PyCUtensorMap":
            shown.append("map")
        elif value is None or (isinstance(value, int) and value == 0):
            shown.append(0)
        elif isinstance(address, int) and address > 1 << 32:
            pointers[len(shown)] = address
            shown.append("pointer")
        else:
            shown.append(value)
    for index in [index - 2 for index, value in enumerate(shown) if isinstance(value, float)][:1]:
        shown[index] = "scratch"
        pointers.pop(index, None)
    for index, address in pointers.items():
        shown[index] = ("pointer", address % 16, names.setdefault(address, len(names)))
    return grid, function, shown


def step(operands):
    x, weight, lora_A, lora_B, bias, scale, dropout_p = operands
    x = x.detach().requires_grad_()
    y = lora_linear(x, weight, lora_A, lora_B, scale, bias, dropout_p=dropout_p, impl="triton")
    return torch.autograd.grad(y, (x, lora_A, lora_B), torch.ones_like(y))


def forward(operands):
    x, weight, lora_A, lora_B, bias, scale, dropout_p = operands
    with torch.no_grad():
        return lora_linear(x, weight, lora_A, lora_B, scale, bias, dropout_p=dropout_p, impl="triton")


def draw(rng, dtype=None):
    dtype = dtype or rng.choice(DTYPES)
    adapters = rng.choice((dtype, torch.float32))
    lead = rng.choice(((1,), (16,), (17,), (33,), (2, 40), (300,), (1100,)))
    K, N, R = rng.choice((64, 123, 256)), rng.choice((48, 129, 512)), rng.choice((1, 5, 16, 100))
    bias = torch.randn(N).to(dtype) if rng.random() < 0.5 else None
    A, B = torch.randn(R, K).to(adapters), torch.randn(N, R).to(adapters)
    weight = torch.nn.Parameter(torch.randn(N, K).to(dtype), requires_grad=False)
    x = torch.randn(*lead, K).to(dtype)
    p = rng.choice((0.0, 0.0, 0.25))
    return [x, weight, A.requires_grad_(), B.requires_grad_(), bias, rng.uniform(0.1, 4.0), p]


def changed(rng, operands):
    """The operands with something else about one of them, as a user may change it between two calls."""
    x, weight, lora_A, lora_B, bias, _, p = operands
    kind = rng.randrange(9)
    if kind == 0:
        weight = torch.nn.Parameter(weight.detach().t().contiguous().t(), requires_grad=False)
    elif kind == 1:
        # in place: the Parameter is the same object
        weight.data = torch.randn(weight.shape[0], 2 * weight.shape[1]).to(weight.dtype)[:, ::2]
    elif kind == 2:
        x = torch.randn(x.numel() + 1).to(x.dtype)[1:].view(x.shape)
    elif kind == 3:
        x = torch.randn(*x.shape[:-1], 2 * x.shape[-1]).to(x.dtype)[..., : x.shape[-1]]
    elif kind == 4:
        x = torch.randn(3 + x.shape[0], *x.shape[1:]).to(x.dtype)
    elif kind == 5:
        lora_A = lora_A.detach().t().contiguous().t().requires_grad_()
        lora_B = lora_B.detach().float().requires_grad_()
    elif kind == 6:
        torch.set_float32_matmul_precision(rng.choice(("highest", "high")))
    elif kind == 7 and bias is not None:
        bias = torch.randn(2 * bias.shape[0]).to(bias.dtype)[::2]
    elif kind == 8:
        p = 0.5 - p
    return [x, weight, lora_A, lora_B, bias, rng.uniform(0.1, 4.0), p]


def compare(recorder, call, operands):
    """How many launches ``call`` makes, and how many of them by a plan; all pass what the JIT passes."""
    for _ in range(2):
        # a plan starts the kernel that the JIT compiled for its first launch
        recorder.of(lambda: call(operands), operands)
    got, jit, _ = recorder.of(lambda: call(operands), operands)
    planned = len(got) - jit
    launch.forget_plans()
    expected, jit, _ = recorder.of(lambda: call(operands), operands)
    assert jit == len(expected) > 0
    assert got == expected, (got, expected)
    return len(got), planned


def main():
    stub.install(Path(sys.argv[1]))
    torch.set_num_threads(1)
    recorder, rng = Recorder(), random.Random(int(sys.argv[2]))
    compared = planned = 0
    for _ in range(int(sys.argv[3])):
        operands = draw(rng)
        for call in (forward, step):
            for _ in range(4):
                count, kept = compare(recorder, call, operands)
                compared, planned = compared + count, planned + kept
                operands = changed(rng, operands)
    torch.set_float32_matmul_precision("highest")
    # a wave of tiles and aligned rows: tensor descriptors, w's kept, x's made anew where x lies elsewhere
    large = [torch.randn(4096, 512), torch.randn(1280, 512), torch.randn(16, 512), torch.randn(1280, 16)]
    large = [tensor.to(torch.bfloat16) for tensor in large]
    for _ in range(2):
        assert compare(recorder, forward, [*large, None, 1.5, 0.0]) == (1, 1)
        large[0] = large[0].clone()
    layer = FusedLoRALinear(64, 48, rank=4, impl="triton", dtype=torch.bfloat16)
    x = torch.randn(2, 64).to(torch.bfloat16)
    with torch.no_grad():
        layer(x), layer(x)
        seen = []
        for hook in (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook):
            hook.add(seen.append)
            _, jit, _ = recorder.of(lambda: layer(x))
            hook.remove(seen.append)
            assert jit == 1
        assert len(seen) == 2
        _, jit, _ = recorder.of(lambda: layer(x))
        assert jit == 0
    print(compared, planned)


if __name__ == "__main__":
    main()
