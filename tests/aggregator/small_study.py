"""An aggregator daemon on a virtual broker, and devices made from the protocol alone: they fetch, compute and send."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aggregator.config import PlanConfig, TaskConfig
from aggregator.daemon import AggregatorDaemon
from aggregator.store import AggregatorStore, little_endian
from firmware_sim.virtual_broker import VirtualBroker, VirtualTransport
from fl_protocol.chunking import Reassembler, split
from fl_protocol.messages import ChunkMsg, RoundManifestMsg, UpdateBodyMsg, encode
from fl_protocol.sealing import seal_update
from fl_protocol.signing import verify
from fl_protocol.topics import model_filter, round_topic, upload_topic
from tests.aggregator.desk import GRAPH_DIGEST, MemoryJournal, VirtualClock, device_key
from tests.aggregator.quadratics import Quadratic, Vector
from tests.fl_protocol.examples import AGGREGATOR_KEY, TASK, TENANT

PUBLIC = AGGREGATOR_KEY.public_key()


class ObservedBroker(VirtualBroker):
    """A broker that remembers what was published, retained."""

    def __init__(self) -> None:
        super().__init__(maximum_packet_bytes=2048)
        self.published: list[tuple[str, bytes]] = []

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        if retain:
            self.published.append((topic, payload))
        super().publish(topic, payload, retain=retain)


def small_task(*, local_steps: int = 10, learning_rate: float = 0.1, **changes: Any) -> TaskConfig:
    plan = PlanConfig(
        sampling_rate=1.0,
        local_steps=local_steps,
        learning_rate=learning_rate,
        l2_norm_clip=1.0,
        noise_multiplier=0.0,
        expected_batch_size=1.0,
        control_variates=True,
    )
    settings: dict[str, Any] = {
        "name": TASK,
        "bundle": "unused",
        "publisher_key": "unused",
        "plan": plan,
        "rounds": 4,
        "goal": 3,
        "minimum_cohort": 3,
        "round_duration_s": 60.0,
        "kem": "x25519",
        "population": 5,
    }
    return TaskConfig(**{**settings, **changes})


@dataclass
class SmallStudy:
    """See the module docstring; every round everybody in `sampled` takes part."""

    folder: Path
    devices: list[Quadratic]
    initial: NDArray[np.float32]
    task: TaskConfig = field(default_factory=small_task)
    clock: VirtualClock = field(default_factory=VirtualClock)
    journal: MemoryJournal = field(default_factory=MemoryJournal)
    broker: ObservedBroker = field(default_factory=ObservedBroker)

    def __post_init__(self) -> None:
        self.own: list[Vector] = [np.zeros(len(self.initial)) for _ in self.devices]
        self._sent = 0
        self.daemon = self.start()
        for index in range(len(self.devices)):
            key = device_key(f"watch-{index}").public_key().public_bytes_raw()
            self.daemon.store.add_device(f"watch-{index}", key, 0.0)

    def start(self) -> AggregatorDaemon:
        """Start the daemon, again after a crash perhaps, on the database as it is."""
        store = AggregatorStore(f"sqlite:///{self.folder / 'aggregator.db'}", TASK)
        store.create_task(GRAPH_DIGEST, self.initial)
        self.daemon = AggregatorDaemon(
            tenant=TENANT,
            task=self.task,
            graph_digest=GRAPH_DIGEST,
            signing_key=AGGREGATOR_KEY,
            store=store,
            transport=VirtualTransport(self.broker),
            journal=self.journal,
            entropy=lambda count: hashlib.shake_128(repr((self._sent, count)).encode()).digest(count),
            now_s=self.clock.now_s,
        )
        self.daemon.start()
        self.settle()
        return self.daemon

    def crash(self) -> None:
        """The daemon ends where it is; what it held in memory is gone."""
        transport = self.daemon.transport
        assert isinstance(transport, VirtualTransport)
        transport.drop("killed")
        self.daemon.store.close()

    def settle(self) -> None:
        """Step the daemon until it has nothing left to take."""
        for _ in range(60):
            self.daemon.step()

    def manifest(self) -> RoundManifestMsg:
        return verify(self.broker.retained[round_topic(TENANT, TASK)], RoundManifestMsg, PUBLIC)

    def fetch(self, digest: bytes) -> Vector:
        """A model or control variate from the retained chunks, each verified by itself."""
        prefix, reassembler = model_filter(TENANT, digest)[:-1], Reassembler()
        for topic, payload in self.broker.retained.items():
            if topic.startswith(prefix):
                chunk = verify(payload, ChunkMsg, PUBLIC)
                assert (chunk.digest, chunk.transfer_id) == (digest, digest[:16])
                assert topic == f"{prefix}{chunk.index}"
                if (whole := reassembler.accept(chunk, 0.0)) is not None:
                    return np.frombuffer(whole, "<f4").astype(np.float64)
        raise AssertionError(f"{digest.hex()} is not retained in full")

    def send(self, index: int) -> None:
        """One device takes part and sends its update."""
        for topic, payload in self.update_of(index):
            self.broker.publish(topic, payload, retain=False)

    def update_of(self, index: int) -> list[tuple[str, bytes]]:
        """One device fetches x and c, takes its steps, keeps its next c_i: the chunks of its update by topic."""
        manifest = self.manifest()
        assert manifest.control_digest is not None
        x, c = self.fetch(manifest.model_digest), self.fetch(manifest.control_digest)
        count, rate = manifest.plan.local_steps, manifest.plan.learning_rate
        y = self.devices[index].steps(x, c - self.own[index], count=count, rate=rate)
        change = (y - x).astype("<f4")
        self.own[index] = self.own[index] - c - change / (count * rate)
        self._sent += 1
        name, update_id = f"watch-{index}", self._sent.to_bytes(16, "big")
        envelope = seal_update(
            UpdateBodyMsg(num_parameters=len(x), values=change.tobytes()),
            manifest=manifest,
            device=name,
            update_id=update_id,
            signing_key=device_key(name),
        )
        return [
            (upload_topic(TENANT, name, update_id, chunk.index), encode(chunk))
            for chunk in split(update_id, envelope, data_bytes=500)
        ]

    def round(self, sampled: list[int]) -> None:
        for index in sampled:
            self.send(index)
        self.settle()

    def retained_digests(self) -> set[bytes]:
        """What the broker keeps chunks of."""
        prefix = model_filter(TENANT, bytes(32)).rsplit("/", 2)[0] + "/"
        topics = (topic[len(prefix) :] for topic in self.broker.retained if topic.startswith(prefix))
        return {bytes.fromhex(rest.split("/")[0]) for rest in topics}


def digest_of(values: NDArray[np.float32]) -> bytes:
    return hashlib.sha256(little_endian(values)).digest()
