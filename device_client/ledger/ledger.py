"""The privacy ledger: what every study together may learn of the wearer's records, charged before it is released.

A reservation is durable before anything is computed for it, and is never refunded: a crash between the two spends
budget that nothing was released for, which is the safe side. Both the device's budget and the study's share of it must
admit it, in the period that it falls in. Whose word counts for the time, and what a person may accept when a disk was
lost, is in docs/adr/0009.

No I/O of its own: log and counter are ports.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from device_client.accounting import poisson_gaussian_rdp
from device_client.errors import BudgetSpentError, LedgerError
from device_client.events import PendingUpdate
from device_client.ledger.chain import CountedLog, Counter, LogStore, open_log, read_log
from device_client.ledger.filters import Budget
from device_client.ledger.lines import FORMAT, Acceptance, Purpose, Release, Reservation, Steps
from device_client.ledger.spending import Period, Refusal, Spending
from device_client.ledger.times import RoundTimes, disagreement, proviso, utc, widest_window_s
from fl_protocol.plans import PlanMsg
from fl_protocol.renyi import Vector


def cost_of(plan: PlanMsg) -> Vector:
    """RDP of one participation at each of `fl_protocol.renyi.ORDERS`."""
    return poisson_gaussian_rdp(
        sampling_rate=plan.sampling_rate, noise_multiplier=plan.noise_multiplier, steps=plan.local_steps
    )


def cost_of_count(noise_multiplier: float) -> Vector:
    """RDP of one noisy count of records, as `PrivacyLedger.reserve_count` charges it."""
    return poisson_gaussian_rdp(sampling_rate=1.0, noise_multiplier=noise_multiplier, steps=1)


def _steps_of(plan: PlanMsg) -> Steps:
    """What a plan releases."""
    return Steps(plan.sampling_rate, plan.noise_multiplier, plan.local_steps)


class PrivacyLedger:
    """The device's ledger.

    Args:
        store: where the log is.
        counter: what vouches for it, kept apart from the store.
        budget: what the wearer allows.

    Raises:
        LedgerError: the log or its counter does not hold together, or they do not fit.
        StoreError: one of them cannot be read.
    """

    def __init__(self, store: LogStore, counter: Counter, budget: Budget) -> None:
        self._log, self.budget = open_log(store, counter), budget
        self._spending = Spending(budget)
        for line in self._log.lines:
            self._spending.take(line)

    @classmethod
    def reanchor(cls, store: LogStore, counter: Counter, budget: Budget, *, now_s: float) -> PrivacyLedger:
        """Accept the log as it stands although the counter does not fit it; a person has to ask for this.

        Nobody can know what is missing, only that it was within the budget. So the present period counts as spent in
        full; with one period for ever, nothing is trained any more. The log says what was found, and when.

        Raises:
            LedgerError: the log itself does not hold together, or there is nothing to accept.
            StoreError: a disk did not take it; ask again.
        """
        times = RoundTimes(now_s)
        written = read_log(store, counter)
        if written.fault is None:
            raise LedgerError("the ledger and its counter fit: there is nothing to accept")
        counted = written.count
        times_s = [times.now_s, *(line.at_s for line in written.lines[-1:])]
        if counted is not None and counted.at_s is not None:
            times_s.append(counted.at_s)
        log = CountedLog(store, counter, written)
        log.write_acceptance(
            Acceptance(
                format=FORMAT,
                at_s=max(times_s),
                found=written.fault,
                counted=counted.lines if counted is not None else None,
                previous=log.head,
            )
        )
        return cls(store, counter, budget)

    def reserve(
        self,
        *,
        task: str,
        round_number: int,
        plan: PlanMsg,
        now_s: float,
        latest_s: float = math.inf,
        earliest_s: float = -math.inf,
    ) -> float:
        """Charge one participation, durably, and return the epsilon spent in this period. Call before training.

        Args:
            task: the study, ``tenant/task``.
            round_number: of that study; rounds are charged in ascending order, each at most once.
            plan: what will be released.
            now_s: the device's clock, Unix seconds.
            latest_s: a time that the study signed and that has not passed: the round's deadline.
            earliest_s: a time that the study signed and that has passed: the round's opening.

        Raises:
            BudgetSpentError: a budget does not allow it, or this round was charged before (a crash came between);
                nothing is recorded.
            StoreError: a disk did not take it; nothing may be released, whether or not the charge stands.
        """
        self._charge(
            self._admitted(
                task=task,
                round_number=round_number,
                update=_steps_of(plan),
                times=self._times(now_s, earliest_s, latest_s),
            )
        )
        return self.spent_epsilon

    def check(
        self,
        *,
        task: str,
        round_number: int,
        plan: PlanMsg,
        now_s: float,
        latest_s: float = math.inf,
        earliest_s: float = -math.inf,
    ) -> None:
        """Whether `reserve` would admit this now; charges nothing. Args and BudgetSpentError as there."""
        self._admitted(
            task=task,
            round_number=round_number,
            update=_steps_of(plan),
            times=self._times(now_s, earliest_s, latest_s),
        )

    def reserve_count(
        self,
        *,
        task: str,
        round_number: int,
        plan: PlanMsg,
        noise_multiplier: float,
        now_s: float,
        latest_s: float = math.inf,
        earliest_s: float = -math.inf,
    ) -> None:
        """Charge one noisy count of records, durably; call before the noise is drawn.

        Whether a device takes part is seen by others; where that depends on how many records there are, the count that
        decides it is a release of its own. One record changes it by one. It is admitted only together with the round
        that it is for: to count for one that cannot be charged afterwards would be spent for nothing.

        Args:
            task: as in `reserve`.
            round_number: as in `reserve`, counts by themselves: each round is counted at most once.
            plan: of that round, from its manifest; `reserve` charges it.
            noise_multiplier: standard deviation of the Gaussian noise, in records.
            now_s: as in `reserve`.
            latest_s: as in `reserve`.
            earliest_s: as in `reserve`.

        Raises:
            BudgetSpentError: as `reserve`.
            StoreError: as `reserve`.
        """
        self._charge(
            self._admitted(
                task=task,
                round_number=round_number,
                update=_steps_of(plan),
                count=Steps(1.0, noise_multiplier, 1),
                times=self._times(now_s, earliest_s, latest_s),
            )
        )

    def record_release(self, pending: PendingUpdate, *, now_s: float) -> None:
        """Durably note that a sealed update leaves the device; once noted, only these bytes may be its round's.

        Args:
            pending: the sealed update; noting it again does nothing.
            now_s: the device's clock, Unix seconds.

        Raises:
            LedgerError: its round was not charged, or another update was released for it.
            StoreError: a disk did not take it; nothing may be sent.
        """
        known = self._spending.releases.get((pending.study, pending.round))
        if known is not None:
            if known.sealed_digest != pending.sealed_digest.hex():
                raise LedgerError(
                    f"round {pending.round} of {pending.study} was released before, with other bytes: an old copy of "
                    "the store was put back; nothing is sent for it"
                )
            self._log.settle()
            return
        last_s = self._spending.at_s
        if last_s is None or not self.was_charged(pending.study, pending.round):
            raise LedgerError(f"round {pending.round} of {pending.study} was never charged; nothing is sent for it")
        line = Release(
            format=FORMAT,
            at_s=last_s,
            said_s=now_s,
            task=pending.study,
            round=pending.round,
            device=pending.device,
            update_id=pending.update_id.hex(),
            sealed_digest=pending.sealed_digest.hex(),
            num_bytes=len(pending.envelope),
            recipient_key=pending.recipient_key,
            epsilon=self.spent_epsilon if math.isfinite(self.spent_epsilon) else None,
            previous=self._log.head,
        )
        self._log.write(line)
        self._spending.take(line)
        self._log.count()

    def was_released(self, task: str, round_number: int) -> bool:
        """Whether an update of this round may have left the device."""
        return (task, round_number) in self._spending.releases

    @property
    def releases(self) -> Sequence[Release]:
        """All updates that ever left, or were about to, oldest first."""
        return list(self._spending.releases.values())

    @property
    def reservations(self) -> Sequence[Reservation]:
        """All that was ever charged, oldest first."""
        return self._spending.reservations

    @property
    def acceptances(self) -> Sequence[Acceptance]:
        """When a person accepted the log although lines may have been missing; what was spent is then "at least"."""
        return self._spending.acceptances

    @property
    def spent_epsilon(self) -> float:
        """Epsilon at the budget's delta in the period of the last line, as an accountant would state it."""
        return 0.0 if self._spending.period is None else self._spending.period.spent_epsilon

    @property
    def spent_epsilon_ever(self) -> float:
        """The same over all periods: what is known of a record that was there all the time."""
        return max(self._spending.epsilon_ever(), self.spent_epsilon)

    def spent_at(self, now_s: float, task: str | None = None) -> float:
        """Epsilon of the period that a time falls in, of all studies or of one; 0 once the last line's is over."""
        ends_s = self.period_ends_s
        if ends_s is None or now_s >= ends_s:
            return 0.0
        return self.spent_epsilon if task is None else self.spent_on(task)

    def spent_on(self, task: str) -> float:
        """Epsilon of one study in the period of the last line."""
        return 0.0 if self._spending.period is None else self._spending.period.study(task).spent_epsilon

    def spent_on_ever(self, task: str) -> float:
        """Epsilon of one study over all periods."""
        return self._spending.epsilon_ever(task)

    @property
    def period_begins_s(self) -> float | None:
        """When the period of the last line began; None before the first."""
        return None if self._spending.period is None else self._spending.period.begins_s

    @property
    def period_ends_s(self) -> float | None:
        """From when on the next period may begin, infinity for never; None before the first line."""
        return None if self._spending.period is None else self._spending.period.ends_s

    @property
    def order(self) -> float | None:
        """The Rényi order at which the device's budget is enforced in this period; None before its first charge."""
        return None if self._spending.period is None else self._spending.period.device.order

    def last_round(self, task: str, *, purpose: Purpose = "update") -> int:
        """The newest round of a study that was charged, 0 if none."""
        return self._spending.last_round(task, purpose)

    def was_charged(self, task: str, round_number: int, *, purpose: Purpose = "update") -> bool:
        """Whether exactly this round was charged."""
        return self._spending.was_charged(task, round_number, purpose)

    def was_accepted_since_charge(self, task: str, round_number: int) -> bool:
        """Whether a person accepted the ledger after this round was charged.

        Then lines may be missing that came after the charge, the one of its release among them. What is left of such a
        round must not be gone on with: it may have been released before, and its noise would be drawn a second time.
        """
        return self._spending.was_accepted_since_charge(task, round_number)

    def remaining_participations(self, cost: Vector, *, task: str | None = None, now_s: float | None = None) -> float:
        """How many more participations the budgets admit in a period.

        Args:
            cost: RDP of one (`cost_of`).
            task: the study whose share counts too; none for the device's budget alone.
            now_s: in the period of this time; without it, of the last line.
        """
        last_s = self._spending.at_s
        known_s = [time_s for time_s in (last_s, now_s) if time_s is not None]
        return self._spending.period_at(max(known_s, default=0.0)).remaining(cost, task)

    def refuses_until_s(
        self,
        *,
        task: str,
        cost: Vector,
        now_s: float,
        latest_s: float = math.inf,
        earliest_s: float = -math.inf,
    ) -> float | None:
        """From when on `reserve` would not refuse such a cost any more for want of budget.

        Returns:
            None if it would not refuse now, else Unix seconds; infinity for never.
        """
        times = self._times(now_s, earliest_s, latest_s)
        if self._is_unknown_when(times):
            return math.inf if times.is_too_wide else max(earliest_s, now_s)
        period = self._spending.period_at(times.ledger_time_s(self._spending.at_s))
        return None if period.refusal(task, cost) is None else self._admits_from_s(period, task, cost)

    def _charge(self, entry: Reservation) -> None:
        """Append, take and count a line that was admitted."""
        self._log.write(entry)
        self._spending.take(entry)  # before it is counted: from here on the charge stands, whatever fails
        self._log.count()

    def _admitted(
        self,
        *,
        task: str,
        round_number: int,
        update: Steps,
        times: RoundTimes,
        count: Steps | None = None,
    ) -> Reservation:
        """The line that charges an update, or the count that goes before it. Raises BudgetSpentError."""
        purpose: Purpose = "update" if count is None else "count"
        what = f"round {round_number} of {task}" if count is None else f"a count in round {round_number} of {task}"
        if round_number <= self.last_round(task, purpose=purpose):
            raise BudgetSpentError(f"{what} was charged before and is not done twice")
        if self._is_unknown_when(times):
            raise BudgetSpentError(f"the first period of the privacy budget cannot begin: {disagreement(what, times)}")
        charged = update if count is None else count
        entry = Reservation(
            format=FORMAT,
            at_s=times.ledger_time_s(self._spending.at_s),
            task=task,
            round=round_number,
            purpose=purpose,
            sampling_rate=charged.sampling_rate,
            noise_multiplier=charged.noise_multiplier,
            steps=charged.steps,
            previous=self._log.head,
            plan=None if count is None else update,
        )
        period = self._spending.period_at(entry.at_s)
        refusal = period.refusal(task, entry.repeated_rdp())
        if refusal is not None:
            raise BudgetSpentError(self._sentence(what, entry, period, refusal, times))
        return entry

    def _times(self, now_s: float, earliest_s: float, latest_s: float) -> RoundTimes:
        """What is known of the time."""
        return RoundTimes(now_s, earliest_s, latest_s, widest_window_s(self.budget.period_s))

    def _is_unknown_when(self, times: RoundTimes) -> bool:
        """Whether the first period would begin at a time that clock and study do not agree on."""
        return self.budget.period_s is not None and self._spending.at_s is None and not times.agree

    def _admits_from_s(self, period: Period, task: str, cost: Vector) -> float:
        """When a cost that is refused will be admitted: in the next period, or never."""
        fresh = Period(self.budget, number=0, begins_s=0.0, ends_s=math.inf)
        return period.ends_s if fresh.refusal(task, cost) is None else math.inf

    def _sentence(self, what: str, entry: Reservation, period: Period, refusal: Refusal, times: RoundTimes) -> str:
        """A refusal for people: what would be spent of what, and from when on it will not be refused."""
        what += "" if entry.plan is None else " and the round"
        begin = "the privacy budget is spent"
        if period.closed_by is not None:
            why = f"its counter was accepted on {utc(period.closed_by.at_s)}, so this period counts as spent"
        else:
            whose = "this device" if refusal.whose is None else f"the share of {refusal.whose}"
            why = (
                f"{what} would bring epsilon to {refusal.epsilon:.3f} of the {refusal.limit:g} of {whose} "
                f"(delta {self.budget.delta:g})"
            )
        return f"{begin}: {why}; {self._until(entry, period, times)}"

    def _until(self, entry: Reservation, period: Period, times: RoundTimes) -> str:
        """The end of that sentence."""
        from_s = self._admits_from_s(period, entry.task, entry.repeated_rdp())
        if math.isfinite(from_s):
            return f"it will not be refused from {utc(from_s)} on{proviso(times)}"
        if math.isfinite(period.ends_s):
            return "it costs more than a whole period has, so it will always be refused"
        return "the budget has one period for ever, so nothing more of this kind is trained"
