"""A scripted week of one real device that loses power again and again, in virtual time, repeatable from its seed."""

from __future__ import annotations

import functools
import hashlib
import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import numpy as np

from aggregator.store.devices import RegisteredKey
from device_client.adapters.counter_file import CounterFile
from device_client.adapters.encrypted_files import EncryptedFiles
from device_client.config import (
    DeviceConfig,
)
from device_client.device import Device
from device_client.device_ports import Connection, DevicePorts
from device_client.device_store import create_identity
from device_client.errors import StoreError
from device_client.ports import Float32, Graph
from firmware_sim.board.virtual_board import VirtualBoard, first_state
from firmware_sim.profiles.catalogue import load_profile
from firmware_sim.virtual_broker import VirtualBroker
from firmware_sim.virtual_device import VirtualClock, VirtualHardware, virtual_device
from firmware_sim.virtual_flash import PowerCut, PowerCutError
from firmware_sim.wearer.habits import Habits
from firmware_sim.wearer.wearer import Wearer
from fl_protocol.bundle import ModelBundle
from fl_protocol.errors import CoveyError
from fl_protocol.messages import UpdateHeaderMsg
from tests.system.power_cuts.counterpart import Answers, Counterpart
from tests.system.power_cuts.power_domain import Partition, Radio, formatted_flash
from tests.system.power_cuts.variants import (
    MIDNIGHT_S,
    Variant,
    certified_names,
    config_of,
    logistic_bundle,
    logistic_graph,
    plan_of,
)
from tests.system.power_cuts.watched_ports import (
    DeviceClock,
    HeardJournal,
    WakefulBell,
    WatchedGraph,
    watched_files,
)
from tests.system.power_cuts.witness import ALL_PROMISES, Promise, Witness
from tests.virtual_fleet import AGGREGATOR_KEY, STUDY, SeededEntropy

_HOUR_S, _DAY_S = 3600.0, 86_400.0
_STORE_KEY = hashlib.sha256(b"a wearer's store").digest()
Moment = Literal["before", "during", "after"]


_WATCH = load_profile("smartwatch")
_HABITS = Habits(forgets_charger=0.2, docked=0.0)


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
        self.true, self.clock = VirtualClock(MIDNIGHT_S), DeviceClock(MIDNIGHT_S)
        self._cut_by_s = np.inf
        self._ends_s = MIDNIGHT_S + variant.days * _DAY_S
        wearer = Wearer(seed, 0, _HABITS)
        state = first_state(_WATCH, wearer, time_s=MIDNIGHT_S, seed=seed, index=0)
        self._board = VirtualBoard(_WATCH, wearer, clock=self.true, state=state)
        self._bell, self._lives, self._numbers = WakefulBell(), itertools.count(1), itertools.count(1)
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._errands: list[Callable[[Device], None]] = []  # what the wearer wants done, until it is
        self._serial = itertools.count()
        self.device: Device | None = None
        self.flash = formatted_flash(f"flash of week {seed}")
        self.bundle = bundle if bundle is not None else logistic_bundle(variant)
        self.journal = HeardJournal(heard=self._trouble)
        broker = VirtualBroker(maximum_packet_bytes=variant.maximum_packet_bytes)
        names: dict[str, RegisteredKey] = {}
        self.counterpart = Counterpart(
            broker,
            plan_of(variant, steps=4),
            self.bundle.graph_digest,
            self.bundle.manifest.num_shared_parameters,
            names,
            self.true.now_s,
            self._answered,
            self._took,
            seed=f"week {seed}",
            probability=variant.probability,
        )
        self.witness = Witness(
            STUDY,
            _STORE_KEY,
            self._durable,
            lambda: {name: self.flash.read(name) or b"" for name in self.flash.names()},
            self.counterpart.rounds,
            variant.maximum_count,
            variant.maximum_age_days * _DAY_S,
            counts_records=variant.counts_records,
            watches=watches,
        )
        self.radio = Radio(broker, self.witness.sent, self.witness.asked_for)
        inner = graph if graph is not None else logistic_graph()
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

    # What others are told, by the flash and the witness that there are by then.

    def _trouble(self, text: str) -> None:
        self.witness.fault("store", text)

    def _durable(self) -> dict[str, bytes]:
        return self.flash.durable()

    def _answered(self, topic: str, payload: bytes) -> None:
        self.witness.answered(topic, payload)

    def _took(self, header: UpdateHeaderMsg, values: Float32) -> None:
        self.witness.took(header, values)

    # Setting up.

    def _set_up(self, names: dict[str, RegisteredKey]) -> None:
        """A factory-new device joins the study."""
        device = self._start()
        entropy = SeededEntropy(f"keys of week {self.seed}")
        if self.variant.rotates:
            names.update(certified_names(device.pseudonyms[STUDY], entropy))
        else:
            key = create_identity(device.store, STUDY, entropy).public_key()
            names["watch-0"] = RegisteredKey(key.public_bytes_raw())
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
        if self.variant.is_away:
            at(40 + chance.uniform(0, 8), self.radio.go_down)
            at(125, self.radio.come_up)
        for _ in range(0 if self.variant.is_away else round(0.7 * days)):
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
        for _ in range(6 if self.variant.card_fills else 0):
            hour = chance.uniform(10, 24 * days - 12)
            at(hour, functools.partial(self._leave_room, chance.randrange(0, 3000)))
            at(hour + chance.choice((0.5, 4.0, 9.0)), functools.partial(self._leave_room, None))
        at(24 * days * 0.55, lambda: self._errands.append(self._restart))

    def _at(self, hour: float, what: Callable[[], None]) -> None:
        """Put something on the agenda."""
        heapq.heappush(self._agenda, (MIDNIGHT_S + hour * _HOUR_S, next(self._serial), what))

    # Living.

    def _live(self, until_s: float) -> None:
        """Let time pass; what breaks the device's power or itself ends one of its lives."""
        while self.true.time_s < until_s and not self.witness.faults:
            try:
                self._turn()
            except PowerCutError as cut:
                self._power_is_cut(str(_first(cut)))
            except CoveyError as error:
                self.witness.fault("store", f"{type(error).__name__}: {error}")
                return  # it would say so at every start

    def _turn(self) -> None:
        """Whatever is due, and one turn of the device."""
        while self._agenda and self._agenda[0][0] <= self.true.time_s:
            heapq.heappop(self._agenda)[2]()
        self.witness.clock_says(self.clock.now_s())
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
        self.flash.power_cut = self.flash.capacity_bytes = None
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
        files = functools.partial(watched_files(self.parts.files), keeps=self.witness.keeps)
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
            config_of(self.variant),
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
        self._at((right_s - MIDNIGHT_S) / _HOUR_S, self._clock_is_set)

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
            self._cut_by_s = MIDNIGHT_S + 0.92 * (self.cut_count + 1) / cuts.count * (self._ends_s - MIDNIGHT_S)

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

    def _leave_room(self, num_bytes: int | None) -> None:
        """From now on the flash takes so many bytes more, or without a bound."""
        used = sum(self.flash.size(name) or 0 for name in self.flash.names())
        self.flash.capacity_bytes = None if num_bytes is None else used + num_bytes

    def _store_record(self, number: int, device: Device) -> None:
        """One window, with its number in its first sample."""
        self._errands.pop(0)  # what the power takes is not recorded again
        self._errands.insert(0, lambda _device: None)
        shape = self.bundle.manifest.input.shape
        x = np.full(shape, 0.01 * (number % 7), np.float32)
        x.reshape(-1)[0] = number
        self.witness.offers(number, self.clock.now_s())
        try:
            device.add(x, number % len(self.bundle.manifest.label.names))
        except StoreError:
            if not self.variant.card_fills:
                raise
            self.witness.refused()
        else:
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


def _first(cut: BaseException) -> BaseException:
    """The cut itself: what a `finally` still tried meets a power that is off already."""
    while isinstance(cut.__context__, PowerCutError):
        cut = cut.__context__
    return cut
