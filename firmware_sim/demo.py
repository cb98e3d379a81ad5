"""The main job: start broker, helpers, aggregator and wrists, watch them to the end, stop them, write the results."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from rich.markup import escape

from aggregator.assembly import AggregatorFiles, bundle_of
from aggregator.export import export_model
from device_client.assembly import RealDevice
from firmware_sim.brokers import RunningBroker
from firmware_sim.errors import FleetError
from firmware_sim.live import LiveRounds
from firmware_sim.metrics import RunMetrics, gather
from firmware_sim.observation import Observation
from firmware_sim.process_run import ProcessRun, daemons_of
from firmware_sim.report import report_html
from firmware_sim.run_folder import RunFolder
from firmware_sim.settings import TASK, DemoSettings
from fl_protocol.adapters.files import write_atomic
from fl_protocol.adapters.key_files import create_key, load_key
from fl_protocol.adapters.software import software_version
from fl_protocol.signing import public_key_hex

POLL_S = 0.1
LAST_MEASUREMENT_WITHIN_S = 30.0
"""How long to wait, after the task is finished, for held-out wrists to measure the finished model."""


@dataclass
class DemoRun:
    """One start of a run: from provisioned folder to report."""

    folder: RunFolder
    settings: DemoSettings
    console: Console
    broker: RunningBroker
    stopped: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.observation = Observation(self.settings)
        wrists = self.settings.training_wrists + self.settings.held_out_wrists
        self._processes = ProcessRun(
            self.folder,
            self.broker,
            daemons_of(
                self.folder,
                helpers=self.settings.operators,
                devices=[wrist.device_id for wrist in wrists],
                device_module="device_client.cli",
            ),
            self.observation.take,
            advice=f"go on with covey-fleet demo --resume {self.folder.path}",
        )

    def run(self) -> bool:
        """Start all, watch until the task is finished or a stop is asked for, stop all; whether it finished.

        Raises:
            FleetError: a process cannot run.
        """
        with LiveRounds(self.console, self.observation) as live, _signals_into(self.stopped):
            try:
                with self._processes:
                    self._watch(live)
            finally:
                live.refresh()
        return self.observation.finished

    def _watch(self, live: LiveRounds) -> None:
        """Follow the logs until done."""
        finished_at_s: float | None = None
        while not self.stopped and not self.observation.finished:
            for text in self._processes.turn():
                live.say(f"[yellow]{escape(text)}[/]")
                self.observation.complaints.append(text)
            live.refresh()
            self._check_progress()
            if self.observation.finished_digest is not None:
                now_s = time.monotonic()
                finished_at_s = now_s if finished_at_s is None else finished_at_s
                if now_s > finished_at_s + LAST_MEASUREMENT_WITHIN_S:
                    raise FleetError("the held-out wrists did not measure the finished model in time; see the logs")
            time.sleep(POLL_S)

    def _check_progress(self) -> None:
        """Stop when there will be no further round; it would wait for ever."""
        if self.observation.paused_because:
            raise FleetError(f"the aggregator has paused the task: {self.observation.paused_because}")
        if self.observation.is_stuck:
            raise FleetError(
                f"{len(self.observation.exhausted)} of {len(self.settings.training_wrists)} training wrists have spent "
                "their privacy budget, so the run cannot finish: rounds that aborted cost privacy too; start a new run"
            )

    def _read_ledgers(self) -> None:
        """Take what was spent from the wrists' own ledgers: one that was killed may have charged without telling."""
        if self.settings.epsilon is None:
            return
        for wrist in self.settings.training_wrists:
            with RealDevice.open(self.folder.device_toml(wrist.device_id)) as device:
                ledger = device.ledger
            if ledger.reservations:
                self.observation.epsilon[wrist.device_id] = ledger.spent_epsilon

    def write_results(self) -> RunMetrics:
        """Write metrics, report and, when the task is finished, the model's files.

        Raises:
            FleetError: the folder does not take them.
        """
        self._read_ledgers()
        metrics = gather(
            self.observation,
            covey=software_version(),
            broker=self.broker.description,
            peak_rss_mb=self._processes.peak_rss_mb,
        )
        folder = self.folder.path
        try:
            text = msgspec.json.format(msgspec.json.encode(metrics), indent=1)
            write_atomic(folder / "metrics.json", text, mode=0o644)
            write_atomic(folder / "report.html", report_html(metrics).encode(), mode=0o644)
            if metrics.final is not None:
                files = AggregatorFiles.load(self.folder.aggregator_toml)
                with closing(files.open_store(create=False)) as store:
                    record = store.models.record(TASK, metrics.final.version)
                    bundle, params = bundle_of(store, store.tasks.get(TASK)), store.models.params(record)
                exported = export_model(bundle, record, params, publisher_key=self._publisher_key())
                write_atomic(folder / "model.covey", exported.bundle, mode=0o644)
                write_atomic(folder / "model.tflite", exported.inference, mode=0o644)
        except OSError as error:
            raise FleetError(f"the results cannot be written to {folder} ({error.strerror})") from error
        return metrics

    def _publisher_key(self) -> Ed25519PrivateKey:
        """A publisher's key of this run's own, its public half beside it. Raises OSError."""
        path = self.folder.path / "publisher.key"
        key = load_key(path) if path.exists() else create_key(path)
        write_atomic(self.folder.path / "publisher.pub", f"{public_key_hex(key.public_key())}\n".encode(), mode=0o644)
        return key


@contextmanager
def _signals_into(stopped: list[int]) -> Iterator[None]:
    """Collect SIGINT and SIGTERM instead of dying of them."""
    before: dict[int, Callable[..., object] | int | None] = {}
    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        before[number] = signal.signal(number, lambda signum, _frame: stopped.append(signum))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
