"""The folder of a live run: what a scenario means for real processes, provisioned whole.

scenario.toml       what is run              logs/            one JSON line per event, a file per process
broker/             configuration, ACL, CA   helpers/NAME/    configuration, identity, store
aggregator/         configuration, database  fleet.json, report.html, events.csv
devices/NAME/       configuration, store, and life.json: how often it was started
"""

from __future__ import annotations

import math
import time
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from msgspec.structs import replace as with_fields

from aggregator.assembly import AggregatorFiles
from aggregator.task_creation import create_task
from aggregator.task_file import write_task
from device_client.config import BoardConfig, DeviceConfig, DeviceSection
from firmware_sim.errors import FleetError, SettingsError
from firmware_sim.fleet.build import TENANT, device_maker, device_name, hub_settings
from firmware_sim.fleet.life_file import Lives, write_lives
from firmware_sim.fleet.maker import DeviceMaker
from firmware_sim.helper_folders import register_devices
from firmware_sim.run_folder import (
    RunFolder,
    broker_at,
    make_folders,
    provision_device,
    write_certificates,
    write_device,
    write_servers,
)
from firmware_sim.scenario.loading import TASK, LoadedScenario
from fl_protocol.adapters.files import write_atomic

MOST_DEVICES = 64
"""Processes of one machine; each device's takes about 100 MB."""
_HOUR_S = 3600.0
# As the ideal device of a virtual run reads: this machine's own load and network say nothing about a wearer's.
_BOARD = BoardConfig(battery="none", thermal_zone="none", network="unmetered", idle="idle")


@dataclass(frozen=True)
class LiveFolder:
    """A run's folder and its scenario.

    Args:
        run: its paths.
        loaded: the scenario.
    """

    run: RunFolder
    loaded: LoadedScenario

    @cached_property
    def maker(self) -> DeviceMaker:
        """What makes its devices in a virtual run; it says how they are configured and what they have recorded."""
        return device_maker(self.loaded)

    @property
    def devices(self) -> list[str]:
        """Names on the wire, by index."""
        return [device_name(index) for index in range(self.loaded.scenario.devices)]

    @property
    def operators(self) -> dict[str, str]:
        """Who runs each helper."""
        return {one.name: one.operator for one in hub_settings(self.loaded).pinned_helpers().values()}

    def configure(self, port: int, tls: bool) -> None:
        """Write every process's configuration for the broker of this start."""
        loaded, settings = self.loaded, hub_settings(self.loaded)
        broker = broker_at(port, tls=tls)
        key, pins = write_servers(
            self.run,
            tenant=TENANT,
            broker=broker,
            operators=self.operators,
            minimum_cohort=settings.minimum_cohort,
        )
        for name in self.devices:
            virtual = self.maker.config(name)
            study = with_fields(
                virtual.studies[0],
                broker=broker,
                bundle=str(loaded.bundle_path.resolve()),
                publisher_key=loaded.publisher_key,
                aggregator_key=key,
                helpers=pins,
            )
            write_device(self.run, name, _on_this_machine(with_fields(virtual, studies=(study,))))


def require_live(loaded: LoadedScenario, *, longest_hours: float) -> None:
    """Refuse what cannot be run in real time on one machine.

    Args:
        loaded: the scenario.
        longest_hours: that it may take.

    Raises:
        SettingsError: one sentence about what to do instead.
    """
    scenario = loaded.scenario
    hours = scenario.duration_s / _HOUR_S
    if scenario.devices > MOST_DEVICES:
        raise SettingsError(
            f"--live: {scenario.name} has {scenario.devices:,} devices, each a process of its own: expected at most "
            f"{MOST_DEVICES}; set fewer, or leave --live out to simulate them"
        )
    if hours > longest_hours:
        raise SettingsError(
            f"--live: {scenario.name} takes up to {hours:g} hours of real time: expected at most {longest_hours:g}; "
            "lower its days, or raise --longest-hours"
        )
    if scenario.fidelity != "real":
        raise SettingsError(f'--live: devices really train: expected fidelity = "real", got "{scenario.fidelity}"')
    if scenario.wire != "on":
        raise SettingsError('--live: what goes over a broker is sealed and signed: expected wire = "on", got "off"')


def left_out(loaded: LoadedScenario) -> tuple[str, ...]:
    """What of a scenario a live run does not have: this machine's hardware and network are what they are."""
    scenario = loaded.scenario
    return tuple(
        text
        for text, is_left_out in (
            (f"hardware profiles ({', '.join(sorted(loaded.profiles))})", bool(loaded.profiles)),
            ("batteries, chargers and thermometers", bool(loaded.profiles)),
            ("radios and their faults", bool(loaded.profiles)),
            ("wearers' days", bool(loaded.profiles)),
            (f"{len(loaded.faults)} planned faults", bool(loaded.faults)),
            ("the rollout of firmware", scenario.rollout is not None),
            ("what wearers record after the beginning", _records_later(loaded)),
            ("seeded noise of helpers and aggregator", _adds_noise(loaded)),
            (f"putting down every {scenario.checkpoint_hours:g} hours", _is_put_down(loaded)),
        )
        if is_left_out
    )


def _records_later(loaded: LoadedScenario) -> bool:
    """Whether wearers go on recording: a device stores what its wearer has recorded once an hour."""
    return loaded.scenario.sensors.kind != "none" and loaded.scenario.duration_s > _HOUR_S


def _adds_noise(loaded: LoadedScenario) -> bool:
    """Whether somebody but the devices adds noise: helpers and aggregator draw from the operating system."""
    secure = loaded.task.secure
    if secure is None:
        return False
    return secure.adaptive_clipping is not None or (secure.noise_multiplier > 0 and secure.noise_from != "devices")


def _is_put_down(loaded: LoadedScenario) -> bool:
    """Whether a virtual run of it restarts its daemons at rounds' ends; they then draw other noise."""
    return loaded.scenario.checkpoint_hours * _HOUR_S < loaded.scenario.duration_s


def create_live(path: Path, loaded: LoadedScenario) -> LiveFolder:
    """Provision a live run in its folder: keys, certificates, the task, and each device's store and recordings.

    Args:
        path: of the folder that `firmware_sim.fleet.simulation.begin_run` has made.
        loaded: the scenario in it.

    Raises:
        FleetError: the folder cannot be written.
        ConfigError, BundleError: the task cannot be created.
    """
    folder = LiveFolder(RunFolder(path), loaded)
    try:
        make_folders(folder.run, helpers=bool(folder.operators))
        folder.configure(port=1, tls=True)
        write_certificates(folder.run, tenant=TENANT, devices=folder.devices, helpers=folder.operators)
        _provision(folder)
    except OSError as error:
        raise FleetError(f"the run folder {path} cannot be written ({error.strerror})") from error
    return folder


def _provision(folder: LiveFolder) -> None:
    """Create the task, then devices and their registration with aggregator and helpers."""
    run, loaded, now_s = folder.run, folder.loaded, time.time()
    given = with_fields(loaded.task, bundle=str(loaded.bundle_path.resolve()), publisher_key=loaded.publisher_key)
    write_atomic(run.task_toml, write_task(given).encode())
    registered = [(name, _new_device(folder, index, name)) for index, name in enumerate(folder.devices)]
    with closing(AggregatorFiles.load(run.aggregator_toml).open_store()) as store:
        create_task(store, run.task_toml, now_s=now_s)
        store.devices.add_all(registered, now_s)
    for name in folder.operators:
        register_devices(run.helper_toml(name), TENANT, registered)


def _new_device(folder: LiveFolder, index: int, name: str) -> bytes:
    """A device with what its wearer recorded before the beginning; its public key."""
    path = folder.run.device_toml(name)
    write_lives(path.parent, Lives(str(folder.loaded.scenario.seed), name))
    recorded = folder.maker.records
    history = recorded(index, -math.inf, 0.0) if recorded is not None else None
    return provision_device(path, f"{TENANT}/{TASK}", history if history is not None and len(history) else None)


def _on_this_machine(config: DeviceConfig) -> DeviceConfig:
    """A virtual device's configuration for a process of this machine."""
    return with_fields(config, device=DeviceSection(store="store", store_key="store.key"), board=_BOARD)
