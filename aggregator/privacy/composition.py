"""The rounds that one device can have been in, and what the worst choice of them costs. Pure.

An honest device keeps to a cap on its participations and to a least time between them by itself, so both hold for the
device that a claim is for, whatever anybody else does. It counts that time from when it took part to when it next
tosses its coin: from somewhere in one round to somewhere in a later one. So what is known of two rounds it was in is
that the later one *closed* no sooner than that after the earlier one *opened*.

Which rounds these were is the device's affair; the claim has to hold for all choices, each order by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aggregator.privacy.events import ReleasedSum
from fl_protocol.errors import LocalMisuseError
from fl_protocol.renyi import Vector


@dataclass(frozen=True)
class Limits:
    """What an honest device keeps to.

    Args:
        participation_cap: rounds of the task that it takes part in at most; None if it counts none.
        minimum_separation_s: seconds between two participations at least.
    """

    participation_cap: int | None = None
    minimum_separation_s: float = 0.0

    def __post_init__(self) -> None:
        if self.participation_cap is not None and self.participation_cap < 1:
            raise LocalMisuseError(f"participation_cap: expected at least 1, got {self.participation_cap}")
        if not 0 <= self.minimum_separation_s < float("inf"):
            raise LocalMisuseError(f"minimum_separation_s: expected at least 0, got {self.minimum_separation_s}")

    @property
    def are_none(self) -> bool:
        """Whether every round is allowed to everybody."""
        return self.participation_cap is None and self.minimum_separation_s == 0


def worst_case(costs: NDArray[np.float64], events: Sequence[ReleasedSum], limits: Limits) -> Vector:
    """The largest sum of costs over all choices of rounds that the limits allow, at each order by itself.

    Args:
        costs: float64 [rounds, orders], at least 0.
        events: the rounds, in the order in which devices go through them.
        limits: of one device.

    Raises:
        LocalMisuseError: the rounds are not in their order.
    """
    for earlier, later in itertools.pairwise(events):
        if not (earlier.round < later.round and earlier.opened_s <= later.opened_s):
            raise LocalMisuseError(
                f"events: expected rounds in ascending order, got round {later.round} (opened at {later.opened_s}) "
                f"after round {earlier.round} (opened at {earlier.opened_s})"
            )
    if limits.are_none or not len(costs):
        total: Vector = costs.sum(axis=0)
        return total
    before = _rounds_before(events, limits.minimum_separation_s)
    if limits.participation_cap is None:
        return _any_number(costs, before)
    return _at_most(costs, before, limits.participation_cap)


def _rounds_before(events: Sequence[ReleasedSum], minimum_separation_s: float) -> NDArray[np.intp]:
    """For each round, how many of the first rounds a device that is in it can have been in."""
    opened = np.array([event.opened_s for event in events])
    closed = np.array([event.closed_s for event in events])
    allowed = np.searchsorted(opened, closed - minimum_separation_s, side="right")
    return np.minimum(allowed, np.arange(len(events)))


def _any_number(costs: NDArray[np.float64], before: NDArray[np.intp]) -> Vector:
    """Best sum with no cap: over the first i rounds, without or with the i-th."""
    best = np.zeros((len(costs) + 1, costs.shape[1]))
    for index, cost in enumerate(costs):
        best[index + 1] = np.maximum(best[index], cost + best[before[index]])
    last: Vector = best[-1]
    return last


def _at_most(costs: NDArray[np.float64], before: NDArray[np.intp], cap: int) -> Vector:
    """Best sum of at most `cap` rounds: one more round in each pass, until there is no room for more."""
    best = np.zeros((len(costs) + 1, costs.shape[1]))
    for _ in range(min(cap, len(costs))):
        longer = np.zeros_like(best)
        longer[1:] = np.maximum.accumulate(costs + best[before], axis=0)
        if np.array_equal(longer, best):
            break
        best = longer
    last: Vector = best[-1]
    return last
