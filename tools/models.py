"""``make models``: a training step of whole models: ours, PEFT's, PEFT's fused, eager, fine-tuned in full, and frozen.

    python -m tools.models [--device cpu|cuda] [--threads N] [--seconds N] [--out FILE]

Each is made as a user makes it: ``apply_lora``, ``get_peft_model``, ``fuse``. A step is forward, backward and fused
Adam on what is trained. A results file like any other, in benchmarks/results/models/.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.bench import measure, series
from fused_lora.bench.baselines import CANDIDATES, EAGER, FROZEN, OURS_PREFIX, PEFT, Weights, our_choice
from fused_lora.bench.nets import NETS, NetSpec, runnable
from fused_lora.bench.results import Environment, ResultsFile, default_path
from fused_lora.bench.workloads import Candidate, Computed, copies_of, parse_dtype
from fused_lora.models.apply import apply_lora
from fused_lora.models.quantizing import quantize_base
from fused_lora.parameters import made_of
from fused_lora.quantized import dequantize, kind_of

MODEL = "model"
FULL, FUSED_PEFT = "full", f"{OURS_PREFIX}in-peft"
OUR_IMPLS = ("triton", "native", "eager")
# layer by layer what is fastest for its sizes
AUTO = f"{OURS_PREFIX}auto"
LORA_NAMES = (FROZEN, AUTO, *(f"{OURS_PREFIX}{impl}" for impl in OUR_IMPLS), FUSED_PEFT, PEFT, EAGER)
NAMES = (*LORA_NAMES, FULL)
SCALE = 2


class ModelWorkload:
    """A training step of a whole model with LoRA in all its linear layers: forward, backward, fused Adam.

    Adam's learning rate is zero: the same arithmetic, and every step is the same step. The input asks for its gradient,
    as it would inside a deeper model. Models are in eval mode: a dropout of their own would give each other results.
    Over a base of 4 bits all are held to the weights that it stands for, and nothing is timed that can't keep it so.
    """

    pass_, first = MODEL, False

    def __init__(self, spec: NetSpec, device: torch.device, names: tuple[str, ...] = NAMES) -> None:
        self.names = names
        self.label, self.dtype, self.device, self.spec = str(spec), spec.dtype, device, spec
        base, self.adapter_dtype = parse_dtype(spec.dtype)
        generator = torch.Generator(device).manual_seed(0)
        with torch.random.fork_rng(), device:
            torch.manual_seed(0)
            self.net = spec.make().to(device, base).requires_grad_(False).eval()
        x = torch.randn(spec.shape, generator=generator, device=device).to(base)
        with torch.no_grad():
            # before it is quantized: bitsandbytes packs a weight anew, and rounds its scales, for inference on a CPU
            shape = self.net(x).shape
        if spec.nf4:
            paths = [path for path, module in self.net.named_modules() if isinstance(module, nn.Linear)]
            quantize_base(self.net, "nf4", target_modules=paths)
        self.weights = {
            name: Weights.beside(_dense(module, base), spec.rank, SCALE, self.adapter_dtype, generator)
            for name, module in self.net.named_modules() if isinstance(module, nn.Linear)
        }  # fmt: skip
        self.longest_sum = max(max(w.weight.shape) for w in self.weights.values()) * len(self.weights)
        dy = (torch.randn(shape, generator=generator, device=device) * shape[-1] ** -0.5).to(base)
        self.copies = copies_of(device, x.nbytes + dy.nbytes)
        self.inputs = [(x.clone().requires_grad_(), dy.clone()) for _ in range(self.copies)]

    def adapted(self, name: str) -> bool:
        return name not in (FROZEN, FULL)

    def ours(self) -> str:
        return our_choice(next(iter(self.weights.values())))

    def why_not(self, name: str) -> str | None:
        if name in (EAGER, FULL) and self.spec.nf4:
            return "it computes with plain weights, and this base is kept in 4 bits"
        if name == AUTO:
            return f"on a CPU it is {self.ours()}" if self.device.type == "cpu" else None
        if name in (FROZEN, FULL, EAGER):
            return None
        return CANDIDATES[PEFT if name == FUSED_PEFT else name].why_not(next(iter(self.weights.values())))

    def build(self, name: str) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        """The candidate's model, over the same frozen tensors, and its adapters by name: ``<path>.dA``, ``<path>.dB``.

        ``full`` has tensors of its own, all trained, and no adapters.
        """
        if name == FULL:
            return copy.deepcopy(self.net).requires_grad_(True), {}
        net = self._copy()
        if name == FROZEN:
            return net, {}
        if name == EAGER:
            own = {path: weights.with_own_adapter() for path, weights in self.weights.items()}
            for path, weights in own.items():
                net.set_submodule(path, CANDIDATES[EAGER].build(weights))
            return net, {f"{path}.d{side}": getattr(w, f"lora_{side}") for path, w in own.items() for side in "AB"}
        net, adapters = self._adapted(name, net)
        with torch.no_grad():
            for path, weights in self.weights.items():
                for side in "AB":
                    adapters[f"{path}.d{side}"].copy_(getattr(weights, f"lora_{side}"))
        return net.eval(), adapters

    def _copy(self) -> nn.Module:
        """The net over the same frozen tensors: what is in the memo is shared."""
        states = [vars(module).get("quant_state") for module in self.net.modules()]
        return copy.deepcopy(self.net, {id(shared): shared for shared in (*_tensors(self.net), *states)})

    def _adapted(self, name: str, net: nn.Module) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        paths, rank = list(self.weights), self.spec.rank
        if name not in (PEFT, FUSED_PEFT):
            options: dict[str, Any] = {"target_modules": paths, "adapter_dtype": self.adapter_dtype}
            apply_lora(net, rank=rank, alpha=SCALE * rank, impl=name[len(OURS_PREFIX) :], **options)
            layers = {path: net.get_submodule(path) for path in paths}
            return net, {f"{p}.d{side}": getattr(layer, f"lora_{side}") for p, layer in layers.items() for side in "AB"}
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=paths)
        # as Transformers marks a model that it loads in 4 bits, and PEFT asks
        net.is_loaded_in_4bit = self.spec.nf4  # type: ignore[assignment]
        # in float32 over a 16-bit base, as PEFT does by default, or in the base's dtype
        wide = self.adapter_dtype == torch.float32
        model: Any = get_peft_model(net, config, autocast_adapter_dtype=wide)  # type: ignore[arg-type]
        if name == FUSED_PEFT:
            from fused_lora.integrations.peft import fuse

            fuse(model)
        layers = {path: model.get_base_model().get_submodule(path) for path in paths}
        return model, {
            f"{path}.d{side}": getattr(layer, f"lora_{side}")["default"].weight
            for path, layer in layers.items() for side in "AB"
        }  # fmt: skip

    def candidate(self, name: str) -> Candidate:
        net, adapters = self.build(name)
        trained = [*net.parameters()] if name == FULL else [*adapters.values()]
        optimizer: Any = torch.optim.Adam(trained, lr=0.0, fused=True) if trained else None
        inputs = itertools.cycle(self.inputs)

        def step() -> Computed:
            x, dy = next(inputs)
            y = net(x)
            y.backward(dy)
            results = {"y": y.detach(), "dx": x.grad} | {key: adapter.grad for key, adapter in adapters.items()}
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            x.grad = None
            return results

        # a candidate's module may hold the frozen tensors without registering them
        return Candidate(step, (*_tensors(net), *_tensors(self.net), *adapters.values()))

    def exact(self) -> ModelWorkload:
        exact = copy.copy(self)
        exact.dtype, exact.adapter_dtype = "float64", torch.float64
        dense = self._copy()
        for path, weights in self.weights.items():
            dense.set_submodule(path, weights.linear())
        exact.net = copy.deepcopy(dense).double()
        exact.weights = {path: weights.in_float64() for path, weights in self.weights.items()}
        x, dy = self.inputs[0]
        exact.inputs = [(x.detach().double().requires_grad_(), dy.double())]
        return exact

    def useful(self, name: str) -> tuple[int, int] | None:
        return None


def _tensors(net: nn.Module) -> tuple[Tensor, ...]:
    kept = (kind.packed(module).tensors for module in net.modules() if (kind := kind_of(module)) is not None)
    return (*net.parameters(), *net.buffers(), *itertools.chain.from_iterable(kept))


def _dense(linear: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """The linear itself, or where it is quantized a plain one of what it stands for."""
    kind = kind_of(linear)
    if kind is None:
        return linear
    weight = nn.Parameter(dequantize(kind.packed(linear), dtype), requires_grad=False)
    return made_of(weight, linear.bias, like=linear, kind=nn.Linear)


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every candidate was right, 1 when one was not, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="make models", description="A training step of whole models.")
    parser.add_argument("--device", choices=tuple(NETS), help="default: cuda where there is one")
    parser.add_argument("--threads", type=int, metavar="N", help="PyTorch's on the CPU; 1 for a machine that is busy")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each model; default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: benchmarks/results/models/ of the checkout")
    args = parser.parse_args(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    environment = Environment.here(device)
    path = args.out or default_path("models", environment)
    plan = replace(measure.plan_for(device, quick=False), seconds=args.seconds, min_rounds=5)
    agenda = [partial(ModelWorkload, spec, device) for spec in runnable(NETS[device.type])]
    file = ResultsFile.open(path, "models", "make models", environment)
    return series.compete(list(agenda), file, path, plan)


if __name__ == "__main__":
    sys.exit(main())
