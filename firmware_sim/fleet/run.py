"""A simulated run: windows of virtual time, from the beginning or from where it was put down, until its task has ended.

Which engine simulates the shards, and how many there are, changes no byte of what comes out.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from device_client.ports import Float32
from firmware_sim.fleet.build import attack_plan_of, build_hub, device_name, index_of, service_plan
from firmware_sim.fleet.checkpoint import Checkpoint, latest_checkpoint, write_checkpoint
from firmware_sim.fleet.chronicle import Chronicle
from firmware_sim.fleet.engines import Engine, PutDown
from firmware_sim.fleet.hub import Hub
from firmware_sim.fleet.record import DeviceRecord
from firmware_sim.fleet.replaying import Replayer
from firmware_sim.fleet.services import Services
from firmware_sim.fleet.windows import (
    Download,
    FleetEvent,
    Registration,
    Totals,
    Upload,
    Window,
    WindowReport,
    added_up,
    merged_uploads,
)
from firmware_sim.fleet_events import EventTable
from firmware_sim.fleet_metrics import FaultSpan
from firmware_sim.memory_blobs import MemoryBlobs
from firmware_sim.scenario.loading import TASK, LoadedScenario
from firmware_sim.seeded_entropy import SeededEntropy
from firmware_sim.virtual_device import VirtualClock

EVENTS = "events.csv"
DRAINED_AFTER_S = 30.0
"""How long a run goes on after its task has ended, so that the last receipts come."""
_HOUR_S = 3600.0


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Args:
        now_s: virtual seconds since the beginning, of `duration_s`.
        committed, rounds: rounds that were committed, of all that the task has.
        starts: daemons that were started in this process.
        awake: devices whose daemon runs now.
    """

    now_s: float
    duration_s: float
    committed: int
    rounds: int
    starts: int
    awake: int


@dataclass
class FleetRun:
    """See the module docstring.

    Args:
        loaded: the scenario.
        folder: of the run; its scenario file is in it.
        engine: simulates the shards.
        told: of progress, after every window.
        should_stop: whether to stop; the run goes on where it was put down last.
        faults: that are planned.
        heard: told of every event, in the order of the table.
        measure: accuracy and loss of a model, given its parameters; None where no model is trained.
        measure_attack: how far attackers came with a model, by name.
    """

    loaded: LoadedScenario
    folder: Path
    engine: Engine
    told: Callable[[Progress], None] = lambda progress: None
    should_stop: Callable[[], bool] = lambda: False
    faults: tuple[FaultSpan, ...] = ()
    heard: Callable[[FleetEvent], None] = lambda event: None
    measure: Callable[[Float32], tuple[float, float]] | None = None
    measure_attack: Callable[[Float32], dict[str, float]] | None = None
    chronicle: Chronicle = field(init=False)
    records: list[DeviceRecord] = field(default_factory=list, init=False)
    totals: Totals = field(default_factory=Totals, init=False)
    now_s: float = field(default=0.0, init=False)
    peak_rss_bytes: int = field(default=0, init=False)
    finished: bool = field(default=False, init=False)
    _task_ended_s: float | None = field(default=None, init=False)
    _enrolling: list[Registration] = field(default_factory=list, init=False)
    _held: tuple[Download, ...] = field(default=(), init=False)
    _hub_wakes_s: float = field(default=0.0, init=False)
    _put_down_s: float = field(default=0.0, init=False)
    _put_down_rounds: int = field(default=0, init=False)

    def run(self) -> bool:
        """Simulate; whether the run came to its end. Raises ConfigError, FleetError."""
        for _ in self.steps():
            pass
        return self.finished

    def steps(self) -> Iterator[None]:
        """As `run`, one window at a time."""
        hub, down = self._begin()
        try:
            if not self.finished:  # else it was killed at its end
                yield from self._windows(hub, down)
                if self.finished:
                    self._put_down(hub)
        finally:
            self._events.close()
            hub.close()

    def _begin(self) -> tuple[Hub, tuple[Download, ...]]:
        """A hub and shards: new, or as they were put down."""
        scenario = self.loaded.scenario
        self._services = service_plan(self.loaded)
        found = latest_checkpoint(self.folder)
        clock = VirtualClock(scenario.began_s)
        self._blobs = MemoryBlobs(clock.now_s, SeededEntropy(f"{scenario.seed} blobs"))
        self._in_flight: list[Upload] = []
        self._replayer = Replayer(attack_plan_of(self.loaded), scenario.devices, name_of=device_name, index_of=index_of)
        if found is None:
            self.chronicle = Chronicle(began_s=scenario.began_s, goal=self.loaded.task.goal)
            self._earlier = Totals()
            self._events = EventTable(self.folder / EVENTS)
            hub = build_hub(self.loaded, self.folder, clock=clock, blobs=self._blobs, journal=self.chronicle)
            self.engine.start(0.0, None)
            hub.start()
            self._note_put_down()
            return hub, hub.work((), 0.0)
        self._take_over(found)
        hub = build_hub(self.loaded, self.folder, clock=clock, blobs=self._blobs, journal=self.chronicle, resumed=True)
        return hub, self._go_on(hub, found)

    def _take_over(self, found: Checkpoint) -> None:
        """Everything but hub and shards as it was."""
        self.chronicle, self._earlier, self.now_s = found.chronicle, found.totals, found.now_s
        self._in_flight, self._held, self.finished = found.in_flight, found.held, found.finished
        self.records, self.totals = found.records, found.totals
        self._note_put_down()
        self._blobs.restore(found.blobs)
        self._events = EventTable(self.folder / EVENTS, keep_bytes=found.events_bytes)

    def _go_on(self, hub: Hub, found: Checkpoint) -> tuple[Download, ...]:
        """Start hub and shards where they were put down; what is at the devices' door."""
        hub.take_up(found.hub, found.now_s)
        hub.start()
        self._hub_wakes_s = found.now_s
        self.engine.start(found.now_s, found.records)
        down = hub.work((), found.now_s)
        topics = {one.topic for one in down}
        return (*(one for one in hub.retained() if one.topic not in topics), *down)

    def _windows(self, hub: Hub, down: tuple[Download, ...]) -> Iterator[None]:
        """One window after the other, until the end or until it should stop."""
        scenario = self.loaded.scenario
        every_s, ends_s = scenario.exchange_s, scenario.duration_s
        number, is_begun, is_busy = round(self.now_s / every_s), False, False
        while number * every_s < ends_s:
            self.now_s = number * every_s
            if not is_begun:
                self._begin_window(number, down)
            # What was for single devices when the run was put down waits until they are connected again.
            held, self._held = self._held, ()
            down = (*held, *self._work(hub, self._services.at(number)))
            if hub.is_finished:  # a while is left for the last receipts
                ends_s = min(ends_s, self._finished_s(self.now_s) + DRAINED_AFTER_S)
            puts_down = self._is_to_be_put_down() and not hub.is_finished
            # All that comes down in the next window is known: a shard that is done with this one need not wait for the
            # others. After a window that was followed by one in which nothing happens, the next is not begun so early.
            is_begun = not puts_down and (bool(down) or is_busy) and (number + 1) * every_s < ends_s
            if is_begun:
                self._begin_window(number + 1, down)
            reports = self.engine.collect()
            self._take(hub, reports)
            next_number = self._next_number(number, reports, idle=not down)
            is_busy = next_number == number + 1
            number = number + 1 if is_begun else next_number
            self.now_s = number * every_s
            self._tell(reports)
            yield
            if self.should_stop():
                if is_begun:
                    self.engine.collect()
                return
            if puts_down:
                self._held, is_busy = tuple(one for one in down if one.device), False
                down = self._go_on(hub, self._put_down(hub))
        self.now_s, self.finished = min(self.now_s, ends_s), True

    def _begin_window(self, number: int, down: tuple[Download, ...]) -> None:
        """Have the shards simulate a window, with what comes through of all that comes down."""
        services, every_s = self._services.at(number), self.loaded.scenario.exchange_s
        passing = tuple(one for one in down if services.lets_through(one.device))
        self.engine.begin(Window(number * every_s, (number + 1) * every_s, passing, services))

    def _finished_s(self, now_s: float) -> float:
        """When the task ended."""
        if self._task_ended_s is None:
            self._task_ended_s = now_s
        return self._task_ended_s

    def _is_to_be_put_down(self) -> bool:
        """Whether a round has ended since the run was last put down, and that is long enough ago."""
        is_long_ago = self.now_s - self._put_down_s >= self.loaded.scenario.checkpoint_hours * _HOUR_S
        return is_long_ago and len(self.chronicle.rounds) > self._put_down_rounds

    def _tell(self, reports: list[WindowReport]) -> None:
        """Tell of progress."""
        committed = sum(one.outcome == "committed" for one in self.chronicle.rounds)
        starts, awake = sum(one.starts for one in reports), sum(one.awake for one in reports)
        duration_s = self.loaded.scenario.duration_s
        self.told(Progress(self.now_s, duration_s, committed, self.loaded.task.rounds, starts, awake))

    def _take(self, hub: Hub, reports: list[WindowReport]) -> None:
        """What came of a window."""
        self._measure(hub)
        uploads = merged_uploads(reports)
        again, repeated = self._replayer.heard(uploads, self.now_s, round_number=self.chronicle.last_round)
        for upload in (*uploads, *again):
            heapq.heappush(self._in_flight, upload)
        self._enrolling += (one for report in reports for one in report.registrations)
        news = [*self.chronicle.take_news(), *repeated, *(event for report in reports for event in report.events)]
        self._tell_events(news)

    def _tell_events(self, news: list[FleetEvent]) -> None:
        """Events of a window, into the table and to whoever listens."""
        self._events.append_window(news)
        for event in news:
            self.heard(event)

    def _measure(self, hub: Hub) -> None:
        """Measure the models that were made: the aggregator keeps the last few only."""
        models, self.chronicle.models = self.chronicle.models, []
        for number, version in models:
            if self.measure is not None:
                params = hub.store.models.params(hub.store.models.record(TASK, version))
                self.chronicle.measured[number] = self.measure(params)
                if self.measure_attack is not None:
                    self.chronicle.attack.update(self.measure_attack(params))

    def _work(self, hub: Hub, services: Services) -> tuple[Download, ...]:
        """Let the hub work, if there is something to do; what goes down."""
        arrived, changes = self._arrived(self.now_s), services != hub.services
        if not arrived and not changes and self.now_s < self._hub_wakes_s:
            return ()
        self._enrol(hub)
        down = hub.work(arrived, self.now_s, services)
        # A round that was closed needs another look at once, and so does what comes back; receipts alone need none.
        soon = changes or any(not one.device for one in down)
        self._hub_wakes_s = self.now_s + self.loaded.scenario.exchange_s if soon else hub.next_wake_s(self.now_s)
        return down

    def _enrol(self, hub: Hub) -> None:
        """Register the devices that have enrolled: many at once, before anything that they have sent is looked at."""
        hub.register(sorted(self._enrolling))
        self._enrolling.clear()

    def _arrived(self, now_s: float) -> list[Upload]:
        """What has arrived at the broker by now, in order."""
        arrived = []
        while self._in_flight and self._in_flight[0].arrives_s <= now_s:
            arrived.append(heapq.heappop(self._in_flight))
        return arrived

    def _next_number(self, number: int, reports: list[WindowReport], *, idle: bool) -> int:
        """The next window in which something happens."""
        if not idle:
            return number + 1
        wakes_s = [report.next_s for report in reports]
        wakes_s += [one.arrives_s for one in self._in_flight[:1]]
        next_s = min([*wakes_s, self._hub_wakes_s])
        next_number = max(number + 1, math.floor(next_s / self.loaded.scenario.exchange_s))
        return int(min(next_number, self._services.next_change(number)))

    def _put_down(self, hub: Hub) -> Checkpoint:
        """Put everything down durably, so that another process can go on."""
        self._enrol(hub)
        left = self.engine.put_down(self.now_s)
        self._add_up(left)
        for upload in (upload for one in left for upload in one.left.in_flight):
            heapq.heappush(self._in_flight, upload)
        self._tell_events([event for one in left for event in one.left.events])
        checkpoint = Checkpoint(
            now_s=self.now_s,
            records=self.records,
            totals=self.totals,
            chronicle=self.chronicle,
            hub=hub.put_down(),
            blobs=self._blobs.kept(),
            in_flight=self._in_flight,
            held=self._held,
            finished=self.finished,
            events_bytes=self._events.flushed_bytes(),
        )
        write_checkpoint(self.folder, checkpoint)
        self._earlier = self.totals
        self._note_put_down()
        return checkpoint

    def _note_put_down(self) -> None:
        """Remember when and after which round the run was put down."""
        self._put_down_s, self._put_down_rounds = self.now_s, len(self.chronicle.rounds)

    def _add_up(self, left: list[PutDown]) -> None:
        """What all shards leave, together."""
        self.records = sorted((record for one in left for record in one.left.records), key=lambda record: record.index)
        self.totals = added_up([self._earlier, *(one.totals for one in left)])
        self.peak_rss_bytes = max(self.peak_rss_bytes, sum(one.peak_rss_bytes for one in left))
