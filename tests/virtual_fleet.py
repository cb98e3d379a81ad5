"""A whole study in one process: real devices and aggregators on a virtual broker, in virtual time, seeded.

There may be several aggregator processes (ingest workers, coordinators that stand by) on one database, and several
tasks. Their database is a real file in the test's folder; what is killed is started again on it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace as with_fields

from aggregator.assembly import make_service
from aggregator.helper.answering import Study
from aggregator.helper.helper_store import HelperDatabase, HelperStore
from aggregator.helper.key_ring import Helper, KeyTerms
from aggregator.helper.service import HelperLimits, HelperService
from aggregator.intake import IntakeLimits
from aggregator.rounds import Phase, RoundState
from aggregator.service import AggregatorService
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.database import Database
from aggregator.store.models import ModelRecord
from aggregator.task_creation import create_task
from aggregator.task_file import Server, TaskConfig, TrainingPlan, Updates, write_task
from device_client.config import (
    DeviceConfig,
    DeviceSection,
    EligibilityConfig,
    PrivacyConfig,
    RecordsConfig,
    StudyConfig,
)
from device_client.device import Device
from device_client.device_ports import Connection
from device_client.device_store import create_identity
from device_client.ledger import Budget
from device_client.ports import Float32
from device_client.session import Role
from device_client.training import Records
from firmware_sim.faults.packets import FaultyTransport, PacketRates
from firmware_sim.labelled_chance import key_of
from firmware_sim.memory_blobs import MemoryBlobs
from firmware_sim.seeded_entropy import SeededEntropy
from firmware_sim.trusted_disk import trust_the_disk
from firmware_sim.virtual_broker import VirtualBroker, VirtualTransport
from firmware_sim.virtual_device import SteadyBoard, VirtualClock, VirtualHardware, virtual_device
from firmware_sim.virtual_flash import VirtualFlash
from fl_protocol.adapters.tflite_graph import TfliteGraph
from fl_protocol.broker_config import BrokerConfig
from fl_protocol.bundle import ModelBundle, open_bundle, pack_bundle
from fl_protocol.helper_config import HelperPin
from fl_protocol.secagg.terms import HelperIdentity
from fl_protocol.signing import public_key_from_hex, public_key_hex
from fl_protocol.transport import Transport

TENANT, TASK = "clinic", "watch"
STUDY = f"{TENANT}/{TASK}"
AGGREGATOR_KEY = Ed25519PrivateKey.from_private_bytes(b"\x01" * 32)
PUBLISHER_KEY = Ed25519PrivateKey.from_private_bytes(b"\x02" * 32)
AGGREGATOR = "aggregator"


def bundle_folder() -> Path:
    spec = importlib.util.find_spec("models")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "bundles"


def load_bundle(name: str = "watch_features") -> ModelBundle:
    folder = bundle_folder()
    publisher = public_key_from_hex((folder / "publisher.pub").read_text())
    return open_bundle((folder / f"{name}.covey").read_bytes(), publisher=publisher)


def helper_identity(name: str) -> Ed25519PrivateKey:
    """A helper's key."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"identity of {name}".encode()).digest())


@dataclass
class MemoryJournal:
    """A journal that keeps what it is told."""

    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def write(self, event: str, /, *, at_s: float, **fields: Any) -> None:
        self.events.append((event, {"at_s": at_s, **fields}))

    def named(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.events if name == event]


class ObservedBroker(VirtualBroker):
    """A broker that remembers what was published, and loses what it is told to lose."""

    def __init__(self, *, maximum_packet_bytes: int | None = None) -> None:
        super().__init__(maximum_packet_bytes=maximum_packet_bytes)
        self.published: list[tuple[str, bytes]] = []
        self.loses: Callable[[str], bool] = lambda topic: False

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        self.published.append((topic, payload))
        if not self.loses(topic):
            super().publish(topic, payload, retain=retain)


def synthetic_records(bundle: ModelBundle, *, seed: int, count: int = 40) -> Records:
    """Windows of class-dependent oscillation plus noise: easy to learn, unlike anybody's recordings."""
    generator = np.random.default_rng(seed)
    samples, channels = bundle.manifest.input.shape
    classes = len(bundle.manifest.label.names)
    y = generator.integers(0, classes, count).astype(np.int32)
    t = np.arange(samples)[None, :, None] / bundle.manifest.input.sampling_rate_hz
    phase = generator.uniform(0, 2 * np.pi, (count, 1, channels))
    x = np.sin(2 * np.pi * (0.4 + 0.5 * y[:, None, None]) * t + phase) + 0.1 * generator.normal(
        size=(count, samples, channels)
    )
    return Records(x.astype(np.float32), y)


def task_config(**changes: Any) -> TaskConfig:
    settings: dict[str, Any] = {
        "name": TASK,
        "bundle": "unused",
        "publisher_key": "unused",
        "plan": TrainingPlan(
            sampling_rate=1.0,
            local_steps=1,
            learning_rate=1.0,
            l2_norm_clip=0.5,
            noise_multiplier=8.0,
            expected_batch_size=40.0,
        ),
        "rounds": 3,
        "goal": 3,
        "minimum_cohort": 2,
        "round_duration_s": 60.0,
        "engine": "open",
        "server": Server(name="fedavgm", learning_rate=1.0, momentum=0.9),
        "updates": Updates(kem="x25519"),
    }
    return TaskConfig(**{**settings, **changes})


@functools.cache
def empty_database() -> bytes:
    """A database with the present schema; making one takes as long as a whole study."""
    with tempfile.TemporaryDirectory() as folder:
        Database(f"sqlite:///{folder}/empty.db").close()
        return (Path(folder) / "empty.db").read_bytes()


class VirtualFleet:
    """Aggregator and devices; `run` steps all of them until nothing moves, then lets time pass."""

    def __init__(
        self,
        folder: Path,
        *,
        devices: int = 3,
        bundle: ModelBundle | None = None,
        task: TaskConfig | None = None,
        budget: Budget | None = None,
        seed: str = "fleet",
        records: Callable[[int], Records] | None = None,
        maximum_packet_bytes: int | None = None,
        faults: PacketRates | None = None,
        database_url: str | None = None,
        helpers: tuple[str, ...] = (),
        helped: Study | None = None,
    ) -> None:
        self.folder, self.seed, self._faults = folder, seed, faults if faults is not None else PacketRates()
        self.helper_names = helpers
        self._helped = helped if helped is not None else Study(TENANT, AGGREGATOR_KEY.public_key())
        self.helpers: dict[str, HelperService] = {}
        self._database_url = database_url
        self._starts: dict[str, int] = {}
        self.task = task if task is not None else task_config()
        self.budget = budget if budget is not None else Budget(3.0, 1e-5)
        self.clock = VirtualClock()
        self.aggregators_ahead_s = 0.0  # by how much the clock of the aggregator's machine is wrong
        self.broker = ObservedBroker(maximum_packet_bytes=maximum_packet_bytes)
        self.journals: dict[str, MemoryJournal] = {}
        self.bundle = bundle if bundle is not None else load_bundle()
        self._bundle_file, self._publisher = self._write_bundle(bundle)
        self._records = records if records is not None else lambda index: synthetic_records(self.bundle, seed=index)
        self._graph = TfliteGraph.of_bundle(self.bundle)
        self.devices: dict[str, Device] = {}
        self.flashes: dict[str, tuple[VirtualFlash, VirtualFlash]] = {}
        self.boards: dict[str, SteadyBoard] = {}
        self.transports: dict[str, VirtualTransport] = {}
        self._studies: dict[str, tuple[StudyConfig, ...]] = {}
        # These devices are on their chargers at night.
        self.eligibility = EligibilityConfig(require_idle=False, require_unmetered=False)
        (folder / "aggregator.db").write_bytes(empty_database())
        self.blobs = MemoryBlobs(self.clock.now_s, SeededEntropy(f"{seed} blobs"))
        self.store = self.open_store()
        """The test's own view of what the aggregators keep."""
        self.create_task(self.task)
        self.services: dict[str, AggregatorService] = {}
        self.entropies: dict[str, SeededEntropy] = {}
        for name in helpers:
            self.start_helper(name)
        self.start_aggregator()
        for index in range(devices):
            self.start_device(f"watch-{index}")

    def open_store(self) -> AggregatorStore:
        """Another connection to the database: a file in the folder, unless an URL was given."""
        if self._database_url is not None:
            return AggregatorStore(Database(self._database_url), self.blobs)
        database = Database(f"sqlite:///{self.folder / 'aggregator.db'}")
        database.engine.dispose()
        trust_the_disk(database.engine)
        return AggregatorStore(database, self.blobs)

    def create_task(self, task: TaskConfig) -> None:
        """What ``covey-aggregator task create`` does."""
        path = self.folder / f"{task.name}.toml"
        path.write_text(write_task(with_fields(task, bundle=str(self._bundle_file), publisher_key=self._publisher)))
        create_task(self.store, path, now_s=self.clock.now_s())

    def _write_bundle(self, bundle: ModelBundle | None) -> tuple[Path, str]:
        """The file of a bundle, and its publisher's key; None for the one that `load_bundle` gives."""
        if bundle is None:
            return bundle_folder() / "watch_features.covey", (bundle_folder() / "publisher.pub").read_text().strip()
        packed = pack_bundle(
            bundle.manifest,
            graph=bundle.graph,
            infer_template=bundle.infer_template,
            params=bundle.params,
            keras_json=bundle.keras_json,
            frozen=bundle.frozen,
            publisher_key=PUBLISHER_KEY,
        )
        path = self.folder / "model.covey"
        path.write_bytes(packed)
        return path, public_key_hex(PUBLISHER_KEY.public_key())

    @property
    def aggregator(self) -> AggregatorService:
        """The process that was started first."""
        return self.services[AGGREGATOR]

    def start_aggregator(self, name: str = AGGREGATOR, *, coordinates: bool = True) -> AggregatorService:
        """Start one, or start it again after `kill_aggregator`, on the same database.

        A second one that coordinates stands by; one that does not is what ``covey-aggregator worker`` starts.
        """
        life = self._life(name)
        self.entropies[name] = SeededEntropy(life)
        service = make_service(
            tenant=TENANT,
            name=name,
            coordinates=coordinates,
            signing_key=AGGREGATOR_KEY,
            store=self.open_store(),
            transport=self._session(name, f"network {life}"),
            journal=self.journals.setdefault(name, MemoryJournal()),
            entropy=self.entropies[name],
            now_s=self.aggregators_now_s,
            monotonic_s=self.clock.now_s,
            limits=IntakeLimits(),
            helpers=self.pinned_helpers(),
        )
        service.start()
        self.services[name] = service
        return service

    def pinned_helpers(self) -> dict[str, HelperIdentity]:
        """Each is run by an operator of its own."""
        return {
            name: HelperIdentity(name, f"operator-of-{name}", helper_identity(name).public_key())
            for name in self.helper_names
        }

    def start_helper(self, name: str) -> HelperService:
        """Start a helper, or start it again after `kill_helper`, on the same store."""
        life = self._life(name)
        database = HelperDatabase(self.folder / f"{name}.db")
        trust_the_disk(database.engine)
        service = HelperService(
            Helper(name, f"operator-of-{name}", helper_identity(name)),
            studies=[self._helped],
            transports={TENANT: self._session(name, f"network {life}")},
            store=HelperStore(database),
            journal=self.journals.setdefault(name, MemoryJournal()),
            entropy=SeededEntropy(life),
            now_s=self.clock.now_s,
            limits=HelperLimits(minimum_cohort=2),
            key_terms=KeyTerms("x25519"),
            wait=lambda _longest_s: None,
        )
        service.start()
        self.helpers[name] = service
        return service

    def kill_helper(self, name: str) -> None:
        """What SIGKILL leaves: its store as the last transaction left it, and the broker's session."""
        killed = self.helpers.pop(name)
        for connection in killed._connections:
            connection._transport.close()
        killed.store.close()

    def start_worker(self, name: str) -> AggregatorService:
        """Start a process that only takes uploads."""
        return self.start_aggregator(name, coordinates=False)

    def kill_aggregator(self, name: str = AGGREGATOR) -> None:
        """What SIGKILL leaves: the database as the last transaction left it, the broker's session, nothing else."""
        killed = self.services.pop(name)
        killed.transport.close()
        killed.store.close()

    def aggregators_now_s(self) -> float:
        """Unix seconds by the clock of the aggregator's machine."""
        return self.clock.time_s + self.aggregators_ahead_s

    @property
    def state(self) -> RoundState:
        """Where the first task stands, as whoever coordinates sees it."""
        return self.state_of(self.task.name)

    def state_of(self, task: str) -> RoundState:
        """Where a task stands."""
        for service in self.services.values():
            if service.coordinator is not None and task in service.coordinator.tasks:
                return service.coordinator.tasks[task].state
        return RoundState()

    def model(self, version: int | None = None, *, task: str | None = None) -> ModelRecord:
        """A version of a task's model; the present one by default."""
        name = task if task is not None else self.task.name
        return self.store.models.record(name, self.state_of(name).version if version is None else version)

    def params(self, version: int | None = None, *, task: str | None = None) -> Float32:
        """Its parameters, float32 [d]."""
        return self.store.models.params(self.model(version, task=task))

    def register(self, name: str, public_key: bytes) -> None:
        """What ``covey-aggregator device add`` and each helper's ``covey-helper device add`` do."""
        self.store.devices.add(name, public_key, self.clock.now_s())
        for helper in self.helpers.values():
            helper.store.devices.add_all(TENANT, [(name, public_key)])

    def _life(self, name: str) -> str:
        """A seed for one life of a process: no two lives draw the same random numbers."""
        self._starts[name] = self._starts.get(name, 0) + 1
        return f"{self.seed} {name} {self._starts[name]}"

    def device_config(
        self, name: str, *, role: Role = "train", studies: tuple[StudyConfig, ...] | None = None, **privacy: Any
    ) -> DeviceConfig:
        """A device's configuration; `privacy` are floors."""
        return DeviceConfig(
            studies=(self.study(name, role=role),) if studies is None else studies,
            device=DeviceSection(store="unused", store_key="unused"),
            privacy=PrivacyConfig(epsilon=self.budget.epsilon, delta=self.budget.delta, **privacy),
            eligibility=self.eligibility,
            records=RecordsConfig(held_out_fraction=0.0),
        )

    def study(self, device: str, *, task: str = TASK, role: Role = "train", **changes: Any) -> StudyConfig:
        """A study that a device is in; it has another name on the wire in each."""
        return StudyConfig(
            tenant=TENANT,
            task=task,
            broker=BrokerConfig("virtual", 1),
            bundle="unused",
            publisher_key="unused",
            aggregator_key="unused",
            id=device if task == TASK else f"{device}-{task}",
            role=role,
            helpers=tuple(
                HelperPin(name=one.name, operator=one.operator, key=public_key_hex(one.key))
                for one in self.pinned_helpers().values()
            ),
            **{"tells_why_every_minutes": 0.0, **changes},  # or weeks of virtual time have a reading every half hour
        )

    def start_device(
        self, name: str, *, role: Role = "train", studies: tuple[StudyConfig, ...] | None = None, **privacy: Any
    ) -> Device:
        """Start a device, or start it again after `kill_device`, on the same flash; by default it is in one study."""
        life = self._life(name)
        is_new = name not in self.flashes
        flash, counter = self.flashes.setdefault(name, (VirtualFlash(), VirtualFlash()))
        if studies is not None:
            self._studies[name] = studies
        config = self.device_config(name, role=role, studies=self._studies.get(name), **privacy)
        hardware = VirtualHardware(
            flash=flash,
            counter_flash=counter,
            store_key=hashlib.sha256(name.encode()).digest(),
            clock=self.clock,
            board=self.boards.setdefault(name, SteadyBoard()),
            entropy=SeededEntropy(life),
            nonces=SeededEntropy(f"{life} nonces"),
            # Jitter draws from a stream of its own: how often an update is resent must not change the next one's noise.
            jitter=SeededEntropy(f"{life} session"),
            connect=lambda wanted: self._connect(wanted, f"network {life}"),
            journal=self.journals.setdefault(name, MemoryJournal()),
        )
        device = virtual_device(
            config,
            hardware,
            bundle=lambda _study: self.bundle,
            graph=lambda _bundle: self._graph,
            aggregator_key=AGGREGATOR_KEY.public_key(),
        )
        if is_new:
            for study in config.studies:
                self.enrol(device, name, study)
            records = self._records(int(name.rsplit("-", 1)[1]))
            device.add(records.x, records.y)
            for study in config.studies:
                device.grant(study.study)
        self.devices[name] = device
        return device

    def enrol(self, device: Device, name: str, study: StudyConfig) -> None:
        """Make a device's identity in a study, and register it."""
        seed = f"{self.seed} {name} identity" if study.study == STUDY else f"{self.seed} {study.id} identity"
        key = create_identity(device.store, study.study, SeededEntropy(seed))
        self.register(str(study.id), key.public_key().public_bytes_raw())

    def _session(self, name: str, seed: str) -> Transport:
        """A connection whose session the broker keeps: an aggregator's or a helper's."""
        return self._faulty(VirtualTransport(self.broker, session=name, manual_acknowledgement=True), seed)

    def _connect(self, wanted: Connection, seed: str) -> Transport:
        """A device's connection."""
        transport = VirtualTransport(self.broker, will=(wanted.will_topic, wanted.will_payload))
        self.transports[wanted.device] = transport
        return self._faulty(transport, seed)

    def _faulty(self, transport: Transport, seed: str) -> Transport:
        """What the network makes of a connection: messages suffer on the way in, whoever sent them."""
        return FaultyTransport(transport, down=lambda: self._faults, key=key_of(seed))

    def kill_device(self, name: str) -> None:
        """What SIGKILL leaves: the flash as it is, and a last will."""
        del self.devices[name]
        if name in self.transports:
            self.transports.pop(name).drop("killed")
        self.flashes[name] = (self.flashes[name][0].after_kill(), self.flashes[name][1].after_kill())

    def steps(self, count: int) -> Iterator[None]:
        """Step everybody `count` times."""
        for _ in range(count):
            for service in list(self.services.values()):
                service.step()
            for helper in list(self.helpers.values()):
                helper.step()
            for device in list(self.devices.values()):
                device.step()
            yield

    def run(self, *, until: Callable[[], bool] | None = None, most_s: float = 600.0) -> None:
        """Let virtual time pass, half a second a step, until `until` (default: the task is finished)."""
        done = until if until is not None else lambda: self.state.phase is Phase.FINISHED
        ends_s = self.clock.time_s + most_s
        while not done():
            assert self.clock.time_s < ends_s, f"not done after {most_s} virtual seconds"
            for _ in self.steps(8):
                pass
            self.clock.time_s += 0.5
