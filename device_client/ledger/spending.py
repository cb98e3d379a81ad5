"""What was spent in which period, by the device as a whole and by each study: the ledger's lines, added up. Pure.

Periods are of one length and follow one another from the time of the first line. Each begins with fresh filters. Time
comes in with the lines and only moves forwards.

The order of a share's filter suits the study's first plan in the period. So does the device's, if that study may spend
the whole budget anyhow; a study with a share must not choose for the others, so with it the order is the common one
(docs/adr/0002). In both cases it is known before anything of the period is released.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from device_client.ledger.filters import Budget, RenyiFilter, common_order_index
from device_client.ledger.lines import Acceptance, Line, Purpose, Release, Reservation
from fl_protocol.renyi import ORDERS, Vector, rdp_to_epsilon


@dataclass(frozen=True)
class Refusal:
    """Why a cost is not admitted.

    Args:
        whose: which budget it would exceed: the study's name, or None for the device's.
        epsilon: what it would bring that budget to; infinite in a period that was closed.
        limit: what that budget has.
    """

    whose: str | None
    epsilon: float
    limit: float


class Period:
    """The filters of one period: one for the device, one for each study's share.

    Args:
        number: 0 is the first.
        begins_s, ends_s: Unix seconds; it ends before `ends_s`.
    """

    def __init__(self, budget: Budget, *, number: int, begins_s: float, ends_s: float) -> None:
        self.number, self.begins_s, self.ends_s = number, begins_s, ends_s
        self.closed_by: Acceptance | None = None
        self.device = RenyiFilter(budget.epsilon, budget.delta)
        self._budget = budget
        self._studies: dict[str, RenyiFilter] = {}

    @property
    def spent_epsilon(self) -> float:
        """Epsilon of all studies together; a closed period counts as spent in full."""
        return (
            self.device.spent_epsilon if self.closed_by is None else max(self.device.spent_epsilon, self.device.epsilon)
        )

    def study(self, task: str) -> RenyiFilter:
        """What holds one study within its share."""
        return self._studies.get(task) or RenyiFilter(self._budget.share_of(task), self._budget.delta)

    def refusal(self, task: str, cost: Vector, repeated: Vector | None = None) -> Refusal | None:
        """Why a cost is not admitted, None if both filters take it.

        Args:
            task: whose it is.
            cost: RDP.
            repeated: what the study will ask for again and again, `cost` if nothing else is said; suits the orders.
        """
        study = self.study(task)
        first, first_of_study = self._first_orders(task, cost if repeated is None else repeated)
        if self.closed_by is not None and math.isfinite(study.epsilon):  # without a budget there is nothing to keep
            return Refusal(None, math.inf, self.device.epsilon)
        if not self.device.admits(cost, first):
            return Refusal(None, self.device.epsilon_with(cost, first), self.device.epsilon)
        if not study.admits(cost, first_of_study):
            return Refusal(task, study.epsilon_with(cost, first_of_study), study.epsilon)
        return None

    def remaining(self, cost: Vector, task: str | None) -> float:
        """How many more of this cost are admitted."""
        holding = self.device if task is None else self.study(task)
        if self.closed_by is not None and math.isfinite(holding.epsilon):
            return 0.0
        first, first_of_study = self._first_orders(task, cost)
        return min(self.device.remaining(cost, first), holding.remaining(cost, first_of_study))

    def add(self, task: str, cost: Vector, repeated: Vector) -> None:
        """Count a cost; Args as `refusal`."""
        first, first_of_study = self._first_orders(task, repeated)
        self.device.add(cost, first)
        study = self._studies[task] = self.study(task)
        study.add(cost, first_of_study)

    def _first_orders(self, task: str | None, repeated: Vector) -> tuple[int, int]:
        """Indices of the orders that the device's and a study's filter have, or get with this."""
        study = self.device if task is None else self.study(task)
        if study.order is not None and self.device.order is not None:
            return self.device.order_index(0), study.order_index(0)
        best = study.best_order_index(repeated)
        # Security: who may spend little must not choose an order at which the others' plans are ruinous.
        shares = study.epsilon < self.device.epsilon
        return common_order_index(self.device.epsilon, self.device.delta) if shares else best, best


class Spending:
    """All lines so far.

    Args:
        budget: of every period.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.reservations: list[Reservation] = []
        self.acceptances: list[Acceptance] = []
        self.releases: dict[tuple[str, int], Release] = {}
        self.at_s: float | None = None  # of the last line
        self.period: Period | None = None  # of the last line
        self._first_s = math.nan
        self._last_rounds: dict[tuple[str, Purpose], int] = {}
        self._charged: dict[tuple[str, int, Purpose], int] = {}  # and how many acceptances came before
        self._ever = np.zeros(len(ORDERS))
        self._ever_by_study: dict[str, Vector] = {}

    def take(self, line: Line) -> None:
        """Count a line of the log."""
        self.period = self.period_at(line.at_s)
        if self.at_s is None:
            self._first_s = line.at_s
        self.at_s = line.at_s
        if isinstance(line, Acceptance):
            self.acceptances.append(line)
            self.period.closed_by = line
            return
        if isinstance(line, Release):
            self.releases[line.task, line.round] = line
            return
        cost = line.rdp()
        self.reservations.append(line)
        self.period.add(line.task, cost, line.repeated_rdp())
        self._ever = self._ever + cost
        self._ever_by_study[line.task] = self._ever_by_study.get(line.task, 0.0) + cost
        self._last_rounds[line.task, line.purpose] = max(self.last_round(line.task, line.purpose), line.round)
        self._charged[line.task, line.round, line.purpose] = len(self.acceptances)

    def period_at(self, at_s: float) -> Period:
        """The period of a time not before the last line's; it is only counted on once a line is taken in it."""
        number, length_s = 0, self._budget.period_s
        if length_s is None:
            return self.period or Period(self._budget, number=0, begins_s=at_s, ends_s=math.inf)
        first_s = at_s if self.at_s is None else self._first_s
        number = math.floor((at_s - first_s) / length_s)
        if at_s < first_s + number * length_s:  # float64 may have rounded the quotient
            number -= 1
        elif at_s >= first_s + (number + 1) * length_s:
            number += 1
        if self.period is not None and number <= self.period.number:
            return self.period
        begins_s = first_s + number * length_s
        return Period(self._budget, number=number, begins_s=begins_s, ends_s=first_s + (number + 1) * length_s)

    def last_round(self, task: str, purpose: Purpose) -> int:
        """The newest round that was charged, 0 if none."""
        return self._last_rounds.get((task, purpose), 0)

    def was_charged(self, task: str, round_number: int, purpose: Purpose) -> bool:
        """Whether there is a line for exactly this."""
        return (task, round_number, purpose) in self._charged

    def was_accepted_since_charge(self, task: str, round_number: int) -> bool:
        """Whether an acceptance stands after the line that charged a round's update; not if there is none."""
        return self._charged.get((task, round_number, "update"), math.inf) < len(self.acceptances)

    def epsilon_ever(self, task: str | None = None) -> float:
        """Epsilon over all periods, of all studies or of one, as an accountant would state it."""
        total = self._ever if task is None else self._ever_by_study.get(task)
        return 0.0 if total is None else rdp_to_epsilon(total, self._budget.delta)
