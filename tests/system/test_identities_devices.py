"""Devices that join by themselves and stay: whole daemons, the real desk, virtual brokers, virtual time."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from sqlalchemy import select, update

from aggregator.enrolment import desk as desk_module
from aggregator.enrolment import service as service_module
from aggregator.store import schema
from device_client.deliveries_log import outcomes
from device_client.device import Device
from device_client.joining import joiner as joiner_module
from device_client.joining import records as records_module
from device_client.joining import renewal as renewal_module
from device_client.joining.renewal import ASK_AGAIN_S, OUT_OF_REACH_S, StudyRenewal
from device_client.joining.session import Online
from device_client.pseudonyms import Pseudonym
from device_client.status import status_text
from firmware_sim.faults.packets import FaultyTransport, PacketRates
from firmware_sim.labelled_chance import key_of
from firmware_sim.seeded_entropy import SeededEntropy
from firmware_sim.virtual_broker import VirtualBroker, VirtualTransport
from fl_protocol.enrolment import DAY_S
from fl_protocol.errors import LocalMisuseError
from fl_protocol.joining import Claim, parse_token, token_text
from fl_protocol.transport import Connected, Received, Transport
from tests.aggregator.enrolment.desks import DeskOffice
from tests.device_client.joining.rig import STUDY, DeskRig, JoiningDevice, broken_joiner, claim_of, run
from tests.device_client.one_device import OneDevice
from tests.enrolments import broken_copy
from tests.virtual_fleet import AGGREGATOR_KEY

NAMES = 12


class Enrolled:
    """A study with a desk, and one whole device that joins it.

    Args:
        module: with the code of its renewals.
        desk: with the desk's.
        period_days: how long each of its names is for.
        faults: of what passes between device and desk on the study's own broker.
    """

    def __init__(
        self,
        module: ModuleType = renewal_module,
        *,
        desk: ModuleType = desk_module,
        period_days: int = 10,
        faults: PacketRates | None = None,
    ) -> None:
        self._module = module
        self.claims, self.faults = VirtualBroker(), faults if faults is not None else PacketRates()
        self.one = OneDevice(study_settings={"watch": {"id": None, "tells_why_every_minutes": 0.0}}, desk=self.desk)
        self.script = self.one.scripts["watch"]
        self.rig = DeskRig(
            DeskOffice(desk, key=AGGREGATOR_KEY, period_days=period_days),
            clock=self.one.clock,
            broker=self.claims,
            others=(self.script.broker,),
            signs=AGGREGATOR_KEY,
        )
        self.rig.claim = claim_of(key=AGGREGATOR_KEY)
        self.calls: list[str] = []
        connect = self.one.connect

        def faulty(wanted: Any) -> Transport:
            self._connections += 1
            return FaultyTransport(
                connect(wanted), down=lambda: self.faults, up=lambda: self.faults, key=key_of(str(self._connections))
            )

        self._connections = 0
        self.one.connect = faulty  # type: ignore[method-assign]
        self.start()

    def start(self) -> None:
        """A daemon on what the device's flash holds."""
        device = self.device = self.one.restart() if self.one.lives else self.one.start()
        device.renewals[STUDY] = self._module.StudyRenewal(
            device.renewals[STUDY].joiner,
            connect=self.desk,
            may_ask=lambda: device._has_consent(STUDY),
            changed=lambda: device._thrown_out_or_back(STUDY),
            clock=self.one.clock,
            jitter=SeededEntropy(f"renewals {self.one.lives}"),
        )

    def desk(self, claim: Claim, client: str) -> Transport:
        """Where the device joins."""
        assert claim == self.rig.claim
        self.calls.append(client)
        transport = VirtualTransport(self.claims)
        self.one.transports.append(transport)
        return transport

    @property
    def renewal(self) -> StudyRenewal:
        return self.device.renewals[STUDY]

    def join(self) -> None:
        """What ``covey-device enroll`` does."""
        token = parse_token(token_text(self.rig.office.token(), self.rig.claim))
        joiner, way = self.renewal.joiner, VirtualTransport(self.claims)
        joiner.open_claim(self.rig.claim, token)
        way.open()
        while joiner.is_asking:
            while (event := way.poll(0.0)) is not None:
                if isinstance(event, Connected):
                    joiner.tell(Online("c" + "0" * 32), way)
                elif isinstance(event, Received):
                    joiner.tell(event, way)
            self.rig.service.step()
        way.close()
        assert joiner.is_enrolled
        self.start()  # a daemon that was stopped meanwhile

    def turns(self, count: int) -> None:
        """Turns of the daemon and of the desk."""
        for _ in range(count):
            self.device.step()
            self.rig.service.step()

    def until(self, holds: Callable[[], bool], *, most: int = 4000) -> None:
        for _ in range(most):
            if holds():
                return
            self.turns(1)
        raise AssertionError(f"not within {most} turns: {self.one.journal.events[-20:]}")

    def off_for(self, days: float) -> None:
        """The device is switched off, and on again."""
        self.one.kill()
        self.one.clock.time_s += days * DAY_S
        self.start()

    def operator(self, **values: Any) -> None:
        """What the study's operator does to the enrolment."""
        self.rig.office.change(lambda connection: connection.execute(update(schema.enrolments).values(**values)))

    def status(self) -> str:
        return "\n".join(status_text(self.device.status()))

    @property
    def is_connected(self) -> bool:
        return any(runner.session.view().connected for runner in self.device.studies.running)


def charged(device: Device) -> list[int]:
    """The rounds that the ledger holds."""
    return [line.round for line in device.ledger.reservations if line.purpose == "update"]


def receipted(study: Enrolled) -> None:
    """All that was sent gets its receipt, over a network that loses some of them."""
    for _ in range(6):
        study.script.receipt_all()
        study.turns(40)


def live_a_year(study: Enrolled) -> tuple[list[int], int]:
    """A year with a round every five days, and a device that is off for weeks; rounds charged, and days without a name.

    Receipts come a day late, so that updates are pending when names change.
    """
    study.join()
    off, nameless, number = {58: 22.0, 97: 16.0, 200: 30.0, 320: 5.0}, 0, 0
    day, began_s = 0, study.one.clock.time_s
    while day < 365:
        if day in off:
            # What is not delivered when its name's certificate ends is never: so nothing waits when it is switched off.
            receipted(study)
            study.off_for(off[day])
        else:
            study.one.clock.time_s = max(study.one.clock.time_s, began_s + day * DAY_S)
        day = int((study.one.clock.time_s - began_s) // DAY_S)
        study.script.receipt_all()
        if day % 5 == 0:
            number += 1
            study.script.open_round(number, lasts_s=4.5 * DAY_S)
        study.turns(150)
        nameless += not isinstance(study.device.pseudonyms[STUDY].current(study.one.clock.time_s), Pseudonym)
        day += 1
    study.one.clock.time_s += DAY_S
    receipted(study)
    return charged(study.device), nameless


def check_a_year_loses_nothing(module: ModuleType) -> None:
    study = Enrolled(module, faults=PacketRates(drop=0.1, repeat=0.1, reorder=0.1))
    rounds, nameless = live_a_year(study)
    assert nameless == 0
    assert len(rounds) == len(set(rounds)) >= 40  # of the 56 or so that were open while it was on
    found = outcomes(study.device.store)
    releases = study.device.ledger.releases
    assert len(releases) == len(rounds)
    assert {found[one.update_id] for one in releases} == {"delivered"}
    names = {one.device for one in releases}
    assert len(names) >= 25  # each under the name of its time
    granted = [one for one in study.rig.outcomes() if one == "renewed"]
    assert len(granted) >= 3
    with study.rig.office.store.database.reading() as connection:
        assert len(connection.execute(select(schema.enrolments.c.enrolment)).all()) == 1
    assert study.calls == []  # all of it on the study's own connection


def check_a_device_without_names_comes_back(module: ModuleType) -> None:
    study = Enrolled(module)
    study.join()
    ledger = len(study.device.ledger.reservations)
    study.off_for(300)
    began_s = study.one.clock.time_s
    assert study.device.pseudonyms[STUDY].current(study.one.clock.time_s).__class__ is not Pseudonym
    study.until(lambda: study.is_connected)
    assert study.one.clock.time_s - began_s < 3600
    assert len(study.calls) == 1
    assert study.rig.outcomes()[-1] == "renewed"
    assert len(study.device.ledger.reservations) == ledger
    assert "names until" in study.status()


def check_a_lost_answer_is_asked_for_under_the_next_name(module: ModuleType) -> None:
    """The first request was granted; had the desk taken the second for another, it would be too early for months."""
    study = Enrolled(desk=module)
    study.join()
    publish = study.script.broker.publish
    lost: list[str] = []

    def lose(topic: str, payload: bytes, *, retain: bool) -> None:
        if topic.endswith("/answer"):
            lost.append(topic)
        else:
            publish(topic, payload, retain=retain)

    study.script.broker.publish = lose  # type: ignore[method-assign]
    study.one.clock.time_s += 103 * DAY_S
    study.until(lambda: len(lost) >= 3)
    assert set(study.rig.outcomes()) == {"enrolled", "renewed"}
    study.one.clock.time_s += 5 * DAY_S  # days without an answer: the name has changed meanwhile
    study.script.broker.publish = publish  # type: ignore[method-assign]
    study.until(lambda: len(study.device.pseudonyms[STUDY].installed()) > NAMES)
    assert set(study.rig.outcomes()) == {"enrolled", "renewed"}
    assert len(set(lost)) == 1
    assert study.calls == []


def check_who_is_thrown_out_stops_and_keeps_everything(module: ModuleType) -> None:
    study = Enrolled(module)
    study.join()
    study.until(lambda: study.is_connected)
    study.script.open_round(1)
    study.until(lambda: len(study.device.outbox.of(STUDY)) == 1)
    lines, records = len(study.device.ledger.reservations), len(study.device.streams["default"])
    study.operator(state="quarantined", reason="ward 3 was closed")
    study.one.clock.time_s += 103 * DAY_S
    study.until(lambda: study.renewal.is_out)
    study.turns(2)
    assert study.device.studies.running == []
    assert "taken this device out of the study (this device is quarantined: ward 3 was closed)" in study.status()
    assert "recordings, ledger and what waits to be sent are kept" in study.status()
    study.start()
    study.turns(20)
    assert study.device.studies.running == []
    assert len(study.device.ledger.reservations) == lines
    assert len(study.device.streams["default"]) == records
    study.operator(state="active", reason="")
    study.one.clock.time_s += 2 * ASK_AGAIN_S
    study.until(lambda: study.is_connected)
    assert study.status().count("names until") == 1
    assert "taken this device out" not in study.status()


def check_who_is_thrown_out_of_the_broker_learns_why(module: ModuleType) -> None:
    """The broker says nothing to a certificate that was revoked; a day later the desk is asked."""
    study = Enrolled(module)
    study.join()
    study.until(lambda: study.is_connected)
    study.operator(state="revoked", reason="it was stolen")
    study.script.is_down = True
    study.start()
    began_s = study.one.clock.time_s
    study.until(lambda: study.renewal.is_out)
    assert OUT_OF_REACH_S <= study.one.clock.time_s - began_s < 1.1 * OUT_OF_REACH_S
    assert "it was stolen" in study.status()


def check_a_broker_that_is_down_costs_a_question_a_day(module: ModuleType) -> None:
    study = Enrolled(module)
    study.join()
    study.script.is_down = True
    study.start()
    began_s = study.one.clock.time_s
    study.until(lambda: study.one.clock.time_s > began_s + 7 * DAY_S, most=20_000)
    assert set(study.rig.outcomes()) == {"enrolled", "too_early"}
    assert 4 <= len(study.calls) <= 7
    assert len(set(study.calls)) == 1
    study.script.is_down = False
    study.start()
    study.until(lambda: study.is_connected)
    assert not study.renewal.is_out


def check_without_consent_nobody_is_asked(module: ModuleType) -> None:
    study = Enrolled(module)
    study.join()
    study.device.withdraw(STUDY)
    study.off_for(300)
    study.turns(2000)
    assert study.calls == []
    assert study.rig.outcomes() == ["enrolled"]


def test_a_device_under_a_clock_that_is_years_ahead_is_as_before_when_it_is_right() -> None:
    study = Enrolled()
    study.join()
    study.one.clock.time_s += 3650 * DAY_S
    study.claims.is_down = study.script.is_down = True  # whose certificates have ended, by this clock
    study.start()
    study.turns(300)
    study.one.clock.time_s -= 3650 * DAY_S
    study.claims.is_down = study.script.is_down = False
    study.start()
    study.until(lambda: study.is_connected)
    assert len(study.device.pseudonyms[STUDY].installed()) == NAMES


RENEWALS: list[tuple[Callable[[ModuleType], None], tuple[str, str]]] = [
    (check_a_year_loses_nothing, ("lasts_s - RENEWED_PERIODS *", "lasts_s + RENEWED_PERIODS *")),
    (check_a_device_without_names_comes_back, ("if not (is_lost or has_no_name) or", "if not is_lost or")),
    (check_who_is_thrown_out_stops_and_keeps_everything, ("self._changed()", "pass")),
    (
        check_who_is_thrown_out_stops_and_keeps_everything,
        ("waits = happened_within(ASK_AGAIN_S, state.refusal.at_s, now_s)", "waits = True; return now_s + 1e9"),
    ),
    (check_who_is_thrown_out_of_the_broker_learns_why, ("if not (is_lost or has_no_name) or", "if not has_no_name or")),
    (
        check_a_broker_that_is_down_costs_a_question_a_day,
        ("self.joiner.session.is_told_to_wait(now_s):\n            return", "False:\n            return"),
    ),
    (check_without_consent_nobody_is_asked, ("if not self._may_ask() or not", "if not")),
]


@pytest.mark.parametrize("check", dict.fromkeys(check for check, _ in RENEWALS))
def test_renewals_hold_to_it(check: Callable[[ModuleType], None]) -> None:
    check(renewal_module)


@pytest.mark.parametrize(("check", "change"), RENEWALS)
def test_renewals_that_do_not_are_caught(check: Callable[[ModuleType], None], change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check(broken_copy("device_client.joining.renewal", change))


def test_a_lost_answer_is_asked_for_under_the_next_name() -> None:
    check_a_lost_answer_is_asked_for_under_the_next_name(desk_module)


def test_a_desk_that_takes_it_for_another_request_is_caught() -> None:
    with pytest.raises(AssertionError):
        check_a_lost_answer_is_asked_for_under_the_next_name(
            broken_copy("aggregator.enrolment.desk", ("and _is_for(given, request)", "and False"))
        )


def test_a_daemon_that_is_killed_at_every_turn_is_renewed_once() -> None:
    study = Enrolled()
    study.join()
    study.one.clock.time_s += 103 * DAY_S
    kills = 0
    while len(study.device.pseudonyms[STUDY].installed()) == NAMES:
        assert kills < 100
        study.turns(1 + kills % 3)
        study.start()
        kills += 1
    assert kills >= 2
    study.turns(20)
    assert not study.renewal.joiner.is_asking
    assert len(study.device.pseudonyms[STUDY].installed()) <= 2 * NAMES
    assert set(study.rig.outcomes()) == {"enrolled", "renewed"}
    with study.rig.office.store.database.reading() as connection:
        assert len(connection.execute(select(schema.audit_entries.c.number)).all()) == 2


def test_device_and_desk_go_by_the_same_number_of_periods() -> None:
    assert records_module.RENEWED_PERIODS == desk_module.RENEWED_PERIODS


def switched_on_at_once(
    count: int,
    *,
    a_minute: int,
    faults: PacketRates,
    joiner: ModuleType = joiner_module,
    service: ModuleType = service_module,
) -> None:
    """Devices that join at the same moment are all enrolled, each once, within three times what the pacing takes."""
    rig = DeskRig(a_minute=a_minute, faults=faults, pacing=service.Pacing)
    rig.office.quota("ward-3", count)
    devices = [JoiningDevice(rig, f"device {number}", module=joiner) for number in range(count)]
    for device in devices:
        device.joiner.open_claim(rig.claim, rig.token())
    run(rig, *devices, until=lambda: not any(one.joiner.is_asking for one in devices), most_s=3 * 60 * count / a_minute)
    assert [one.outcome for one in devices] == [""] * count
    assert all(len(one.names.installed()) == 3 for one in devices)
    ids = [name.id for one in devices for name in one.names.installed()]
    assert len(set(ids)) == 3 * count
    with rig.office.store.database.reading() as connection:
        assert len(connection.execute(select(schema.enrolments.c.enrolment)).all()) == count


def test_two_hundred_devices_that_are_switched_on_at_once_are_all_enrolled() -> None:
    switched_on_at_once(200, a_minute=20, faults=PacketRates(drop=0.1, repeat=0.1, reorder=0.1))


def test_a_device_that_takes_busy_for_a_refusal_is_caught() -> None:
    joiner = broken_joiner(('if answer.outcome in {"busy", "too_early"}:', "if False:"))
    with pytest.raises(AssertionError):
        switched_on_at_once(30, a_minute=6, faults=PacketRates(), joiner=joiner)


def test_a_desk_that_sends_everybody_away_is_caught() -> None:
    service = broken_copy(
        "aggregator.enrolment.service", ("min(self._most, self._left + gained), now_s", "self._left, now_s")
    )
    with pytest.raises(AssertionError):
        switched_on_at_once(30, a_minute=6, faults=PacketRates(), service=service)


def test_a_renewal_needs_an_enrolment() -> None:
    device = JoiningDevice(DeskRig())
    with pytest.raises(LocalMisuseError, match="expected an enrolment"):
        device.joiner.open_renewal()
