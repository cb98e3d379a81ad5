"""The daemon: one loop over all studies of a device. It waits for a bell, never polls, and trains in between.

Order in a turn: what people and sensors ask; which studies run (consent, pseudonyms); messages; whether the device may
train; one step of training. A step is the longest it is away from its messages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from device_client.events import ConditionsRead
from device_client.joining.renewal import StudyRenewal
from device_client.ports import Bell, Clock, Watchdog
from device_client.readiness import READ_EVERY_S, Readiness
from device_client.studies import LOOK_EVERY_S, Studies
from device_client.study_runner import StudyRunner
from fl_protocol.adapters.journal import Journal
from fl_protocol.errors import CoveyError

HOUSEKEEPING_S = 3600.0
"""How often records are looked through for those that have become too old."""


@dataclass
class DeviceDaemon:
    """One device at work; see the module docstring.

    Args:
        studies: what runs on it.
        readiness: whether it may train.
        serve: answers what is asked of it, through sockets or by the embedding program; whether anything was.
        prune: drops records that are too old or too many.
        renewals: of the studies that were joined by enrolment, by ``tenant/task``.
    """

    studies: Studies
    readiness: Readiness
    clock: Clock
    bell: Bell
    watchdog: Watchdog
    journal: Journal
    serve: Callable[[], bool] = lambda: False
    prune: Callable[[float], int] = lambda _now_s: 0
    renewals: Mapping[str, StudyRenewal] = field(default_factory=dict)
    _kept_house_s: float = field(default=-math.inf, init=False)
    _paused: bool = field(default=False, init=False)
    _told_rules: Sequence[str] = field(default=(), init=False)

    def close(self) -> None:
        """Put training aside and say goodbye."""
        for renewal in self.renewals.values():
            renewal.close()
        self.studies.stop_all()
        self.journal.write("stopped", at_s=self.clock.now_s())

    def step(self) -> None:
        """Do what there is to do, then wait until there is more."""
        busy = self.serve()
        self.studies.check()
        busy |= self._renew()
        self._keep_house()
        runners = self.studies.running
        busy = any([busy, *(bool(runner.take_events()) for runner in runners)])
        matters = any(_cares(runner) or runner.session.has_large_updates for runner in runners)
        conditions = self._look() if matters else None
        for runner in runners:
            runner.tick(conditions)
        busy |= self._train(runners, conditions is not None and bool(conditions.blocked))
        self.watchdog.alive(self._summary(runners))
        if not busy:
            self.bell.wait(self._idle_for_s(runners))

    def quiet_until_s(self) -> float:
        """Until when every turn will do nothing, Unix seconds, unless a message comes or the board reads otherwise.

        For whoever knows beforehand when that is: a simulator, which need not let a device take its turns until then.
        Records grow old unnoticed meanwhile; the next turn looks through them.
        """
        runners = self.studies.running
        wakes_s = [self.studies.next_change_s(), *(runner.next_wake_s() for runner in runners)]
        wakes_s += [renewal.next_wake_s() for renewal in self.renewals.values()]
        wakes_s += [runner.session.next_reason_s() for runner in runners]
        if self.readiness.changes_by_itself and any(_cares(runner) for runner in runners):
            wakes_s.append(self.clock.now_s() + READ_EVERY_S)
        return min(wakes_s)

    def _renew(self) -> bool:
        """Ask for further names where they are due; whether anything came of it."""
        runners = {runner.study: runner for runner in self.studies.running}
        busy = False
        for study, renewal in self.renewals.items():
            try:
                busy |= renewal.step(runners.get(study))
            except CoveyError as error:
                self.journal.write("renewal_failed", at_s=self.clock.now_s(), study=study, reason=str(error))
        return busy

    def _look(self) -> ConditionsRead:
        """Whether the device may train; a change is told to the journal."""
        reasons = self.readiness.look()
        rules = [blocked.rule for blocked in self.readiness.blocked]
        if set(rules) != set(self._told_rules):  # others look too, such as `status`
            self._told_rules = rules
            self.journal.write("eligibility", at_s=self.clock.now_s(), blocked=rules)
        return ConditionsRead(reasons, holds_uploads=self.readiness.holds_uploads)

    def _train(self, runners: list[StudyRunner], is_blocked: bool) -> bool:
        """One step for every study that trains, or none and their progress kept; whether anything was done."""
        if is_blocked:
            if not self._paused:
                for runner in runners:
                    runner.put_aside()
            self._paused = True
            return False
        self._paused = False
        return any([runner.advance() for runner in runners])  # noqa: C419 - every study gets its step

    def _keep_house(self) -> None:
        """Let records grow old."""
        now_s = self.clock.now_s()
        if abs(now_s - self._kept_house_s) < HOUSEKEEPING_S:
            return
        self._kept_house_s = now_s
        try:
            gone = self.prune(now_s)
        except CoveyError as error:
            self.journal.write("store_failed", at_s=now_s, reason=str(error))
        else:
            if gone:
                self.journal.write("records_pruned", at_s=now_s)

    def _idle_for_s(self, runners: list[StudyRunner]) -> float:
        """How long nothing can happen unless the bell rings."""
        waits = [LOOK_EVERY_S, self.watchdog.longest_wait_s]
        if any(_cares(runner) for runner in runners):
            waits.append(READ_EVERY_S)
        now_s = self.clock.now_s()
        waits += [runner.session.next_wake_s() - now_s for runner in runners]
        waits += [renewal.next_wake_s() - now_s for renewal in self.renewals.values()]
        return max(0.0, min(waits))

    def _summary(self, runners: list[StudyRunner]) -> str:
        """One line for whoever watches the process."""
        return "; ".join(f"{runner.study}: {runner.session.view().doing}" for runner in runners) or "no study granted"


def _cares(runner: StudyRunner) -> bool:
    """Whether it matters now if the device may train."""
    return runner.work is not None or runner.session.wants_to_train
