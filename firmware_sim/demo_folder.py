"""The demo's run folder: provisioned whole from its settings and the recordings of its wrists, or not at all."""

from __future__ import annotations

import math
import time
from pathlib import Path

import msgspec

from aggregator.assembly import AggregatorFiles, bundle_of
from aggregator.task_creation import create_task
from aggregator.task_file import TaskConfig, write_task
from device_client.config import (
    DeviceConfig,
    DeviceSection,
    EligibilityConfig,
    PrivacyConfig,
    RecordsConfig,
    StudyConfig,
)
from device_client.session import Role
from firmware_sim.bundles import bundle_and_publisher, require_watch_model
from firmware_sim.errors import FleetError
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
from firmware_sim.settings import STUDY, TASK, TENANT, DemoSettings
from firmware_sim.watch_data import Recording, windows_of
from fl_protocol.adapters.files import write_atomic
from fl_protocol.bundle import open_bundle
from fl_protocol.signing import public_key_from_hex


def create_run(folder: Path, settings: DemoSettings, recordings: list[Recording]) -> RunFolder:
    """Provision a new run: CA, certificates, aggregator, helpers, and each wrist's keys, store and records.

    Raises:
        FleetError: the folder is not empty or cannot be written, or the settings cannot be carried out.
    """
    # What cannot be carried out is refused before anything is written.
    settings.plan()
    require_watch_model(settings.model)
    run = RunFolder(folder)
    try:
        if folder.exists() and any(folder.iterdir()):
            raise FleetError(f"{folder} is not empty; name a new folder, or use --resume to go on with a run")
        make_folders(run, helpers=bool(settings.operators))
        write_configs(run, settings, port=1, tls=True)
        wrists = [wrist.device_id for wrist in settings.training_wrists + settings.held_out_wrists]
        write_certificates(run, tenant=TENANT, devices=wrists, helpers=settings.operators)
        _provision(run, settings, recordings)
        # Last, so that a folder with settings is a whole run.
        write_atomic(run.settings_file, msgspec.json.format(msgspec.json.encode(settings), indent=1), mode=0o644)
    except OSError as error:
        raise FleetError(f"the run folder {folder} cannot be written ({error.strerror})") from error
    return run


def write_configs(run: RunFolder, settings: DemoSettings, *, port: int, tls: bool) -> None:
    """Write every configuration file, for the broker's port of this start."""
    bundle, publisher = bundle_and_publisher(settings.model)
    broker = broker_at(port, tls=tls)
    key, pins = write_servers(
        run, tenant=TENANT, broker=broker, operators=settings.operators, minimum_cohort=settings.minimum_cohort
    )
    for wrist in settings.training_wrists + settings.held_out_wrists:
        role: Role = "evaluate" if wrist.person in settings.held_out else "train"
        device = DeviceConfig(
            studies=(
                StudyConfig(
                    tenant=TENANT,
                    task=TASK,
                    broker=broker,
                    bundle=str(bundle),
                    publisher_key=publisher,
                    aggregator_key=key,
                    id=wrist.device_id,
                    role=role,
                    helpers=pins,
                ),
            ),
            device=DeviceSection(store="store", store_key="store.key"),
            privacy=PrivacyConfig(
                epsilon=math.inf if settings.epsilon is None else settings.epsilon,
                delta=settings.delta,
                minimum_noise_multiplier=settings.noise_multiplier,
                minimum_cohort=settings.minimum_cohort,
                # With these the wrist sends its updates masked or not at all.
                minimum_helpers=len(pins),
                minimum_operators=len({pin.operator for pin in pins}),
            ),
            # All wrists share this machine, which is no wrist: its load and its network say nothing about them.
            eligibility=EligibilityConfig(require_idle=False, require_unmetered=False, minimum_battery_percent=0.0),
            records=RecordsConfig(held_out_fraction=0.0),
        )
        write_device(run, wrist.device_id, device)


def task_file(settings: DemoSettings) -> str:
    """What ``covey-aggregator task create`` is given."""
    bundle, publisher = bundle_and_publisher(settings.model)
    model = open_bundle(bundle.read_bytes(), publisher=public_key_from_hex(publisher))
    return write_task(
        TaskConfig(
            name=TASK,
            bundle=str(bundle),
            publisher_key=publisher,
            plan=settings.plan(),
            server=settings.server(),
            rounds=settings.rounds,
            goal=len(settings.training_wrists),
            minimum_cohort=settings.minimum_cohort,
            round_duration_s=settings.round_duration_s,
            engine=settings.engine,
            secure=settings.secure(len(model.shared_params)),
        )
    )


def _provision(run: RunFolder, settings: DemoSettings, recordings: list[Recording]) -> None:
    """Create the task, and each wrist's identity, encrypted records and registration, with the helpers too."""
    registered: list[tuple[str, bytes]] = []
    store = AggregatorFiles.load(run.aggregator_toml).open_store()
    write_atomic(run.task_toml, task_file(settings).encode())
    create_task(store, run.task_toml, now_s=time.time())
    samples = bundle_of(store, store.tasks.get(TASK)).manifest.input.shape[0]
    for wrist in settings.training_wrists + settings.held_out_wrists:
        records = windows_of(recordings, wrist, samples=samples)
        key = provision_device(run.device_toml(wrist.device_id), STUDY, records)
        if wrist.person not in settings.held_out:
            registered.append((wrist.device_id, key))
            store.devices.add(*registered[-1], time.time())
    store.close()
    for name in settings.operators:
        register_devices(run.helper_toml(name), TENANT, registered)
