"""The processes of a run and what they tell, from their start to their end: what a demo and a live scenario share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from firmware_sim.brokers import RunningBroker
from firmware_sim.errors import FleetError
from firmware_sim.observation import LogTail
from firmware_sim.processes import DaemonProcess, Fleet
from firmware_sim.run_folder import RunFolder
from firmware_sim.settings import AGGREGATOR

LEAST_FREE_BYTES = 8 * 1024 * 1024
"""Below this the run stops: daemons whose disk is full can neither train nor say so in their logs."""


@dataclass
class ProcessRun:
    """Every daemon of a run, and the broker they meet at. As a context: all are started, and in the end stopped.

    Args:
        folder: of the run.
        broker: runs already; whoever started it ends it.
        daemons: of the run.
        take: told of every event of every daemon: its name, and the event's fields.
        advice: what to do after room was made on a full disk.
    """

    folder: RunFolder
    broker: RunningBroker
    daemons: list[DaemonProcess]
    take: Callable[[str, dict[str, Any]], None]
    advice: str
    peak_rss_mb: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._fleet = Fleet(self.daemons)
        self._tails = [LogTail(daemon.name, daemon.log) for daemon in self.daemons]

    def __enter__(self) -> ProcessRun:
        try:
            self._fleet.start()
        except BaseException:
            self._fleet.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._read_memory()
        self._fleet.stop()
        self._read_logs()

    def turn(self) -> list[str]:
        """Start again what died, and take the new events; what happened to processes since the last call.

        Raises:
            FleetError: a process cannot run, or the disk is full.
        """
        broker_happened = self.broker.watch()
        happened = [*self._fleet.watch(), *([broker_happened] if broker_happened else [])]
        self._read_logs()
        self._check_disk()
        return happened

    def _read_logs(self) -> None:
        """Take the new events of all processes."""
        for tail in self._tails:
            for event in tail.read():
                self.take(tail.name, event)

    def _read_memory(self) -> None:
        """Peak memory of each process while it still lives."""
        for daemon in self.daemons:
            peak = daemon.peak_rss_mb()
            if peak is not None:
                self.peak_rss_mb[daemon.name] = round(peak, 1)

    def _check_disk(self) -> None:
        """Stop while there is still room to say why."""
        free = shutil.disk_usage(self.folder.path).free
        if free < LEAST_FREE_BYTES:
            raise FleetError(
                f"the disk of {self.folder.path} is full ({free // 1024} KiB left): make room, then {self.advice}"
            )


def daemons_of(
    folder: RunFolder, *, helpers: Iterable[str], devices: Iterable[str], device_module: str
) -> list[DaemonProcess]:
    """The processes of a run: helpers, the aggregator, and the devices.

    Args:
        folder: of the run.
        helpers: by name.
        devices: by name.
        device_module: that ``python -m`` runs for a device.
    """

    def daemon(name: str, module: str, config: Path) -> DaemonProcess:
        return DaemonProcess(name, module, config, folder.log(name))

    return [
        *(daemon(name, "aggregator.helper.cli", folder.helper_toml(name)) for name in helpers),
        daemon(AGGREGATOR, "aggregator.cli", folder.aggregator_toml),
        *(daemon(name, device_module, folder.device_toml(name)) for name in devices),
    ]
