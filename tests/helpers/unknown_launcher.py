"""A process with a Triton whose launcher, or whose descriptors, are made in a way that is not known: ``… FOLDER WHAT``.

FOLDER has the stub of libcuda. WHAT: launcher, or descriptors. It prints what ``fused-lora info`` says of launches.
"""

import sys
import warnings
from pathlib import Path

import torch
from triton.backends.nvidia import driver

CALL, ENCODE = driver.CudaLauncher.__call__, driver.make_tensordesc_arg


def called_otherwise(made, *args):
    return CALL(made, *args)


def encoded_otherwise(arg, metadata, *way):
    return ENCODE(arg, metadata, *way)


def main():
    folder, what = Path(sys.argv[1]), sys.argv[2]
    if what == "launcher":
        driver.CudaLauncher.__call__ = called_otherwise
    else:
        driver.make_tensordesc_arg = encoded_otherwise

    # not before: it looks at the launcher when it is imported
    from planned_launches import Recorder, forward, step

    from fused_lora.bench.host import stub
    from fused_lora.cli import info

    stub.install(folder)
    torch.set_num_threads(1)
    recorder, rows = Recorder(), 4096
    operands = [torch.randn(rows, 1024).bfloat16(), torch.nn.Parameter(torch.randn(2048, 1024).bfloat16(), False)]
    operands += [torch.randn(*size).bfloat16().requires_grad_() for size in ((16, 1024), (2048, 16))]
    operands += [None, 1.5, 0.0]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for call in (forward, step) * 3:
            launches, jit, _ = recorder.of(lambda call=call: call(operands), operands)
            kinds = [any(value == "map" for value in parameters) for *_, parameters in launches]
            through_jit = len(launches) if what == "launcher" else sum(kinds)
            assert any(kinds)
    assert jit == through_jit, (jit, through_jit)
    (warned,) = [str(one.message) for one in said if "Triton's JIT" in str(one.message)]
    print(warned)
    print(info.collect()["slow"]["launches"])


if __name__ == "__main__":
    main()
