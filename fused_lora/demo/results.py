"""What the demo measures: plain numbers, as they stand in results.json."""

from __future__ import annotations

from dataclasses import dataclass

DIGITS = range(10)


@dataclass(frozen=True)
class Settings:
    """digit: None takes the one with the highest error rate."""

    rank: int
    alpha: float
    batches: int
    digit: int | None
    seed: int
    impl: str


@dataclass(frozen=True)
class Errors:
    """For each digit: test images that were taken for another, and test images there are."""

    wrong: tuple[int, ...]
    images: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.wrong)

    def elsewhere(self, digit: int) -> int:
        return self.total - self.wrong[digit]

    def percent(self, digit: int) -> float:
        return 100 * self.wrong[digit] / self.images[digit]

    @property
    def worst_first(self) -> list[int]:
        return sorted(DIGITS, key=self.percent, reverse=True)


@dataclass(frozen=True)
class Check:
    """A claim, and whether it was found to hold."""

    claim: str
    passed: bool


@dataclass(frozen=True)
class LayerSize:
    """Parameters of a layer: W and bias, and A and B beside them."""

    name: str
    out_features: int
    in_features: int
    base: int
    added: int


@dataclass(frozen=True)
class FineTuned:
    """An adapter trained on one digit, and the errors with it plugged in. size: bytes of its folder on disk."""

    digit: int
    adapter: str
    errors: Errors
    folder: str
    size: int


@dataclass(frozen=True)
class Comparison:
    """Largest differences between the fused layers and the parametrize reference after the same training.

    error, reference_error: of the logits of either, against the same training in float64.
    """

    A: float
    B: float
    logits: float
    predictions: int
    error: float
    reference_error: float


@dataclass(frozen=True)
class Spread:
    """Milliseconds: the median, and the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class StepTimes:
    """Of one training step: forward, backward and optimizer."""

    fused: Spread
    reference: Spread
    steps: int

    @property
    def ratio(self) -> float:
        return self.fused.median / self.reference.median


@dataclass(frozen=True)
class Results:
    """off: the errors with every adapter switched off again. network_size: bytes of its saved state_dict."""

    settings: Settings
    implementation: str
    data: str
    train_images: int
    network: Errors
    layers: tuple[LayerSize, ...]
    adapters: tuple[FineTuned, ...]
    off: Errors
    network_size: int
    comparison: Comparison
    times: StepTimes
    checks: tuple[Check, ...]
    seconds: float
