"""One `Device` on virtual hardware, and the studies it may join: brokers and aggregators that do as they are told."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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
from device_client.ports import Board, Graph, Transport
from device_client.study_runner import StudyRunner
from firmware_sim.virtual_broker import VirtualBroker, VirtualTransport
from firmware_sim.virtual_device import SteadyBoard, VirtualClock, VirtualHardware, no_desk, virtual_device
from firmware_sim.virtual_flash import VirtualFlash
from fl_protocol.adapters.tflite_graph import TfliteGraph
from fl_protocol.broker_config import BrokerConfig
from fl_protocol.bundle import ModelBundle
from fl_protocol.chunking import split
from fl_protocol.joining import Claim
from fl_protocol.messages import ChunkMsg, ReceiptMsg, RoundManifestMsg, UpdateEnvelopeMsg, UpdateHeaderMsg, decode
from fl_protocol.signing import sign
from fl_protocol.topics import down_topic, model_topic, parse_upload_topic, round_topic
from tests.device_client.ports import make_manifest, make_plan
from tests.virtual_fleet import AGGREGATOR_KEY, MemoryJournal, SeededEntropy, load_bundle, synthetic_records

TENANT = "clinic"
BUNDLE = load_bundle()
START_S = 1_800_000_000.0
ALL_CHUNKS = slice(None)
ANYTIME = EligibilityConfig(require_idle=False, require_unmetered=False)
SOME_HELD_OUT = RecordsConfig(held_out_fraction=0.25)


@functools.cache
def real_graph() -> TfliteGraph:
    """The bundle's graph, loaded once; devices here do not run at the same time."""
    return TfliteGraph.of_bundle(BUNDLE)


@dataclass
class ScriptedStudy:
    """A study's broker with an aggregator that opens rounds and signs receipts when it is told to."""

    task: str
    clock: VirtualClock
    broker: VirtualBroker = field(default_factory=VirtualBroker)
    published: list[tuple[str, bytes]] = field(default_factory=list)
    is_down: bool = False

    def __post_init__(self) -> None:
        true_publish = self.broker.publish

        def publish(topic: str, payload: bytes, *, retain: bool) -> None:
            self.published.append((topic, payload))
            true_publish(topic, payload, retain=retain)

        self.broker.publish = publish  # type: ignore[method-assign]

    @property
    def study(self) -> str:
        return f"{TENANT}/{self.task}"

    def open_round(
        self,
        number: int = 1,
        *,
        lasts_s: float = 86_400.0,
        factor: float = 1.0,
        cut_bytes: int = 60_000,
        chunks: slice = ALL_CHUNKS,
        **changes: Any,
    ) -> RoundManifestMsg:
        """Publish a round, and of its model, which is the bundle's times `factor`, these chunks."""
        params = (factor * BUNDLE.shared_params).astype("<f4").tobytes()
        digest = hashlib.sha256(params).digest()
        plan = make_plan(**changes.pop("plan", {}))
        manifest = make_manifest(
            tenant=TENANT,
            task=self.task,
            round=number,
            graph_digest=BUNDLE.graph_digest,
            num_parameters=len(BUNDLE.shared_params),
            opened_s=self.clock.time_s,
            deadline_s=self.clock.time_s + lasts_s,
            plan=plan,
            **{"model_digest": digest, **changes},
        )
        for chunk in list(split(digest[:16], params, data_bytes=cut_bytes))[chunks]:
            self.broker.publish(model_topic(TENANT, digest, chunk.index), sign(chunk, AGGREGATOR_KEY), retain=True)
        self.broker.publish(round_topic(TENANT, self.task), sign(manifest, AGGREGATOR_KEY), retain=True)
        return manifest

    def updates(self) -> dict[bytes, UpdateHeaderMsg]:
        """Headers of all whole updates that were ever sent here."""
        parts: dict[bytes, dict[int, bytes]] = {}
        for topic, payload in self.published:
            if "/up/" in topic:
                chunk = decode(payload, ChunkMsg)
                parts.setdefault(parse_upload_topic(topic).update_id, {})[chunk.index] = chunk.data
        whole = {key: b"".join(chunks[index] for index in sorted(chunks)) for key, chunks in parts.items()}
        return {key: decode(decode(data, UpdateEnvelopeMsg).header, UpdateHeaderMsg) for key, data in whole.items()}

    def receipt_all(self) -> None:
        """Sign a receipt for everything that was sent."""
        for update_id, header in self.updates().items():
            message = ReceiptMsg(
                tenant=TENANT,
                task=self.task,
                round=header.round,
                device=header.device,
                update_id=update_id,
                sealed_digest=header.sealed_digest,
                accepted_s=self.clock.time_s,
            )
            self.broker.publish(
                down_topic(TENANT, header.device, "receipt"), sign(message, AGGREGATOR_KEY), retain=False
            )


class CountingBell:
    """Lets virtual time pass while the daemon waits, and counts its turns."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self.waits: list[float] = []
        self.rung = 0

    def ring(self) -> None:
        self.rung += 1

    def wait(self, timeout_s: float) -> None:
        self.waits.append(timeout_s)
        self._clock.time_s += timeout_s


@dataclass
class OneDevice:
    """A device, its flash and its surroundings; `start` may be called again after `kill`."""

    tasks: tuple[str, ...] = ("watch",)
    eligibility: EligibilityConfig = ANYTIME
    privacy: dict[str, Any] = field(default_factory=dict)
    records: RecordsConfig = SOME_HELD_OUT
    study_settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    board: Board = field(default_factory=SteadyBoard)
    bundle: ModelBundle = BUNDLE
    graph: Graph = field(default_factory=real_graph)
    kind: type[Device] = Device
    desk: Callable[[Claim, str], Transport] = no_desk

    def __post_init__(self) -> None:
        self.clock = VirtualClock(START_S)
        self.bell = CountingBell(self.clock)
        self.scripts = {task: ScriptedStudy(task, self.clock) for task in self.tasks}
        self.flash, self.counter_flash = VirtualFlash(), VirtualFlash()
        self.journal = MemoryJournal()
        self.lives = 0
        self.connections: dict[str, list[str]] = {}
        self.transports: list[VirtualTransport] = []
        self.device: Device

    def config(self) -> DeviceConfig:
        settings: dict[str, Any] = {"epsilon": 10.0, "delta": 1e-5, **self.privacy}
        return DeviceConfig(
            device=DeviceSection(store="unused", store_key="unused"),
            studies=tuple(
                StudyConfig(
                    **{
                        "tenant": TENANT,
                        "task": task,
                        "broker": BrokerConfig("virtual", 1),
                        "bundle": "unused",
                        "publisher_key": "00",
                        "aggregator_key": "11",
                        "id": f"{task}-7",
                        **self.study_settings.get(task, {}),
                    }
                )
                for task in self.tasks
            ),
            privacy=PrivacyConfig(**settings),
            eligibility=self.eligibility,
            records=self.records,
        )

    def hardware(self) -> VirtualHardware:
        self.lives += 1
        return VirtualHardware(
            flash=self.flash,
            counter_flash=self.counter_flash,
            store_key=b"\x05" * 32,
            clock=self.clock,
            board=self.board,
            entropy=SeededEntropy(f"training {self.lives}"),
            nonces=SeededEntropy(f"nonces {self.lives}"),
            jitter=SeededEntropy(f"jitter {self.lives}"),
            connect=self.connect,
            journal=self.journal,
            bell=self.bell,
            desk=self.desk,
        )

    def connect(self, wanted: Connection) -> Transport:
        script = self.scripts[wanted.study.task]
        self.connections.setdefault(wanted.study.task, []).append(wanted.device)
        transport = VirtualTransport(script.broker, will=(wanted.will_topic, wanted.will_payload))
        if script.is_down:
            transport.open = lambda: None  # type: ignore[method-assign]
        self.transports.append(transport)
        return transport

    def start(self, *, grant: bool = True, records: int = 40) -> Device:
        """A first start makes identities, records and grants; a later one finds them."""
        self.device = virtual_device(
            self.config(),
            self.hardware(),
            bundle=lambda _study: self.bundle,
            graph=lambda _bundle: self.graph,
            aggregator_key=AGGREGATOR_KEY.public_key(),
            kind=self.kind,
        )
        if self.lives == 1:
            for study in self.config().studies:
                if study.id is not None:
                    create_identity(self.device.store, study.study, SeededEntropy(f"identity {study.study}"))
            if records:
                windows = synthetic_records(self.bundle, seed=1, count=records)
                self.device.add(windows.x, windows.y)
            for study in self.config().studies if grant else ():
                self.device.grant(study.study)
        return self.device

    def kill(self) -> None:
        """What SIGKILL leaves."""
        for transport in self.transports:
            transport.drop("killed")
        self.transports.clear()
        self.flash, self.counter_flash = self.flash.after_kill(), self.counter_flash.after_kill()

    def restart(self) -> Device:
        self.kill()
        return self.start()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.device.step()

    def until(self, event: str, *, most: int = 400) -> dict[str, Any]:
        """Step until the journal says so."""
        before = len(self.journal.named(event))
        for _ in range(most):
            if len(self.journal.named(event)) > before:
                return self.journal.named(event)[-1]
            self.device.step()
        raise AssertionError(f"no {event} in {most} turns: {self.journal.events}")

    def runner(self, task: str = "watch") -> StudyRunner:
        return next(one for one in self.device.studies.running if one.study == f"{TENANT}/{task}")
