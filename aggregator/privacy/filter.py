"""A Rényi filter at device level: a task stops before a round that its budget does not admit. Pure.

It holds RDP at one order, which follows from the budget alone, so before anything was released; that stays valid
whatever later rounds depend on (V. Feldman, T. Zrnic, arXiv 2008.11193, theorem 4.3; docs/adr/0002). Each device has a
sum of its own, of the rounds that it was in; none is larger than the worst case over the rounds that the limits allow
one device, so it is enough to hold that one.

A round is admitted before it opens, with the fewest updates that it would be committed with, since whoever does not
come brings no noise. Its event, with the updates that did come, is kept before the sum of masks is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from aggregator.privacy.accounting import device_rdp
from aggregator.privacy.adversaries import Adversary
from aggregator.privacy.composition import Limits
from aggregator.privacy.events import ReleasedSum
from fl_protocol.errors import LocalMisuseError
from fl_protocol.renyi import INTEGER_ORDERS, epsilon_by_order, filter_order_index


@dataclass(frozen=True)
class DeviceBudget:
    """What a task may cost any one device, against whom.

    Args:
        epsilon: above 0.
        delta: in (0, 1).
        adversary: who looks.
        limits: what an honest device keeps to.

    Raises:
        LocalMisuseError: a value is out of range.
    """

    epsilon: float
    delta: float
    adversary: Adversary
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise LocalMisuseError(f"epsilon: expected more than 0, got {self.epsilon}")
        if not 0 < self.delta < 1:
            raise LocalMisuseError(f"delta: expected 0 < delta < 1, got {self.delta}")

    @property
    def order(self) -> int:
        """The order at which it is enforced: the best for costs in proportion to the order, as a Gaussian's are."""
        return INTEGER_ORDERS[self._order_index]

    def enforced_epsilon(self, events: Sequence[ReleasedSum]) -> float:
        """Epsilon of some rounds at the enforced order; an accountant may state less, never more."""
        if not events:
            return 0.0
        rdp = device_rdp(events, self.adversary, self.limits)
        return float(epsilon_by_order(rdp, self.delta, INTEGER_ORDERS)[self._order_index])

    def admits(self, events: Sequence[ReleasedSum], following: ReleasedSum) -> str:
        """Why a round cannot follow others within the budget; empty if it can.

        Args:
            events: of all rounds so far, in their order.
            following: the round as it would be.

        Raises:
            LocalMisuseError: as `device_epsilon` raises it.
        """
        would_be = self.enforced_epsilon([*events, following])
        if would_be <= self.epsilon:
            return ""
        return (
            f"round {following.round} would bring a device to epsilon {would_be:.4g} at delta {self.delta:g} against "
            f"{self.adversary.name}, and the budget is {self.epsilon:g}; with {len(events)} rounds it stands at "
            f"{self.enforced_epsilon(events):.4g}"
        )

    @cached_property
    def _order_index(self) -> int:
        """Of the enforced order."""
        in_proportion = np.array(INTEGER_ORDERS, np.float64)
        return filter_order_index(epsilon=self.epsilon, delta=self.delta, cost=in_proportion, orders=INTEGER_ORDERS)
