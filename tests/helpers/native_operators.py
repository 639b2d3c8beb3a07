"""The operators of the extension, held to float64 by the oracle, in whatever arithmetic they are asked to multiply."""

import oracle
import torch
from cuda_shim.host import EXACT, TF32

from fused_lora.backends import eager as eager_backend
from fused_lora.backends import native


class OnDevice:
    """The operators of the extension on CPU tensors' copies, with their strides; on a GPU nobody chooses the turns."""

    @staticmethod
    def serves(hopper=False):
        """Whether the extension is built for the GPU that is here, and, where it is asked for, that is a Hopper."""
        if not torch.cuda.is_available() or native.why_not(torch.device("cuda"), torch.float32) is not None:
            return False
        return not hopper or torch.cuda.get_device_capability() == (9, 0)

    def lora_matmul(self, *arguments, turns=None, arithmetic=None):
        return self._call(native.lora_matmul, arguments, arithmetic)

    def adapter_grad(self, *arguments, turns=None, arithmetic=None):
        return self._call(native.adapter_grad, arguments, arithmetic)

    def _call(self, operator, arguments, arithmetic):
        torch.set_float32_matmul_precision("high" if arithmetic == TF32 else "highest")
        try:
            results = operator(*(self._moved(argument) for argument in arguments))
        finally:
            torch.set_float32_matmul_precision("highest")
        return tuple(None if result is None else result.cpu() for result in results)

    @staticmethod
    def _moved(argument):
        if not isinstance(argument, torch.Tensor):
            return argument
        stored = torch.empty(0, dtype=argument.dtype).set_(argument.untyped_storage()).cuda()
        return stored.as_strided(argument.shape, argument.stride(), argument.storage_offset())


def dtype_of(arithmetic):
    return torch.float32 if arithmetic == "tf32" else getattr(torch, arithmetic)


def kernel_arithmetic(arithmetic):
    """What the launch is told beside the dtype."""
    return {"tf32": TF32, "float32": EXACT}.get(arithmetic)


def to_tf32(tensor):
    """To nearest, ties away from zero, as the tensor core's operands are rounded."""
    return (tensor.view(torch.int32) + 0x1000).bitwise_and_(-0x2000).view(torch.float32)


def operands(inputs, backward):
    if backward:
        return inputs.dy, inputs.weight, inputs.lora_B, inputs.lora_A, None
    return inputs.x, inputs.weight.t(), inputs.lora_A.t(), inputs.lora_B.t(), inputs.bias


def plainly(operator, arithmetic, tensors, rest):
    """The operator in plain PyTorch, in an arithmetic."""
    dtype = dtype_of(arithmetic)
    plain = [None if t is None else t.to(dtype) for t in tensors]
    if arithmetic == "tf32":
        plain = [None if t is None else to_tf32(t) for t in plain]
        if operator == "lora_matmul":
            return _in_two_tf32_products(*plain, *rest)
    return getattr(eager_backend, operator)(*plain, *(dtype if isinstance(v, torch.dtype) else v for v in rest))


def _in_two_tf32_products(a, w, u, v, bias, scale, seed, dropout_p, on_output):
    """out and h, whose second product reads h rounded, as a tensor core reads every operand."""
    dropout = (seed, dropout_p, on_output)
    out, h = eager_backend.lora_matmul(a, w, u, torch.zeros_like(v), bias, scale, *dropout)
    nothing, one = v.new_zeros(v.shape), torch.eye(v.shape[0])
    lora, _ = eager_backend.lora_matmul(
        to_tf32(h), nothing, one, v, None, scale, *(dropout if on_output else (None, 0.0, False))
    )  # fmt: skip
    return out + lora.view(out.shape), h


def exactly(operator, tensors, rest, prepare=torch.Tensor.double):
    tensors = [None if t is None else prepare(t.double()) for t in tensors]
    return getattr(eager_backend, operator)(
        *tensors, *(torch.float64 if isinstance(v, torch.dtype) else v for v in rest)
    )


def check(kernels, operator, arithmetic, draws, terms, *rest, **told):
    """Both results of several draws of operands against float64. terms: how many numbers their longest sum has.
    told: what the operator takes beside the operators' own arguments."""
    judged = {}
    for tensors in draws:
        got = getattr(kernels, operator)(*tensors, *rest, arithmetic=kernel_arithmetic(arithmetic), **told)
        exact = exactly(operator, tensors, rest)
        if arithmetic == "float32":
            # the bound of any order of summation (Higham, §3.1): PyTorch's own order is no measure of one value
            bound = exactly(operator, tensors, rest, prepare=torch.Tensor.abs)
            gamma = (terms + 8) * torch.finfo(torch.float32).eps / 2
            for one, truth, limit in zip(got, exact, bound, strict=True):
                assert one is None or (one.shape == truth.shape and ((one - truth).abs() <= gamma * limit).all())
            continue
        for index, values in enumerate(zip(got, plainly(operator, arithmetic, tensors, rest), exact, strict=True)):
            if values[0] is not None:
                judged.setdefault(index, []).append(values)
    for index, values in judged.items():
        oracle.within(f"{operator}[{index}]", *(torch.stack(column) for column in zip(*values, strict=True)))


def enough(*sizes):
    """How many draws give the smallest result 64 values to err in."""
    return -(-64 // max(1, min(64, *sizes)))


def draw_matmul(arithmetic, M, K, N, R, backward, bias=True, adapter_dtype=torch.float32):
    return operands(oracle.draw(M, K, N, R, dtype_of(arithmetic), adapter_dtype, bias), backward)
