"""Rényi filters: budgets that hold although each step is chosen after seeing what the earlier ones released. Pure.

A filter holds RDP at one order, which is fixed with its first cost, before anything was released under it; that stays
valid whatever the later steps depend on (V. Feldman, T. Zrnic, arXiv 2008.11193, theorem 4.3; docs/adr/0002).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fl_protocol.errors import LocalMisuseError
from fl_protocol.renyi import ORDERS, Vector, epsilon_by_order, filter_order_index, rdp_to_epsilon

LEAST_LEFT_TO_GAUSSIANS = 0.75
"""Of the unsampled Gaussian steps that a budget's best order admits, `common_order_index` admits at least this part."""


@dataclass(frozen=True)
class Budget:
    """What the wearer allows in a period: (epsilon, delta) at record level, add-or-remove-one.

    Args:
        epsilon: over all studies; infinity claims nothing.
        delta: over all studies.
        period_s: length of a period in seconds; None is one for ever.
        per_task: epsilon that single studies (``tenant/task``) may spend of it; the others may spend all.
    """

    epsilon: float
    delta: float
    period_s: float | None = field(default=None, kw_only=True)
    per_task: Mapping[str, float] = field(default_factory=dict, kw_only=True, hash=False)

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise LocalMisuseError(f"epsilon: expected more than 0, got {self.epsilon}")
        if not 0 < self.delta < 1:
            raise LocalMisuseError(f"delta: expected 0 < delta < 1, got {self.delta}")
        if self.period_s is not None and not (self.period_s > 0 and math.isfinite(self.period_s)):
            raise LocalMisuseError(f"period_s: expected a length of time in seconds, or None, got {self.period_s}")
        for task, share in self.per_task.items():
            if not share > 0:
                raise LocalMisuseError(f"epsilon of {task}: expected more than 0, got {share}")

    def share_of(self, task: str) -> float:
        """The epsilon that one study may spend in a period, whatever the others do."""
        return min(self.epsilon, self.per_task.get(task, math.inf))


def common_order_index(epsilon: float, delta: float) -> int:
    """Index into `ORDERS` of an order that suits any plan tolerably: known from the budget alone.

    It is the lowest that leaves unsampled Gaussian steps `LEAST_LEFT_TO_GAUSSIANS`. They want the highest order of all
    plans and lose slowly below it; sampled steps with little noise explode above theirs.
    """
    unsampled = np.array(ORDERS)  # a Gaussian's RDP is in proportion to the order
    room = epsilon - epsilon_by_order(np.zeros(len(ORDERS)), delta)
    if math.isinf(epsilon) or not room.max() > 0:
        return filter_order_index(epsilon=epsilon, delta=delta, cost=unsampled)
    admitted = room / unsampled
    return int(np.argmax(admitted >= LEAST_LEFT_TO_GAUSSIANS * admitted.max()))


class RenyiFilter:
    """One sum of costs, held within (epsilon, delta).

    Wherever `first` is asked for: index of the order that is fixed if none is yet.
    """

    def __init__(self, epsilon: float, delta: float) -> None:
        self.epsilon, self.delta = epsilon, delta
        self.total: Vector = np.zeros(len(ORDERS))
        self._order_index: int | None = None

    @property
    def order(self) -> float | None:
        """The order at which it is enforced; None before the first cost."""
        return None if self._order_index is None else ORDERS[self._order_index]

    @property
    def spent_epsilon(self) -> float:
        """Epsilon of what was added so far, as an accountant would state it; never above the enforced one."""
        return rdp_to_epsilon(self.total, self.delta)

    def epsilon_with(self, cost: Vector, first: int) -> float:
        """The enforced epsilon if this cost came on top."""
        return float(epsilon_by_order(self.total + cost, self.delta)[self.order_index(first)])

    def admits(self, cost: Vector, first: int) -> bool:
        """Whether it may come on top."""
        return self.epsilon_with(cost, first) <= self.epsilon

    def add(self, cost: Vector, first: int) -> None:
        """Count a cost."""
        self._order_index = self.order_index(first)
        self.total = self.total + cost

    def remaining(self, cost: Vector, first: int) -> float:
        """How many more of this cost are admitted."""
        if math.isinf(self.epsilon):
            return math.inf
        order = self.order_index(first)
        used = float(epsilon_by_order(self.total, self.delta)[order])
        return float(max(0.0, (self.epsilon - used) // cost[order])) if cost[order] > 0 else math.inf

    def order_index(self, first: int) -> int:
        """Index of the enforced order."""
        return first if self._order_index is None else self._order_index

    def best_order_index(self, cost: Vector) -> int:
        """Index of the order at which a fresh budget admits the most of this cost."""
        return filter_order_index(epsilon=self.epsilon, delta=self.delta, cost=cost)
