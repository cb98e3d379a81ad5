"""A part of the fleet, simulated alone for one window after the other: SimPy's time, real devices, an edge of the
broker.

Which devices share a shard changes nothing: each has its own seeds, and they meet at the hub only.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Generator, Iterable
from typing import Any, NamedTuple

import simpy

from device_client.errors import LedgerError, StoreError
from firmware_sim.fleet.diary import Diary
from firmware_sim.fleet.edge import ShardEdge
from firmware_sim.fleet.living import Living
from firmware_sim.fleet.maker import DeviceMaker
from firmware_sim.fleet.record import DeviceRecord
from firmware_sim.fleet.services import Services
from firmware_sim.fleet.surroundings import Ending, Surroundings, World
from firmware_sim.fleet.windows import FleetEvent, Registration, Totals, Upload, Window, WindowReport

RESTART_AFTER_S = 60.0
"""How long after a crash the system starts the daemon again."""
MOST_CRASHES = 5
"""After so many crashes it does not any more."""


class Left(NamedTuple):
    """What a shard leaves: its devices, what they have sent and has not arrived, and what happened as they ended."""

    records: list[DeviceRecord]
    in_flight: tuple[Upload, ...]
    events: tuple[FleetEvent, ...]


class ShardTime(simpy.Environment):
    """SimPy's time, which may also pass although nothing happens in this shard."""

    def pass_until(self, time_s: float) -> None:
        """Do what is to be done before a time; then it is that time, to the last bit.

        A timeout would not do: its time is the sum of the last event's and a difference, which another shard with
        another last event rounds to another number.

        Args:
            time_s: not before now.
        """
        while self.peek() < time_s:
            self.step()
        self._now = max(self._now, time_s)


class Shard:
    """See the module docstring.

    Args:
        records: its devices; they are changed.
        maker: makes them.
        world: what they are in.
        starts_s: where its time begins, in a run that is resumed.
        traced: name of a device of which every event is told; empty for none.
    """

    def __init__(
        self,
        records: Iterable[DeviceRecord],
        *,
        maker: DeviceMaker,
        world: World,
        starts_s: float = 0.0,
        traced: str = "",
    ) -> None:
        self._traced = traced
        self._records = {record.name: record for record in records}
        self._maker, self._world = maker, world
        self._environment = ShardTime(starts_s)
        self._edge = ShardEdge(
            began_s=maker.began_s,
            now_s=lambda: maker.began_s + float(self._environment.now),
            vectors=lambda name: self._records[name].vectors,
        )
        self._living: dict[str, Living] = {}
        self._registrations: list[Registration] = []
        self._events: list[FleetEvent] = []
        self.totals = Totals()
        for record in self._records.values():
            self._start_at(record, record.next_s if record.lives else world.first_start_s(record))

    def advance(self, window: Window) -> WindowReport:
        """Simulate one window.

        Args:
            window: begins where the last one ended, or later.
        """
        self._environment.pass_until(window.starts_s)
        if window.services.broker_away != self._edge.is_down:
            self._broker_changes(window.services)
        for message in window.down:
            self._edge.take(message)
        while self._environment.peek() < window.ends_s:
            self._environment.step()
        registrations, self._registrations = tuple(self._registrations), []
        events, self._events = tuple(self._events), []
        return WindowReport(
            self._edge.take_uploads(window.ends_s),
            registrations,
            events,
            min(self._environment.peek(), self._edge.next_arrival_s()),
            self.totals.starts,
            len(self._living),
        )

    def _broker_changes(self, services: Services) -> None:
        """The broker goes, or comes back."""
        if services.broker_away:
            self._edge.go_down(keep_retained=services.keeps_retained)
        else:
            self._edge.come_up()

    def put_down(self, now_s: float) -> Left:
        """End every daemon that runs, and give its devices as they are; another shard goes on with them.

        What runs now is started again at once: a system may end and restart a daemon whenever it likes.

        Args:
            now_s: end of the last window.
        """
        self._environment.pass_until(now_s)  # when other devices did something last must not matter to these
        for living in self._living.values():
            living.sleep()
            living.surroundings.leave()
            living.record.next_s = now_s
            self.totals.turns += living.turns
        self._living.clear()
        return Left(list(self._records.values()), self._edge.take_uploads(math.inf), tuple(self._events))

    def _start_at(self, record: DeviceRecord, start_s: float) -> None:
        """Have a daemon started."""
        record.next_s = start_s
        if start_s < math.inf:
            start = self._environment.timeout(max(0.0, start_s - self._environment.now))
            start.callbacks.append(lambda _event: self._begin_life(record))

    def _begin_life(self, record: DeviceRecord) -> None:
        """Let a daemon live."""
        self._environment.process(self._life(record))

    def _life(self, record: DeviceRecord) -> Generator[simpy.Event, Any, None]:
        """One life of a daemon: from its start until something ends it."""
        surroundings = self._world.surroundings(record, self._environment)
        diary = self._diary(record)
        try:
            living = self._started(record, surroundings, diary)
            ending = yield from living.life(self._environment)
            self._ended(living, surroundings, ending, diary)
        except (StoreError, LedgerError) as error:
            start_s = surroundings.start_without_store_s()
            if start_s is None:
                self._crashed(record, surroundings, diary, error)
            else:
                self._without_store(record, surroundings, diary, error, start_s)
        except Exception as error:
            self._crashed(record, surroundings, diary, error)

    def _diary(self, record: DeviceRecord) -> Diary:
        """The journal of one life."""
        return Diary(
            record,
            lambda: float(self._environment.now),
            self.totals,
            lambda event: self._events.append(event),  # noqa: PLW0108 - every window has a list of its own
            tells_all=record.name == self._traced,
        )

    def _started(self, record: DeviceRecord, surroundings: Surroundings, diary: Diary) -> Living:
        """A daemon starts."""
        self.totals.starts += 1
        living, enrolled = self._maker.start(
            record, surroundings, environment=self._environment, edge=self._edge, journal=diary
        )
        for event, detail in record.news:
            diary.tell(event, detail=detail)
        record.news.clear()
        self._registrations += enrolled
        self._living[record.name] = living
        return living

    def _ended(self, living: Living, surroundings: Surroundings, ending: Ending, diary: Diary) -> None:
        """A daemon ends: only its record stays."""
        if ending.is_clean:
            living.sleep()
        else:
            diary.tell(ending.kind, detail=ending.detail)
            living.abandon()
        del self._living[living.record.name]  # only now: what fails before is a crash, which leaves a flash
        surroundings.leave()
        self.totals.turns += living.turns
        self._start_at(living.record, surroundings.next_start_s(ending))

    def _without_store(
        self, record: DeviceRecord, surroundings: Surroundings, diary: Diary, error: Exception, start_s: float
    ) -> None:
        """A daemon refused to work on a store that its flash has damaged, or does not take: what it has to do."""
        kind = "store_damaged" if start_s == math.inf else "store_unavailable"
        diary.tell(kind, detail=f"{type(error).__name__}: {error}")
        self._abandon(record, surroundings)
        self._start_at(record, start_s)

    def _abandon(self, record: DeviceRecord, surroundings: Surroundings) -> None:
        """Keep what a daemon leaves that ended by an error."""
        living = self._living.pop(record.name, None)
        if living is not None:
            living.abandon()
            self.totals.turns += living.turns
        surroundings.leave()

    def _crashed(self, record: DeviceRecord, surroundings: Surroundings, diary: Diary, error: Exception) -> None:
        """A daemon raised what it should not have: a finding, with what leads to it."""
        trace = "".join(traceback.format_exception(error))
        diary.tell("crash", detail=f"{type(error).__name__}: {error}\n{trace}")
        self._abandon(record, surroundings)
        record.crashes += 1
        restarts = record.crashes < MOST_CRASHES
        self._start_at(record, self._environment.now + RESTART_AFTER_S if restarts else math.inf)
