"""The coordinator: runs all tasks' rounds, carries out operators' orders, and keeps the blobs tidy.

There is one at a time; a second one stands by until the first one's lease has run out. Rounds run only while the broker
can be reached: one that nobody can reach would abort for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from aggregator.alerts.alarms import Alarms
from aggregator.cosigning import Cosigning
from aggregator.errors import AggregatorError, BlobError, DatabaseError, LostModelError
from aggregator.fleet_watch import FleetWatch
from aggregator.outage import Outage
from aggregator.revocation_notices import RevocationNotices
from aggregator.round_events import (
    AbortAsked,
    ClockJumped,
    PauseAsked,
    Reachable,
    ResumeAsked,
    RollbackAsked,
    RoundEvent,
    RoundOrder,
)
from aggregator.rounds import why_not
from aggregator.shards import LeaseTerms
from aggregator.store.leases import COORDINATOR
from aggregator.store.sweep import Sweeper
from aggregator.store.tasks import Order, StoredTask
from aggregator.task_runner import RunnerPorts, TaskRunner
from fl_protocol.errors import CoveyError, LocalMisuseError
from fl_protocol.recency import happened_within
from fl_protocol.transport import Connected, Disconnected, TransportEvent

LOOK_EVERY_S = 0.2
"""How often deadlines and arrivals from other workers are looked at."""
JUMP_S = 5.0
"""A wall clock that moves this much against the monotonic one was set."""

LoadTask = Callable[[StoredTask], TaskRunner]


class Pace(NamedTuple):
    """How often a coordinator looks for operators' orders and new tasks, and for blobs that nothing names any more."""

    orders_every_s: float = 1.0
    sweep_every_s: float = 300.0


class Coordinator:
    """See the module docstring; `AggregatorService` feeds it events.

    Args:
        name: unique among those that share the database.
        ports: what tasks are run with.
        load: makes a task's runner.
        monotonic_s: seconds that no clock setting moves.
        terms: of its lease.
        pace: how often it looks for what.
        cosigning: looks after the audit log's checkpoints; None to leave that.
        notices: tell helpers which devices were thrown out; None to leave that.
        fleet: listens to devices' presence; None to leave that.
        alarms: looked for when a round has closed; None to leave that.
    """

    def __init__(
        self,
        *,
        name: str,
        ports: RunnerPorts,
        load: LoadTask,
        monotonic_s: Callable[[], float],
        terms: LeaseTerms = LeaseTerms(),  # noqa: B008 - frozen
        pace: Pace = Pace(),  # noqa: B008 - frozen
        cosigning: Cosigning | None = None,
        notices: RevocationNotices | None = None,
        fleet: FleetWatch | None = None,
        alarms: Alarms | None = None,
    ) -> None:
        self._cosigning, self._notices, self._fleet, self._alarms = cosigning, notices, fleet, alarms
        self._moved: set[str] = set()  # tasks whose rounds closed since the log was looked after
        self._terms, self._pace = terms, pace
        self.name, self._ports, self._load, self._monotonic_s = name, ports, load, monotonic_s
        self._runners: dict[str, TaskRunner] = {}
        self._sweeper = Sweeper(ports.store.database, ports.store.blobs)
        self._unusable: dict[str, str] = {}  # their files
        self._connected = False
        self._leads = False
        self._unreached: set[str] = set()  # tasks that have not been told that devices can reach us
        self._looked_s = self._asked_s = self._renewed_s = self._swept_s = -math.inf
        self._outage = Outage(name, note=self._note, now_s=ports.now_s)
        self._unerased = True  # SQLite's log may still hold what a closed round erased
        self._clock_offset_s = self._ports.now_s() - monotonic_s()

    @property
    def tasks(self) -> dict[str, TaskRunner]:
        """The tasks that are run, by name."""
        return self._runners

    @property
    def failure(self) -> str:
        """What is wrong with the database, in words; empty when it is well."""
        return self._outage.reason

    def take(self, events: Sequence[TransportEvent]) -> list[TransportEvent]:
        """Take what helpers of secure rounds say, and devices of their presence; the other events."""
        others = self._ports.calls.take(events)
        return others if self._fleet is None else self._fleet.take(others)

    def handle(self, events: Sequence[TransportEvent], *, arrived: bool) -> None:
        """Take connections made and lost, and do what is due.

        Args:
            events: what the transport had.
            arrived: whether this process has just committed updates.
        """
        for event in events:
            match event:
                case Connected():
                    self._on_connected(event)
                case Disconnected():
                    self._connected = False
                    self._note("disconnected", reason=event.reason)
        if self._outage.must_wait:
            return
        try:
            self._do_what_is_due(self._ports.now_s(), arrived=arrived)
        except DatabaseError as error:
            self._outage.failed(str(error))
        else:
            self._outage.over()

    def stop(self) -> None:
        """Let another one take over at once."""
        if self._leads:
            self._ports.store.leases.release({COORDINATOR}, self.name)

    def _on_connected(self, event: Connected) -> None:
        """Everything is published again: a broker may have lost it."""
        try:
            self._ports.announcer.connected(event.maximum_packet_bytes)
            self._ports.calls.connected(event.maximum_packet_bytes)
        except LocalMisuseError as error:
            self._note("broker_unusable", reason=str(error))
            return
        self._connected = True
        self._note("connected")
        self._unreached = set(self._runners)

    def _do_what_is_due(self, now_s: float, *, arrived: bool) -> None:
        """Lease, tasks, orders, rounds, tidying: each when its time has come. Raises DatabaseError."""
        if not happened_within(self._terms.renew_every_s, self._renewed_s, now_s):
            self._lead(now_s)
            self._renewed_s = now_s
        if self._fleet is not None and self._connected:
            self._fleet.look_after(leads=self._leads)
        if not self._leads:
            return
        looks = arrived or self._ports.calls.has_news or not happened_within(LOOK_EVERY_S, self._looked_s, now_s)
        failed: list[DatabaseError] = []
        if looks and self._connected:
            if self._notices is not None:
                self._notices.look_after()
            self._ports.calls.look_after()
            failed += self._note_clock_jump(now_s)
            if not happened_within(self._pace.orders_every_s, self._asked_s, now_s):
                failed += self._load_new_tasks()
                self._carry_out_orders()
                self._asked_s = now_s
            for runner in self._runners.values():
                try:
                    self._run(runner)
                except (BlobError, LostModelError) as error:  # which may be this task's own; others go on
                    failed.append(error)
            self._looked_s = now_s
            self._look_after_log()
        self._tidy(now_s)
        if failed:
            raise failed[0]

    def _look_after_log(self) -> None:
        """Alarms, a checkpoint of the audit log after each round, and helpers' co-signatures."""
        if self._alarms is not None:
            for event, fields in self._alarms.look(sorted(self._moved)):
                self._note(event, **fields)
        if self._cosigning is not None:
            self._cosigning.look_after(round_closed=bool(self._moved))
        self._moved.clear()

    def _lead(self, now_s: float) -> None:
        """Take or renew the lease; say so when that changes."""
        led, store = self._leads, self._ports.store
        taken = store.leases.take({COORDINATOR}, self.name, until_s=now_s + self._terms.lease_s, now_s=now_s)
        self._leads = COORDINATOR in taken
        if self._leads and not led:
            self._note("coordinating", worker=self.name)
            self._runners.clear()
            self._asked_s = -math.inf
        elif led and not self._leads:
            self._note("standing_by", worker=self.name)

    def _load_new_tasks(self) -> list[DatabaseError]:
        """Take up tasks that were created since the last look; what keeps single ones from it. Raises DatabaseError."""
        failed: list[DatabaseError] = []
        specs = self._ports.store.tasks.specs()
        for name, spec in specs.items():
            if name in self._runners or self._unusable.get(name) == spec:
                continue
            try:
                if not spec:
                    raise AggregatorError(
                        "it is from before tasks had files; run covey-aggregator task create with its file"
                    )
                runner = self._load(self._ports.store.tasks.get(name))
            except (BlobError, LostModelError) as error:
                failed.append(error)
                continue
            except DatabaseError:
                raise
            except CoveyError as error:
                self._unusable[name] = spec
                self._note("task_unusable", task=name, reason=str(error))
                continue
            self._runners[name] = runner
            self._unreached.add(name)
            state = runner.state
            self._note("task_loaded", task=name, phase=state.phase.value, round=state.number, committed=state.committed)
        return failed

    def _run(self, runner: TaskRunner) -> None:
        """One look at one task. Raises DatabaseError."""
        if runner.name in self._unreached:
            runner.refresh()
            runner.count_arrivals()
            self._advance(runner, Reachable())
            self._unreached.discard(runner.name)
        runner.count_arrivals()
        self._advance(runner, runner.due())

    def _advance(self, runner: TaskRunner, event: RoundEvent, *, order: tuple[int, str] | None = None) -> None:
        """Let something happen to a task, and remember if it may have erased keys. Raises DatabaseError."""
        before = _what_keys_depend_on(runner)
        try:
            runner.advance(event, order=order)
        except DatabaseError:
            self._unerased = True  # it may have become durable
            raise
        self._unerased |= before != _what_keys_depend_on(runner)
        if before != _what_keys_depend_on(runner):
            self._moved.add(runner.name)

    def _carry_out_orders(self) -> None:
        """Do what operators asked for, or say why not."""
        for order in self._ports.store.tasks.pending_orders():
            runner = self._runners.get(order.task)
            if runner is None:
                self._refuse(order, f"there is no task {order.task} that can be run")
                continue
            event = _event_of(order)
            runner.look()  # what the last look found may be gone: an order that does nothing is not done
            reason = why_not(runner.state, event)
            if reason:
                self._refuse(order, reason)
                continue
            try:
                self._advance(runner, event, order=(order.id, "done"))
            except (BlobError, LostModelError) as error:  # of the model to go on from; nothing has changed
                self._refuse(order, str(error))
            else:
                self._note("order_done", task=order.task, order=order.name, argument=order.argument)

    def _refuse(self, order: Order, reason: str) -> None:
        """Note that an order has no effect."""
        store, now_s = self._ports.store, self._ports.now_s()
        with store.database.transaction() as connection:
            store.tasks.order_done(connection, order.id, outcome=reason, now_s=now_s)
        self._note("order_refused", task=order.task, order=order.name, reason=reason)

    def _note_clock_jump(self, now_s: float) -> list[DatabaseError]:
        """A wall clock that was set must not close rounds, nor keep them open; what could not be published of it."""
        failed: list[DatabaseError] = []
        offset_s = now_s - self._monotonic_s()
        by_s, self._clock_offset_s = offset_s - self._clock_offset_s, offset_s
        if abs(by_s) >= JUMP_S:
            self._note("clock_jumped", by_s=round(by_s, 3))
            for runner in self._runners.values():
                try:
                    self._advance(runner, ClockJumped(by_s))
                except (BlobError, LostModelError) as error:
                    failed.append(error)
        return failed

    def _tidy(self, now_s: float) -> None:
        """Empty the database's log after a round has closed, and sweep blobs now and then."""
        if self._unerased:
            self._unerased = not self._ports.store.database.empty_log()
        if not happened_within(self._pace.sweep_every_s, self._swept_s, now_s):
            self._swept_s = now_s
            swept = self._sweeper.sweep(now_s=now_s, monotonic_s=self._monotonic_s())
            if swept:
                self._note("swept", blobs=swept)

    def _note(self, event: str, **fields: object) -> None:
        """Write to the journal."""
        self._ports.journal.write(event, at_s=self._ports.now_s(), **fields)


def _what_keys_depend_on(runner: TaskRunner) -> tuple[object, ...]:
    """What changes whenever a key is erased."""
    return runner.state.number, runner.state.phase, runner.state.version


def _event_of(order: Order) -> RoundOrder:
    """An order as the round table takes it."""
    match order.name:
        case "pause":
            return PauseAsked(at_once=False)
        case "pause_now":
            return PauseAsked(at_once=True)
        case "resume":
            return ResumeAsked()
        case "abort":
            return AbortAsked(order.argument or "aborted by the operator")
        case "rollback":
            return RollbackAsked(int(order.argument))
