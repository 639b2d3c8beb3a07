"""The scenario: each method takes one step, checks what is claimed of it, and returns what it measured."""

from __future__ import annotations

import copy
import io
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import (
    LoRAConfig,
    add_adapter,
    apply_lora,
    disable_adapters,
    load_adapter,
    lora_parameters,
    save_adapter,
    set_adapter,
)
from ..checkpoint import CONFIG_FILE, WEIGHTS_FILE
from ..reference import parametrize_linear
from .data import MNIST
from .net import RichBoyNet, Trainer, logits_of
from .results import Check, Comparison, Errors, FineTuned, LayerSize, Settings, Spread, StepTimes

BATCH = 10
# a step right after the other network's would find a cold cache, unlike in training: they take turns of ten steps
_TURN, _TURNS = 10, 20

_T = TypeVar("_T")


class DivergedError(RuntimeError):
    """Training ended in NaN or infinity."""


class Scenario:
    """One network, its adapters, and the logits it gave with each of them on the test set.

    base, base_logits: the network once trained, before LoRA.  reference: its parametrize twin, trained likewise.
    """

    base: RichBoyNet
    base_logits: Tensor
    reference: RichBoyNet

    def __init__(self, data: MNIST, settings: Settings, out: Path) -> None:
        self.data, self.settings, self.out = data, settings, out
        self.config = LoRAConfig(rank=settings.rank, alpha=settings.alpha, init="normal")
        self.checks: list[Check] = []
        self._told = 0
        self.logits: dict[str, Tensor] = {}
        torch.manual_seed(settings.seed)
        self.net = RichBoyNet()

    def check(self, claim: str, passed: bool) -> None:
        self.checks.append(Check(claim, passed))

    def news(self) -> list[Check]:
        """The checks since the last call."""
        news = self.checks[self._told :]
        self._told = len(self.checks)
        return news

    def train_network(self) -> Errors:
        """One pass over the training set. The trained network is the base, which must never change again."""
        trainer = Trainer(self.net, self.net.parameters())
        order = torch.randperm(len(self.data.train_labels), generator=self._generator())
        with _progress(order.split(BATCH), "training the network") as batches:
            for batch in batches:
                trainer.step(self.data.train_images[batch], self.data.train_labels[batch])
        self.base = copy.deepcopy(self.net)
        self.base_logits = logits_of(self.net, self.data.test_images)
        return self._errors(self.base_logits)

    def add_lora(self, adapter: str) -> tuple[LayerSize, ...]:
        """Freeze the network and put a fresh adapter beside each of its layers."""
        torch.manual_seed(self.settings.seed)
        apply_lora(self.net, self.config, adapter=adapter, impl=self.settings.impl)
        self.check("a fresh adapter changes nothing: exactly the old logits", same_bits(self._test(), self.base_logits))
        plain, adapted = self.base.linears(), self.net.linears()
        return tuple(
            LayerSize(
                name,
                out_features=linear.out_features,
                in_features=linear.in_features,
                base=_size(linear),
                added=_size(adapted[name]) - _size(linear),
            )
            for name, linear in plain.items()
        )

    def add_another(self, adapter: str) -> None:
        torch.manual_seed(self.settings.seed + 1)
        add_adapter(self.net, adapter, self.config, impl=self.settings.impl)
        set_adapter(self.net, adapter)

    def fine_tune(self, digit: int, adapter: str, before: Errors) -> FineTuned:
        """Train A and B of the active adapter on one digit, and save them alone."""
        self._fine_tune(Trainer(self.net, lora_parameters(self.net)), digit, f"training A and B on {digit}")
        if not all(bool(parameter.isfinite().all()) for parameter in lora_parameters(self.net)):
            raise DivergedError(
                f"training with alpha {self.settings.alpha:g} ended in NaN or infinity; choose a smaller alpha"
            )
        self.logits[adapter] = self._test()
        errors = self._errors(self.logits[adapter])
        was, now = before.wrong[digit], errors.wrong[digit]
        self.check(f"LoRA on: fewer of the {digit}s are wrong, {was} -> {now}", now < was or now == 0)
        self.check(f"trained on {digit}: W and the biases are bit for bit what they were", self._base_is_unchanged())
        folder = self.out / adapter
        save_adapter(self.net, folder, adapter)
        size = sum((folder / name).stat().st_size for name in (CONFIG_FILE, WEIGHTS_FILE))
        return FineTuned(digit, adapter, errors, str(folder), size)

    def switch_off(self, adapter: str) -> None:
        """Both ways of switching LoRA off give the network as it was."""
        with disable_adapters(self.net):
            disabled = self._test()
        set_adapter(self.net, None)
        unplugged = self._test()
        self.check("LoRA off, disable_adapters(net): exactly the old logits", same_bits(disabled, self.base_logits))
        self.check("LoRA off, set_adapter(net, None): exactly the old logits", same_bits(unplugged, self.base_logits))
        set_adapter(self.net, adapter)
        self.check("LoRA on again: exactly the fine-tuned logits", same_bits(self._test(), self.logits[adapter]))

    def reload(self, tuned: FineTuned) -> int:
        """The saved adapter in a fresh copy of the network. Returns the bytes of the network, saved whole."""
        saved = io.BytesIO()
        torch.save(self.base.state_dict(), saved)
        size = saved.tell()
        saved.seek(0)
        fresh = RichBoyNet()
        fresh.load_state_dict(torch.load(saved))
        load_adapter(fresh, tuned.folder, adapter=tuned.adapter)
        found = logits_of(fresh, self.data.test_images)
        self.check(
            f"{tuned.adapter} loaded into a fresh copy of the network: exactly the same logits",
            same_bits(found, self.logits[tuned.adapter]),
        )
        return size

    def plug_in_turn(self) -> Errors:
        """Every adapter, twice round, each giving its own predictions; then none: the errors of that."""
        for turn in (1, 2):
            for adapter, logits in self.logits.items():
                set_adapter(self.net, adapter)
                self.check(
                    f"turn {turn}: {adapter} plugged in gives its own logits exactly", same_bits(self._test(), logits)
                )
        set_adapter(self.net, None)
        bare = self._test()
        self.check("none plugged in: exactly the old logits", same_bits(bare, self.base_logits))
        self.check("after everything, W and the biases are bit for bit what they were", self._base_is_unchanged())
        return self._errors(bare)

    def train_reference(self, tuned: FineTuned) -> None:
        """The first adapter's training again, in the parametrize reference."""
        self.reference = self._parametrized()
        self._fine_tune(
            Trainer(self.reference, _trained(self.reference)), tuned.digit, "the same, parametrize reference"
        )

    def time_steps(self, tuned: FineTuned) -> StepTimes:
        """Both networks' training step, side by side, on copies.

        To be called before ``compare``: training in float64 leaves an allocator that keeps larger blocks, and the
        reference, which makes several of W's size in a step, then runs faster than where nothing but it was trained.
        """
        fused = copy.deepcopy(self.net)
        set_adapter(fused, tuned.adapter)
        reference = copy.deepcopy(self.reference)
        trainers = (Trainer(fused, lora_parameters(fused)), Trainer(reference, _trained(reference)))
        images, labels = self._batches(tuned.digit, count=1)[0]
        times: tuple[list[float], list[float]] = ([], [])
        with _progress(range(1 + _TURNS), "timing a step") as turns:
            for turn in turns:
                for trainer, taken in zip(trainers, times, strict=True):
                    for _ in range(_TURN):
                        start = time.perf_counter()
                        trainer.step(images, labels)
                        # the first turn warms up
                        if turn > 0:
                            taken.append(1e3 * (time.perf_counter() - start))
        return StepTimes(_spread(times[0]), _spread(times[1]), steps=len(times[0]))

    def compare(self, tuned: FineTuned) -> Comparison:
        """Both trainings, with each other and with the reference's in float64."""
        reference, exact = self.reference, self._parametrized().double()
        self._fine_tune(Trainer(exact, _trained(exact)), tuned.digit, "the same, reference in float64")
        ours, theirs = self.logits[tuned.adapter], logits_of(reference, self.data.test_images)
        truth = logits_of(exact, self.data.test_images.double())
        error, reference_error = _largest(ours, truth), _largest(theirs, truth)
        # float32's own rounding is the measure: ours may be twice the reference's and one rounding of the largest logit
        budget = 2 * reference_error + torch.finfo(torch.float32).eps * float(truth.abs().max())
        self.check(
            "against the same training in float64, the fused error is at most twice the reference's", error <= budget
        )
        pairs = list(zip(lora_parameters(self.net, tuned.adapter), _trained(reference), strict=True))
        return Comparison(
            A=max(_largest(p, q) for p, q in pairs[0::2]),
            B=max(_largest(p, q) for p, q in pairs[1::2]),
            logits=_largest(ours, theirs),
            predictions=int((ours.argmax(1) != theirs.argmax(1)).sum()),
            error=error,
            reference_error=reference_error,
        )

    # ---------------------------------------------------------------- what the steps share

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.settings.seed)

    def _parametrized(self) -> RichBoyNet:
        """The base, each weight W parametrized as W + (B @ A) * scale, with the A that the first adapter began with."""
        torch.manual_seed(self.settings.seed)
        net = copy.deepcopy(self.base)
        for linear in net.linears().values():
            parametrize_linear(linear, self.settings.rank, self.settings.alpha)
        return net

    def _batches(self, digit: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """The same for every call: the digit's training images, shuffled anew each time all were seen."""
        images, generator = self.data.train_images_of(digit), self._generator()
        rounds = -(-count * BATCH // len(images))
        order = torch.cat([images[torch.randperm(len(images), generator=generator)] for _ in range(rounds)])
        chosen = order[: count * BATCH].split(BATCH)
        return [(self.data.train_images[batch], self.data.train_labels[batch]) for batch in chosen]

    def _fine_tune(self, trainer: Trainer, digit: int, label: str) -> None:
        dtype = next(trainer.net.parameters()).dtype
        with _progress(self._batches(digit, self.settings.batches), label) as batches:
            for images, labels in batches:
                trainer.step(images.to(dtype), labels)

    def _test(self) -> Tensor:
        return logits_of(self.net, self.data.test_images)

    def _errors(self, logits: Tensor) -> Errors:
        labels = self.data.test_labels
        wrong = labels[logits.argmax(1) != labels]
        return Errors(tuple(torch.bincount(wrong, minlength=10).tolist()), tuple(torch.bincount(labels).tolist()))

    def _base_is_unchanged(self) -> bool:
        now = self.net.state_dict()
        return all(same_bits(value, now[name]) for name, value in self.base.state_dict().items())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Of two float32 tensors; stricter than ==, for which 0 equals -0."""
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def _size(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


def _trained(net: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def _largest(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference, taken in float64."""
    return float((a.detach().double() - b.detach().double()).abs().max())


def _spread(times: list[float]) -> Spread:
    fifths = statistics.quantiles(times, n=5)
    return Spread(statistics.median(times), fifths[0], fifths[3])


def _progress(batches: Iterable[_T], label: str) -> tqdm[_T]:
    return tqdm(batches, desc=label, unit="batch", leave=False, ncols=90)
