"""A scenario in real time: real daemons over a real broker, watched to the task's end, measured by their journals."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec.structs import replace as with_fields

from aggregator.assembly import AggregatorFiles
from device_client.assembly import RealDevice
from device_client.ports import Float32
from firmware_sim.brokers import RunningBroker, start_configured
from firmware_sim.fleet.build import TENANT
from firmware_sim.fleet.chronicle import Chronicle
from firmware_sim.fleet.live_folder import LiveFolder, left_out
from firmware_sim.fleet.live_journals import LiveJournals
from firmware_sim.fleet.measuring import metrics_of
from firmware_sim.fleet.record import DeviceRecord
from firmware_sim.fleet.run import DRAINED_AFTER_S, EVENTS, Progress
from firmware_sim.fleet.simulation import RunResult, measure_of, write_results
from firmware_sim.fleet.windows import Totals
from firmware_sim.fleet_events import EventTable
from firmware_sim.fleet_metrics import FaultSpan, LiveTerms
from firmware_sim.process_run import ProcessRun, daemons_of
from firmware_sim.scenario.loading import TASK, LoadedScenario
from firmware_sim.settings import BrokerChoice

POLL_S = 0.1
DEVICE_MODULE = "firmware_sim.fleet.live_device"


@dataclass
class LiveRun:
    """One live run, from its provisioned folder to its results.

    Args:
        made: the folder.
        broker: runs already.
        told: of progress.
        should_stop: whether to stop.
        measure: accuracy and loss of a model, given its parameters; None where nobody records.
    """

    made: LiveFolder
    broker: RunningBroker
    told: Callable[[Progress], None] = lambda progress: None
    should_stop: Callable[[], bool] = lambda: False
    measure: Callable[[Float32], tuple[float, float]] | None = None
    began_s: float = field(default_factory=time.time, init=False)
    now_s: float = field(default=0.0, init=False)
    peak_rss_bytes: int = field(default=0, init=False)
    faults: tuple[FaultSpan, ...] = ()

    def __post_init__(self) -> None:
        self.journals = LiveJournals(self.began_s, goal=self.loaded.task.goal, devices=self.made.devices)

    @property
    def loaded(self) -> LoadedScenario:
        """The scenario."""
        return self.made.loaded

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.made.run.path

    @property
    def chronicle(self) -> Chronicle:
        """What the aggregator told."""
        return self.journals.chronicle

    @property
    def records(self) -> list[DeviceRecord]:
        """The devices."""
        return list(self.journals.records.values())

    @property
    def totals(self) -> Totals:
        """What they did."""
        return self.journals.totals

    def run(self) -> bool:
        """Start all, watch until the task or the scenario's time has ended; whether it did.

        Raises:
            FleetError: a process cannot run, or the disk is full.
        """
        processes = ProcessRun(
            self.made.run,
            self.broker,
            daemons_of(
                self.made.run, helpers=self.made.operators, devices=self.made.devices, device_module=DEVICE_MODULE
            ),
            self._take,
            advice="start the run anew",
        )
        with processes:
            finished = self._watch(processes)
        self.peak_rss_bytes = round(sum(processes.peak_rss_mb.values()) * 2**20)
        self._measure()
        self._read_ledgers()
        self._write_events()
        return finished

    def _take(self, source: str, event: dict[str, Any]) -> None:
        """One event of one process."""
        self.journals.take(source, event)

    def _watch(self, processes: ProcessRun) -> bool:
        """Follow the journals to the end."""
        ends_s = self.loaded.scenario.duration_s
        while not self.should_stop():
            self.now_s = time.time() - self.began_s
            for text in processes.turn():
                self.journals.happened(text, at_s=self.now_s)
            self._measure()
            self._tell()
            if self.journals.ended_s is not None:
                ends_s = min(ends_s, self.journals.ended_s + DRAINED_AFTER_S)
                if self.journals.is_settled:
                    return True
            if self.now_s >= ends_s:
                return True
            time.sleep(POLL_S)
        return False

    def _tell(self) -> None:
        """Tell of progress."""
        committed = sum(one.outcome == "committed" for one in self.chronicle.rounds)
        starts, awake = self.journals.starts, self.loaded.scenario.devices
        self.told(
            Progress(self.now_s, self.loaded.scenario.duration_s, committed, self.loaded.task.rounds, starts, awake)
        )

    def _measure(self) -> None:
        """Measure the models that were made since the last call: the aggregator keeps the last few only."""
        models, self.chronicle.models = self.chronicle.models, []
        if self.measure is None or not models:
            return
        files = AggregatorFiles.load(self.made.run.aggregator_toml)
        with closing(files.open_store(create=False)) as store:
            for number, version in models:
                params = store.models.params(store.models.record(TASK, version))
                self.chronicle.measured[number] = self.measure(params)

    def _read_ledgers(self) -> None:
        """Take what was spent from the devices' own ledgers: one that was killed may have charged without telling."""
        for name, record in self.journals.records.items():
            with RealDevice.open(self.made.run.device_toml(name)) as device:
                record.spent_epsilon = device.ledger.spent_epsilon

    def _write_events(self) -> None:
        """The table of events, in the order of time."""
        with EventTable(self.folder / EVENTS) as table:
            table.append_window(self.journals.events())


def run_live(
    made: LiveFolder,
    *,
    broker: BrokerChoice,
    told: Callable[[Progress], None],
    should_stop: Callable[[], bool],
    said: Callable[[str], None] = lambda text: None,
) -> RunResult:
    """Run what is in a live run's folder, and leave metrics, events and a report in it.

    Args:
        made: the folder.
        broker: which one.
        told: of progress.
        should_stop: whether to stop; there are results up to then.
        said: told what the broker is.

    Raises:
        FleetError: a process cannot run.
    """
    running = start_configured(broker, made.run, tenant=TENANT, configure=made.configure)
    try:
        said(running.description)
        run = LiveRun(made, running, told=told, should_stop=should_stop, measure=measure_of(made.loaded))
        finished = run.run()
    finally:
        running.stop()
    unknown = (None, None)
    accuracies = [run.chronicle.measured.get(one.round, unknown) for one in run.chronicle.rounds]
    metrics = with_fields(
        metrics_of(run, accuracies=accuracies, wall_s=run.now_s),
        began_s=run.began_s,
        live=LiveTerms(broker=running.description, left_out=left_out(made.loaded)),
    )
    write_results(run.folder, metrics)
    return RunResult(finished=finished, metrics=metrics)
