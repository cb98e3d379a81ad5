"""Makes a device of a fleet from its record: the real `Device` over virtual hardware, with seeded randomness."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import simpy
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from device_client.config import DeviceConfig, StudyConfig
from device_client.device import Device
from device_client.device_store import create_identity
from device_client.ports import Graph
from device_client.training import LocalTraining, Records, Trainer
from firmware_sim.attackers.plan import AttackPlan
from firmware_sim.attackers.training import HostileTrainer, Memory
from firmware_sim.fidelity import EmptyTrainer, NoGraph, TimedGraph
from firmware_sim.fleet.diary import Diary
from firmware_sim.fleet.edge import ShardEdge
from firmware_sim.fleet.living import FleetBell, Living
from firmware_sim.fleet.record import DeviceRecord, packed, unpacked
from firmware_sim.fleet.surroundings import Surroundings
from firmware_sim.fleet.windows import Registration
from firmware_sim.hand_over import HandOver
from firmware_sim.seeded_entropy import SeededEntropy
from firmware_sim.virtual_device import VirtualHardware, virtual_device
from fl_protocol.bundle import ModelBundle
from fl_protocol.errors import LocalMisuseError

_HONEST = AttackPlan((), seed=0)


@dataclass(frozen=True)
class DeviceMaker:
    """What the devices of a shard have in common.

    Args:
        seed: of the fleet.
        config: a device's configuration, given its name on the wire.
        bundle: verified.
        graph: loaded once, and used by one device at a time; None where no model is trained.
        records: what a device's wearer records between two moments of the shard's time, minus infinity for the time
            before the first.
        aggregator_key: that all are pinned to.
        began_s: Unix seconds at which the shard's time begins.
        attacks: which of the devices are hostile.
        is_sealed: whether updates are sealed; else their values are handed over in memory.
    """

    seed: str
    config: Callable[[str], DeviceConfig]
    bundle: ModelBundle
    graph: Graph | None
    records: Callable[[int, float, float], Records] | None
    aggregator_key: Ed25519PublicKey
    began_s: float
    attacks: AttackPlan = _HONEST
    is_sealed: bool = True

    def start(
        self,
        record: DeviceRecord,
        surroundings: Surroundings,
        *,
        environment: simpy.Environment,
        edge: ShardEdge,
        journal: Diary,
    ) -> tuple[Living, list[Registration]]:
        """A device whose daemon starts: from its flash, or new, and then enrolled and granted what it was made for."""
        record.lives += 1
        is_new, config = not record.flash, self.config(record.name)
        life = f"{self.seed} {record.name} {record.lives}"  # no two lives draw the same
        flash, counter, bell = unpacked(record.flash), unpacked(record.counter), FleetBell(environment)
        stopwatch, hand_over = Stopwatch(surroundings.compute_s), HandOver(record.vectors, edge.models)
        at_work = AtWork()
        surroundings.prepare(flash)
        hardware = VirtualHardware(
            flash=flash,
            counter_flash=counter,
            store_key=hashlib.sha256(record.name.encode()).digest(),
            clock=surroundings.clock,
            board=surroundings.board,
            entropy=SeededEntropy(life),
            nonces=SeededEntropy(f"{life} nonces"),
            jitter=SeededEntropy(f"{life} session"),
            connect=lambda _wanted: surroundings.connect(edge, bell.ring),
            journal=journal,
            bell=bell,
            trainer=self._trainer(stopwatch, record, environment, counter, at_work),
        )
        if not self.is_sealed:
            hardware = replace(hardware, sealer=hand_over.seal, vectors=hand_over, downloads=hand_over.download)
        try:
            device = at_work.device = self._device(config, hardware, stopwatch, surroundings)
        except Exception:  # a daemon that does not start finds the same flash when it is started again
            record.flash, record.counter = packed(flash.image()), packed(counter.image())
            raise
        enrolled = [self._enrol(device, study) for study in config.studies] if is_new else []
        living = Living(
            record=record,
            device=device,
            flash=flash,
            counter=counter,
            bell=bell,
            take_compute_s=stopwatch.take,
            surroundings=surroundings,
            record_until=lambda to_s: self._record(device, record, to_s),
            count_awake=journal.count_awake,
            hand_over=hand_over,
        )
        return living, enrolled

    def _device(
        self, config: DeviceConfig, hardware: VirtualHardware, stopwatch: Stopwatch, surroundings: Surroundings
    ) -> Device:
        """The daemon on its hardware. Raises CoveyError."""
        return virtual_device(
            config,
            hardware,
            bundle=lambda _study: self.bundle,
            graph=lambda _bundle: self._graph(stopwatch, surroundings),
            aggregator_key=self.aggregator_key,
        )

    def _record(self, device: Device, record: DeviceRecord, to_s: float) -> None:
        """Store what the wearer has recorded since it was done last."""
        if self.records is not None and to_s > record.recorded_until_s:
            wearer = self.attacks.leader_of(record.index, record.name)
            records = self.records(wearer, record.recorded_until_s, to_s)
            record.recorded_until_s = to_s
            if len(records):
                device.add(records.x, records.y)

    def _enrol(self, device: Device, study: StudyConfig) -> Registration:
        """Make a device's identity in a study, and grant it."""
        key = create_identity(device.store, study.study, SeededEntropy(f"{self.seed} {study.id} identity"))
        device.grant(study.study)
        return Registration(str(study.id), key.public_key().public_bytes_raw())

    def _trainer(
        self,
        stopwatch: Stopwatch,
        record: DeviceRecord,
        environment: simpy.Environment,
        memory: Memory,
        at_work: AtWork,
    ) -> Trainer:
        """What does the local steps."""
        if self.graph is None:
            return EmptyTrainer(self.bundle.manifest.train_flops, stopwatch.computed)
        attacks = self.attacks.attacks_of(record.index, record.name)
        if not attacks:
            return LocalTraining
        return HostileTrainer(
            LocalTraining,
            attacks,
            elapsed_s=lambda: float(environment.now),
            round_number=at_work.round_number,
            memory=memory,
            seed=self.seed,
            labels=len(self.bundle.manifest.label.names),
        )

    def _graph(self, stopwatch: Stopwatch, surroundings: Surroundings) -> Graph:
        """The graph, whose calls take this device's time. Raises GraphError."""
        manifest = self.bundle.manifest
        surroundings.check_memory(manifest.train_arena_bytes)
        if self.graph is None:
            return NoGraph(manifest.batch_size)
        return TimedGraph(self.graph, manifest.train_flops, stopwatch.computed)


class AtWork:
    """Which round a device works on, by the note that it makes before it begins to compute.

    Attributes:
        device: None until it is made; nothing is computed before.
    """

    device: Device | None = None

    def round_number(self) -> int:
        """Of the manifest that the work in the outbox names. Raises LocalMisuseError: there is no such work."""
        device = self.device
        if device is not None:
            for work in (device.outbox.work(study.study) for study in device.config.studies):
                if work is not None:
                    return work.decoded_manifest().round
        raise LocalMisuseError("round_number: expected a device that has begun a round, this one has not")


class Stopwatch:
    """Adds up how long computing takes.

    Args:
        compute_s: seconds that so many floating-point operations take now.
    """

    def __init__(self, compute_s: Callable[[float], float]) -> None:
        self._compute_s, self._total_s = compute_s, 0.0

    def computed(self, flop: float) -> float:
        """Something was computed; how long it took, seconds."""
        took_s = self._compute_s(flop)
        self._total_s += took_s
        return took_s

    def take(self) -> float:
        """How long it took since the last call."""
        total_s, self._total_s = self._total_s, 0.0
        return total_s
