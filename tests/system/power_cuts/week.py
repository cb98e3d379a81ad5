"""A scripted week of one real device that loses power again and again, in virtual time, repeatable from its seed."""

from __future__ import annotations

import functools
import hashlib
import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from aggregator.certificates import certify, make_ca
from device_client.adapters.counter_file import CounterFile
from device_client.adapters.encrypted_files import EncryptedFiles
from device_client.config import (
    DeviceConfig,
    DeviceSection,
    EligibilityConfig,
    PrivacyConfig,
    RecordsConfig,
    StudyConfig,
)
from device_client.device import Connection, Device, DevicePorts
from device_client.device_store import create_identity
from device_client.eligibility import Conditions
from device_client.ports import Float32, Graph, Labels
from device_client.pseudonyms import Pseudonyms
from firmware_sim.virtual_board import VirtualBoard, scripted_days
from firmware_sim.virtual_broker import VirtualBroker
from firmware_sim.virtual_device import VirtualClock, VirtualHardware, virtual_device
from firmware_sim.virtual_flash import PowerCut, PowerCutError
from fl_protocol.broker_config import BrokerConfig
from fl_protocol.bundle import ModelBundle
from fl_protocol.enrolment import (
    IssuedCertificate,
    PseudonymRequest,
    decode_file,
    encode_file,
    periods_from,
    signed_answer,
)
from fl_protocol.errors import CoveyError
from fl_protocol.messages import TrainingPlanMsg
from fl_protocol.model_manifest import (
    BundleManifest,
    ClipGroup,
    DropoutMask,
    InputSchema,
    LabelSchema,
    LossSpec,
    ParameterSpec,
    TrainingDefaults,
)
from tests.device_client.ports import LogisticGraph
from tests.system.power_cuts.counterpart import Answers, Counterpart, RegisteredName
from tests.system.power_cuts.power_domain import Partition, Radio, formatted_flash
from tests.system.power_cuts.witness import ALL_PROMISES, Promise, Witness
from tests.virtual_fleet import AGGREGATOR_KEY, STUDY, TASK, TENANT, MemoryJournal, SeededEntropy

_HOUR_S, _DAY_S = 3600.0, 86_400.0
# A midnight UTC in which a period of two days, of pseudonyms, begins.
_MIDNIGHT_S = 2 * _DAY_S * 10_000
_STORE_KEY = hashlib.sha256(b"a wearer's store").digest()
_SAMPLES, _CHANNELS, _CLASSES = 40, 2, 4
_PERSONAL = 20
Moment = Literal["before", "during", "after"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What kind of device, study and wearer.

    Args:
        plan: changes of the rounds' plan.
        has_personal_layers: whether the last parameters stay on the device.
        rotates: whether names on the wire change, every two days.
        withdraws: whether the wearer withdraws consent, and grants it again, every other day.
        erases: whether the wearer erases the data, once.
        counts_records: whether there must be new records.
        requires_charging: whether it trains on its charger only.
        maximum_packet_bytes: of the broker.
        probability: with which a device takes part in a round.
        epsilon: budget.
        maximum_count, maximum_age_days: of records.
        days: how long it lasts.
    """

    plan: dict[str, Any] = field(default_factory=dict)
    has_personal_layers: bool = False
    rotates: bool = False
    withdraws: bool = False
    erases: bool = False
    counts_records: bool = False
    requires_charging: bool = False
    maximum_packet_bytes: int = 1600
    probability: float = 1.0
    epsilon: float = 200.0
    maximum_count: int = 60
    maximum_age_days: float = 30.0
    days: float = 7.0


VARIANTS = {
    "a fixed name": Variant(),
    "momentum and personal layers, trained on the charger": Variant(
        plan={"momentum": 0.8, "local_steps": 6}, has_personal_layers=True, requires_charging=True
    ),
    "control variates, personal layers": Variant(plan={"control_variates": True}, has_personal_layers=True),
    "pseudonyms and a coin": Variant(rotates=True, probability=0.7),
    "consent withdrawn and granted again": Variant(withdraws=True, maximum_age_days=2.0),
    "data erased": Variant(erases=True, has_personal_layers=True, plan={"control_variates": True}),
    "new records are counted, little budget": Variant(counts_records=True, probability=0.8, epsilon=14.0),
    "everything": Variant(
        plan={"control_variates": True, "local_steps": 6},
        has_personal_layers=True,
        rotates=True,
        withdraws=True,
        erases=True,
        counts_records=True,
        maximum_packet_bytes=4096,
    ),
}


@dataclass(frozen=True)
class Cuts:
    """When the power goes.

    Args:
        count: how often.
        every: operations between two cuts, on average.
        exactly: a single cut instead, at this operation after the device was set up, or never.
    """

    count: int = 20
    every: float = 80.0
    exactly: PowerCut | None = None


@dataclass(frozen=True)
class Parts:
    """What the device is made of; a broken copy exchanges one."""

    device: Callable[[DeviceConfig, DevicePorts], Device] = Device
    files: type[EncryptedFiles] = EncryptedFiles
    counter: type[CounterFile] = CounterFile


class WatchedGraph:
    """`device_client.ports.Graph` that takes its time, and is watched."""

    def __init__(self, graph: Graph, begins: Callable[[Float32], None]) -> None:
        self._graph, self._begins = graph, begins

    @property
    def batch_size(self) -> int:
        return self._graph.batch_size

    @property
    def dropout(self) -> tuple[DropoutMask, ...]:
        return self._graph.dropout

    def train(
        self, params: Float32, x: Float32, y: Labels, mask: Float32, *, clip: float, dropout: Float32 | None = None
    ) -> Float32:
        self._begins(params)
        return self._graph.train(params, x, y, mask, clip=clip, dropout=dropout)

    def evaluate(self, params: Float32, x: Float32, y: Labels, mask: Float32) -> tuple[float, float]:
        return self._graph.evaluate(params, x, y, mask)


class WakefulBell:
    """`device_client.ports.Bell` that notes for how long the device means to sleep."""

    def __init__(self) -> None:
        self.sleeps_s: float | None = None

    def ring(self) -> None:
        self.sleeps_s = 0.0

    def wait(self, timeout_s: float) -> None:
        self.sleeps_s = timeout_s


class DeviceClock(VirtualClock):
    """The device's own clock, which may be wrong."""

    error_s = 0.0

    def now_s(self) -> float:
        return max(0.0, self.time_s + self.error_s)

    def local_time_s(self) -> float:
        return self.now_s() % _DAY_S


class Week:
    """See the module docstring.

    Args:
        seed: of everything that is left to chance.
        variant: see there.
        cuts: see there.
        parts: of the device.
        watches: promises whose breach ends the week.
        bundle, graph: of a real model, in place of softmax regression.
    """

    def __init__(
        self,
        seed: int,
        variant: Variant,
        *,
        cuts: Cuts | None = None,
        parts: Parts | None = None,
        watches: frozenset[Promise] = ALL_PROMISES,
        bundle: ModelBundle | None = None,
        graph: Graph | None = None,
    ) -> None:
        self.seed, self.variant, self.parts = seed, variant, parts if parts is not None else Parts()
        self.cuts = cuts if cuts is not None else Cuts()
        self.kinds: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self._chance = Random(f"week {seed}")  # noqa: S311 - a simulation's
        self._cut_chance = Random(f"cuts of week {seed}")  # noqa: S311
        self.true, self.clock = VirtualClock(_MIDNIGHT_S), DeviceClock(_MIDNIGHT_S)
        self._cut_by_s = np.inf
        self._ends_s = _MIDNIGHT_S + variant.days * _DAY_S
        board = scripted_days(seed, midnight_s=_MIDNIGHT_S, days=math.ceil(variant.days) + 2)
        self._board = VirtualBoard(_at_home(board), self.true)
        self._bell, self._lives, self._numbers = WakefulBell(), itertools.count(1), itertools.count(1)
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._errands: list[Callable[[Device], None]] = []  # what the wearer wants done, until it is
        self._serial = itertools.count()
        self.device: Device | None = None
        self.flash = formatted_flash(f"flash of week {seed}")
        self.bundle = bundle if bundle is not None else _bundle(variant)
        self.journal = MemoryJournal()
        broker = VirtualBroker(maximum_packet_bytes=variant.maximum_packet_bytes)
        names: dict[str, RegisteredName] = {}
        self.counterpart = Counterpart(
            broker,
            _plan(variant, steps=4),
            self.bundle.graph_digest,
            self.bundle.manifest.num_shared_parameters,
            names,
            self.true.now_s,
            lambda topic, payload: self.witness.answered(topic, payload),
            lambda header, values: self.witness.took(header, values),
            seed=f"week {seed}",
            probability=variant.probability,
        )
        self.witness = Witness(
            STUDY,
            _STORE_KEY,
            lambda: self.flash.durable(),
            lambda: {name: self.flash.read(name) or b"" for name in self.flash.names()},
            self.counterpart.rounds,
            variant.maximum_count,
            variant.maximum_age_days * _DAY_S,
            counts_records=variant.counts_records,
            watches=watches,
        )
        self.radio = Radio(broker, self.witness.sent, self.witness.asked_for)
        inner = graph if graph is not None else _graph()
        self._graph = WatchedGraph(inner, self._train_step)
        self._set_up(names)
        self._write_agenda()

    @property
    def cut_count(self) -> int:
        """Cuts so far."""
        return sum(self.kinds.values())

    def run(self) -> Week:
        """Live through the week, then a quiet time; stop at the first broken promise."""
        self.live()
        if not self.witness.faults:
            self._quiet_time()
        return self

    def live(self) -> None:
        """Live through the week."""
        self._plan_cut()
        self._live(self._ends_s)

    def summary(self) -> str:
        """What happened, in one line, and how to see it again."""
        faults = "; ".join(f"{fault.promise}: {fault.text}" for fault in self.witness.faults[:3])
        return (
            f"week {self.seed} of {self.variant}, {self.cuts}: {self.cut_count} cuts, {dict(self.witness.seen)}, "
            f"{dict(self.outcomes)}: {faults or 'no promise broken'}"
        )

    # Setting up.

    def _set_up(self, names: dict[str, RegisteredName]) -> None:
        """A factory-new device joins the study."""
        device = self._start()
        entropy = SeededEntropy(f"keys of week {self.seed}")
        if self.variant.rotates:
            names.update(_certified(device.pseudonyms[STUDY], entropy))
        else:
            key = create_identity(device.store, STUDY, entropy).public_key()
            names["watch-0"] = RegisteredName(key.public_bytes_raw())
        device.grant(STUDY)
        self.device = device

    def _write_agenda(self) -> None:
        """All that will happen, whatever the device does."""
        days, chance, at = self.variant.days, self._chance, self._at
        for hour in (0.3 + 5.0 * number for number in range(int(24 * days / 5))):
            at(hour, functools.partial(self.counterpart.open_round, duration_s=4.2 * _HOUR_S))
            at(hour + 4.8, self.counterpart.close_round)
        for _ in range(round(14 * days)):
            at(chance.uniform(0, 24 * days), functools.partial(self._record, chance.randint(1, 3)))
        for _ in range(round(0.7 * days)):
            hour = chance.uniform(0, 24 * days)
            at(hour, self.radio.go_down)
            at(hour + chance.choice((0.1, 0.5, 2.0, 7.0)), self.radio.come_up)
        for day in range(1, round(days) - 1, 2) if self.variant.withdraws else ():
            # While the network is gone, so that something may be pending.
            hour = 24 * day + chance.uniform(3, 20)
            at(hour - 3, self.radio.go_down)
            at(hour, lambda: self._errands.append(self._withdraw))
            at(hour + 0.1, self.radio.come_up)
            at(hour + chance.uniform(0.2, 20), lambda: self._errands.append(self._grant))
        if self.variant.erases:
            at(chance.uniform(30, 24 * days - 40), lambda: self._errands.append(self._erase))
        at(24 * days * 0.55, lambda: self._errands.append(self._restart))

    def _at(self, hour: float, what: Callable[[], None]) -> None:
        """Put something on the agenda."""
        heapq.heappush(self._agenda, (_MIDNIGHT_S + hour * _HOUR_S, next(self._serial), what))

    # Living.

    def _live(self, until_s: float) -> None:
        """Let time pass; what breaks the device's power or itself ends one of its lives."""
        while self.true.time_s < until_s and not self.witness.faults:
            try:
                self._turn()
            except PowerCutError as cut:
                self._power_is_cut(str(cut))
            except CoveyError as error:
                self.witness.fault("store", f"{type(error).__name__}: {error}")
                return  # it would say so at every start

    def _turn(self) -> None:
        """Whatever is due, and one turn of the device."""
        self.witness.clock_says(self.clock.now_s())
        while self._agenda and self._agenda[0][0] <= self.true.time_s:
            heapq.heappop(self._agenda)[2]()
        self.counterpart.step()
        self._hurry_cut()
        if self.device is None:
            self.device = self._start()
        while self._errands:
            self._errands[0](self.device)
            self._errands.pop(0)
        self._bell.sleeps_s, self.radio.was_used = None, False
        self.device.step()
        self.witness.after_turn(self.device)
        if self._bell.sleeps_s is not None and not self.radio.was_used:
            self._sleep(self._bell.sleeps_s)

    def _sleep(self, wanted_s: float) -> None:
        """Sleep as long as the device wants; longer when nothing but its sensors could change anything."""
        is_calm = not self.counterpart.is_busy and not self.device_is_busy
        longest_s = self._agenda[0][0] - self.true.time_s if self._agenda else np.inf
        self._pass(min(max(wanted_s, 300.0 if is_calm else 1.0), max(longest_s, 1.0)))

    @property
    def device_is_busy(self) -> bool:
        """Whether something is on its way."""
        running = self.device.studies.running if self.device is not None else []
        return any(runner.session.view().pending or runner.work is not None for runner in running)

    def _pass(self, duration_s: float) -> None:
        """Move both clocks."""
        self.true.time_s += duration_s
        self.clock.time_s = self.true.time_s
        if self.clock.error_s < -_DAY_S:
            self.witness.under_a_wrong_clock_s += duration_s

    def _train_step(self, params: Float32) -> None:
        """Training takes its time: the charger may be pulled, a round may end."""
        self.witness.computes(params)
        self._pass(self._chance.choice((5.0, 60.0, 600.0)))

    def _quiet_time(self) -> None:
        """No cuts, a good network, a right clock, and time for everything that is still pending."""
        self.flash.power_cut = None
        self.cuts = Cuts(0)
        self.counterpart.close_round()
        self.counterpart.network = Answers(0, 0, 0, 0)
        self.radio.come_up()
        self.clock.error_s = 0.0
        self._agenda.clear()
        self._live(self.true.time_s + 12 * _HOUR_S)
        if self.device is not None and not self.witness.faults:
            self.witness.clock_says(self.clock.now_s())
            self.witness.at_the_end(self.device)

    # Lives of the device.

    def _start(self) -> Device:
        """Boot."""
        life = f"week {self.seed} life {next(self._lives)}"
        self.witness.before_boot()
        if self.parts.files is EncryptedFiles:
            files: Callable[..., EncryptedFiles] = functools.partial(_WatchedFiles, keeps=self.witness.keeps)
        else:
            files = functools.partial(_watched(self.parts.files), keeps=self.witness.keeps)
        hardware = VirtualHardware(
            flash=Partition(self.flash, "store"),
            counter_flash=Partition(self.flash, "counter"),
            store_key=_STORE_KEY,
            clock=self.clock,
            board=self._board,
            entropy=SeededEntropy(life),
            nonces=SeededEntropy(f"{life} nonces"),
            jitter=SeededEntropy(f"{life} jitter"),
            connect=self._connect,
            journal=self.journal,
            bell=self._bell,
            files=files,
            counter_file=self.parts.counter,
        )
        device = virtual_device(
            _config(self.variant),
            hardware,
            bundle=lambda _study: self.bundle,
            graph=lambda _bundle: self._graph,
            aggregator_key=AGGREGATOR_KEY.public_key(),
            kind=self.parts.device,
        )
        self.witness.booted(device)
        return device

    def _connect(self, wanted: Connection) -> Any:
        """A connection for the device."""
        return self.radio.connect(self.flash, (wanted.will_topic, wanted.will_payload))

    def _power_is_cut(self, where: str) -> None:
        """The device is off for a while, and comes up with what is left; or only its process was killed."""
        self.kinds[" ".join(where.split(", ")[1].split()[:2])] += 1
        chance, last_s = self._cut_chance, self.clock.now_s()
        self.device = None
        self.radio.lose_power()
        if chance.random() < 0.15:
            self.outcomes["killed"] += 1
            self.flash = self.flash.after_kill()
            self._pass(5.0)
        else:
            self.outcomes["power lost"] += 1
            self.flash = self.flash.after_power_cut(chance)
            self._pass(chance.choice((2.0, 20.0, 60.0, 600.0, 2 * _HOUR_S, chance.uniform(0, 16) * _HOUR_S)))
            self._clock_comes_up(last_s)
        self._plan_cut()

    def _clock_comes_up(self, last_s: float) -> None:
        """Right, at the last time it knew, or in 1970; the network's time corrects it after a while."""
        chance = self._cut_chance
        self.clock.error_s = chance.choice((0.0, 0.0, last_s - self.true.time_s, 10.0 - self.true.time_s))
        right_s = self.true.time_s + chance.choice((5.0, 300.0, 3 * _HOUR_S))
        self._at((right_s - _MIDNIGHT_S) / _HOUR_S, self._clock_is_set)

    def _clock_is_set(self) -> None:
        """The network's time."""
        self.clock.error_s = 0.0

    def _plan_cut(self) -> None:
        """When the power goes next."""
        cuts, chance = self.cuts, self._cut_chance
        if cuts.exactly is not None:
            if not self.cut_count:
                exact = cuts.exactly
                self.flash.power_cut = PowerCut(self.flash.operations + exact.at, exact.moment)
        elif self.cut_count < cuts.count:
            at = self.flash.operations + chance.randrange(0, max(2, round(2 * cuts.every)))
            self.flash.power_cut = PowerCut(at, chance.choice(("before", "during", "after")))
            self._cut_by_s = _MIDNIGHT_S + 0.92 * (self.cut_count + 1) / cuts.count * (self._ends_s - _MIDNIGHT_S)

    def _hurry_cut(self) -> None:
        """In quiet times the next cut comes earlier, so that a week has all of its own."""
        planned = self.flash.power_cut
        if planned is not None and self.cuts.exactly is None and self.true.time_s >= self._cut_by_s:
            soon = self.flash.operations + self._cut_chance.randrange(0, 9)
            self.flash.power_cut, self._cut_by_s = PowerCut(min(planned.at, soon), planned.moment), np.inf

    # What the wearer does.

    def _record(self, count: int) -> None:
        """Some windows come in, if the device is on to take them."""
        for _ in range(count if self.device is not None else 0):
            self._errands.append(functools.partial(self._store_record, next(self._numbers)))

    def _store_record(self, number: int, device: Device) -> None:
        """One window, with its number in its first sample."""
        self._errands.pop(0)  # what the power takes is not recorded again
        self._errands.insert(0, lambda _device: None)
        shape = self.bundle.manifest.input.shape
        x = np.full(shape, 0.01 * (number % 7), np.float32)
        x.reshape(-1)[0] = number
        self.witness.offers(number, self.clock.now_s())
        device.add(x, number % len(self.bundle.manifest.label.names))
        self.witness.acknowledged()

    def _withdraw(self, device: Device) -> None:
        self.witness.withdraws()
        device.withdraw(STUDY)
        self.witness.withdrew()

    def _grant(self, device: Device) -> None:
        self.witness.grants()
        device.grant(STUDY)

    def _erase(self, device: Device) -> None:
        self.witness.erases()
        device.erase_data()
        self.witness.erased()

    def _restart(self, device: Device) -> None:
        """A clean stop, as for a new version; the next turn starts it again."""
        device.close()
        self.device = self._start()


class _WatchedFiles(EncryptedFiles):
    """The store; the witness hears of each blob before it is written."""

    def __init__(self, *arguments: Any, keeps: Callable[[str, bytes], None], **named: Any) -> None:
        self._keeps = keeps
        super().__init__(*arguments, **named)

    def write(self, name: str, data: bytes) -> None:
        self._keeps(name, data)
        super().write(name, data)


def _watched(files: type[EncryptedFiles]) -> Callable[..., EncryptedFiles]:
    """The same over a broken store."""
    return type("_WatchedBrokenFiles", (_WatchedFiles, files), {})


def _at_home(script: Iterable[tuple[float, Conditions]]) -> list[tuple[float, Conditions]]:
    """A wearer's days as they are scripted."""
    return list(script)


def _plan(variant: Variant, *, steps: int) -> TrainingPlanMsg:
    """Every round's."""
    settings: dict[str, Any] = {
        "sampling_rate": 0.9,
        "local_steps": steps,
        "learning_rate": 0.2,
        "l2_norm_clip": 0.5,
        "noise_multiplier": 2.0,
        "expected_batch_size": 20.0,
    }
    return TrainingPlanMsg(**{**settings, **variant.plan})


def _config(variant: Variant) -> DeviceConfig:
    """The device's ``device.toml``."""
    study = StudyConfig(
        tenant=TENANT,
        task=TASK,
        broker=BrokerConfig("virtual", 1),
        bundle="unused",
        publisher_key="unused",
        aggregator_key="unused",
        id=None if variant.rotates else "watch-0",
    )
    return DeviceConfig(
        studies=(study,),
        device=DeviceSection(store="unused", store_key="unused"),
        privacy=PrivacyConfig(epsilon=variant.epsilon, delta=1e-5),
        eligibility=EligibilityConfig(
            require_charging=variant.requires_charging,
            require_idle=False,
            require_unmetered=False,
            minimum_new_records=1 if variant.counts_records else 0,
            new_records_noise=3.0,
        ),
        records=RecordsConfig(
            maximum_count=variant.maximum_count, maximum_age_days=variant.maximum_age_days, held_out_fraction=0.2
        ),
    )


def _graph() -> LogisticGraph:
    """Softmax regression."""
    return LogisticGraph(8, _SAMPLES * _CHANNELS, _CLASSES)


def _bundle(variant: Variant) -> ModelBundle:
    """The bundle of `_graph`; only its manifest and parameters are used."""
    count = _SAMPLES * _CHANNELS * _CLASSES
    shared = count - _PERSONAL if variant.has_personal_layers else count
    specs = (ParameterSpec("shared/kernel", (shared,), 0), ParameterSpec("own/kernel", (count - shared,), shared))
    manifest = BundleManifest(
        format=2,
        name="logistic",
        version=1,
        description="",
        data="",
        batch_size=8,
        num_parameters=count,
        num_shared_parameters=shared,
        parameters=specs[: 1 + variant.has_personal_layers],
        layers=(),
        input=InputSchema((_SAMPLES, _CHANNELS), ("x", "y"), ("1", "1"), 20.0),
        label=LabelSchema("class", tuple("abcd")),
        loss=LossSpec("softmax_cross_entropy"),
        preprocessing="",
        defaults=TrainingDefaults(0.1, 1.0, 0.0),
        norm_clips=(ClipGroup(("shared",), 1.0),),
        dropout=(),
        train_flops=1,
        train_arena_bytes=1,
        infer_params_offset=0,
    )
    params = np.linspace(-0.1, 0.1, count).astype(np.float32)
    return ModelBundle(manifest, b"no graph", b"", params, b"", np.zeros(0, np.float32))


def _certified(pseudonyms: Pseudonyms, entropy: SeededEntropy) -> dict[str, RegisteredName]:
    """Names for the week with their public signing keys, as the study's operator admits them."""
    request = decode_file(pseudonyms.prepare(count=7, entropy=entropy), PseudonymRequest)
    ca, issued = make_ca("clinic", now_s=_MIDNIGHT_S - _DAY_S), []
    periods = periods_from(_MIDNIGHT_S, period_days=2, count=len(request.pseudonyms))
    for one, period in zip(request.pseudonyms, periods, strict=True):
        key = x509.load_pem_x509_csr(one.csr.encode()).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        certificate = certify(ca, one.id, key, not_before_s=period.not_before_s, not_after_s=period.not_after_s)
        issued.append(IssuedCertificate(id=one.id, certificate=certificate.decode()))
    answer = signed_answer(
        tenant=TENANT, task=TASK, ca=ca.certificate.decode(), certificates=issued, key=AGGREGATOR_KEY
    )
    pseudonyms.install(encode_file(answer), aggregator_key=AGGREGATOR_KEY.public_key())
    return {
        one.id: RegisteredName(bytes.fromhex(one.signing_key), period.not_before_s, period.not_after_s)
        for one, period in zip(request.pseudonyms, periods, strict=True)
    }
