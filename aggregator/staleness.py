"""How much an update counts that was made for an earlier round, and the mean of updates of several rounds. Pure.

An update of origin round r that counts in round n has the staleness t = n - r and the weight s(t), which is 1 at t = 0
and never rises. The combined update is sum over updates of s(t) x update / K, with K the number of updates, not the sum
of the weights: J. Nguyen et al. (FedBuff), arXiv 2106.06639, algorithm 1. The functions s are those of C. Xie et al.
(FedAsync), arXiv 1903.03934, section 5.2; FedBuff uses the polynomial one with exponent 1/2, s(t) = 1 / sqrt(1 + t).

Invariants: a weight is in (0, 1]; partial sums of one staleness are added before they are weighted, and stalenesses in
ascending order, so that integer partial sums give the same mean, bit for bit, whatever order they come in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from aggregator.errors import CombineError
from aggregator.exact_sum import MOST_UPDATES
from fl_protocol.errors import LocalMisuseError

PartialSum = NDArray[np.int64] | NDArray[np.float64]


@dataclass(frozen=True)
class StalenessWeight:
    """The function s(t).

    Args:
        name: polynomial: (1 + t)^-exponent. constant: 1. hinge: 1 up to t = grace, then 1 / (1 + slope (t - grace)).
        exponent: of the polynomial, finite and above 0.
        slope: of the hinge, finite and above 0.
        grace: staleness up to which the hinge counts an update in full, at least 0.
    """

    name: Literal["polynomial", "constant", "hinge"] = "polynomial"
    exponent: float = 0.5
    slope: float = 10.0
    grace: int = 4

    def __post_init__(self) -> None:
        if self.name not in ("polynomial", "constant", "hinge"):
            raise LocalMisuseError(f"name: expected 'polynomial', 'constant' or 'hinge', got {self.name!r}")
        for name, value in (("exponent", self.exponent), ("slope", self.slope)):
            if not 0 < value < math.inf:
                raise LocalMisuseError(f"{name}: expected a finite number above 0, got {value}")
        if self.grace < 0:
            raise LocalMisuseError(f"grace: expected at least 0 rounds, got {self.grace}")

    def weight(self, staleness: int) -> float:
        """The weight s(staleness), in (0, 1].

        Args:
            staleness: rounds between the update's own and the one it counts in, at least 0.

        Raises:
            LocalMisuseError: the staleness is negative.
        """
        if staleness < 0:
            raise LocalMisuseError(f"staleness: expected at least 0 rounds, got {staleness}")
        if self.name == "constant":
            return 1.0
        if self.name == "hinge":
            return float(1.0 / (1.0 + self.slope * max(0, staleness - self.grace)))
        return float((1.0 + staleness) ** -self.exponent)


def combine_stale(
    partials: Iterable[tuple[int, PartialSum, int]], length: int, *, weight: StalenessWeight, unit: float = 1.0
) -> tuple[NDArray[np.float64], int]:
    """The weighted sum of all updates over their number, float64 [length], and that number; runs at the coordinator.

    Args:
        partials: staleness, sum of updates [length] and how many are in it; several may have the same staleness. Sums
            are all int64 (in multiples of `unit`) or all float64. Of each staleness one sum is in memory.
        length: numbers in an update.
        weight: the staleness function.
        unit: what 1 in a partial sum stands for.

    Raises:
        CombineError: there are no updates or too many, or partial sums that are no sums of updates of this length.
    """
    sums: dict[int, PartialSum] = {}
    count = 0
    for staleness, partial, number in partials:
        _check(staleness, partial, number, length=length)
        count += number
        _add(sums, staleness, partial)
        if count > MOST_UPDATES:
            raise CombineError(f"a round takes at most {MOST_UPDATES} updates; lower its goal")
    if count == 0:
        raise CombineError("no updates to combine")
    total, weighted = np.zeros(length), np.empty(length)
    for staleness in sorted(sums):
        np.multiply(sums[staleness], weight.weight(staleness), out=weighted)
        total += weighted
    # In this order: with staleness 0 only and a power of two as unit, the very bits of the synchronous mean.
    total *= unit
    total /= count
    return total, count


def _check(staleness: int, partial: PartialSum, number: int, *, length: int) -> None:
    """Refuse what cannot be a partial sum."""
    if staleness < 0 or number < 1:
        raise CombineError(f"a partial sum of {number} updates and staleness {staleness}: expected at least 1 and 0")
    if partial.shape != (length,) or partial.dtype not in (np.int64, np.float64):
        raise CombineError(
            f"a partial sum of shape {partial.shape} and type {partial.dtype}: expected {length} int64 or float64"
        )


def _add(sums: dict[int, PartialSum], staleness: int, partial: PartialSum) -> None:
    """Add to the sum of the same staleness, in its own type."""
    before = sums.get(staleness)
    if before is None:
        sums[staleness] = partial
    elif before.dtype != partial.dtype:
        raise CombineError(f"partial sums of {before.dtype} and of {partial.dtype}: expected all of one type")
    else:
        sums[staleness] = before + partial
