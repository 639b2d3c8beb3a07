"""Candidates are checked before they are timed: a wrong one gets no time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .baselines import EAGER, FROZEN
from .workloads import Candidate, Workload, parse_dtype


def allowance(plain: Tensor, truth: Tensor, dtype: torch.dtype, longest_sum: int) -> float:
    """How far a result may be from its float64 truth, given what plain PyTorch computes in the same dtype.

    At most twice as far as that is, plus one rounding of the largest |truth|, as the tests have it, plus the
    random walk of the longest sum, in terms: candidates add the same terms in other orders, in float32 or better, and
    to sum in one chain, as the tests do, takes too long for real sizes.
    """
    # finfo.eps is two roundings
    rounding = (torch.finfo(dtype).eps + math.sqrt(longest_sum) * torch.finfo(torch.float32).eps) / 2
    return 2 * error(plain, truth) + rounding * float(truth.abs().max())


class Judge:
    """The float64 truth of a workload. What has no adapter, frozen or trained whole, is held to a truth of its own."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._truth: dict[str, dict[str, Tensor]] = {}
        self._budget: dict[str, dict[str, float]] = {}
        dtype = parse_dtype(workload.dtype)[0]
        exact = workload.exact()
        for name in (FROZEN, EAGER):
            truth, plain = _all(exact.candidate(name).call()), _all(workload.candidate(name).call())
            self._truth[name] = truth
            self._budget[name] = {key: allowance(plain[key], truth[key], dtype, workload.longest_sum) for key in truth}

    def verdict(self, name: str, candidate: Candidate) -> str | None:
        """None for a right candidate; else which of its results is how wrong."""
        held_to = EAGER if self._workload.adapted(name) else FROZEN
        results = candidate.call()
        for key, truth in self._truth[held_to].items():
            result, budget = results[key], self._budget[held_to][key]
            if result is None:
                return f"{key} is missing"
            off = error(result, truth)
            # not `off > budget`, which NaN would pass
            if not off <= budget:
                return f"{key} is off by {off:.3g}, and may be by {budget:.3g}"
        return None


def _all(results: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Plain PyTorch computes every result, so none is None."""
    return {key: result for key, result in results.items() if result is not None}


def error(actual: Tensor, truth: Tensor) -> float:
    """The largest, infinite for another shape."""
    if actual.shape != truth.shape:
        return math.inf
    return float((actual.double() - truth).abs().max())
