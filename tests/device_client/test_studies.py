"""Which studies run, and under which name: changes wait for what is pending, and are looked for once a minute."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from device_client.config import PrivacyConfig, StudyConfig
from device_client.consent import Consents, terms_digest, terms_of
from device_client.studies import LONGEST_ABSENCE_S, LOOK_EVERY_S, NoNameError, Studies, WireName
from device_client.study_runner import StudyRunner
from firmware_sim.virtual_device import VirtualClock
from fl_protocol.broker_config import BrokerConfig
from fl_protocol.errors import ConfigError, CoveyError
from tests.device_client.one_device import START_S
from tests.device_client.ports import MemoryStore
from tests.virtual_fleet import MemoryJournal

PRIVACY = PrivacyConfig(epsilon=1.0, delta=1e-5)


def config(task: str) -> StudyConfig:
    return StudyConfig(
        tenant="clinic",
        task=task,
        broker=BrokerConfig("localhost", 1),
        bundle="x",
        publisher_key="x",
        aggregator_key="x",
    )


@dataclass
class Session:
    """The part of a session that decides whether its name may change."""

    is_settled: bool = True
    new_rounds_until_s: float | None = None

    def take_new_rounds_until(self, time_s: float) -> None:
        self.new_rounds_until_s = time_s

    def view(self) -> Any:
        return type("View", (), {"connected": True})()


@dataclass
class Runner:
    """What `Studies` needs of a runner, and what it was told."""

    study: str
    name: str
    session: Session = field(default_factory=Session)
    told: list[str] = field(default_factory=list)

    def leave(self) -> None:
        self.told.append("leave")

    def retire(self) -> None:
        self.told.append("retire")


@dataclass
class Desk:
    """Studies whose names and starts the test decides."""

    tasks: tuple[str, ...] = ("watch",)
    kind: type[Studies] = Studies
    delay_s: float = 900.0
    names: dict[str, WireName | CoveyError] = field(default_factory=dict)
    fails: dict[str, CoveyError] = field(default_factory=dict)
    started: list[Runner] = field(default_factory=list)
    connected: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clock, self.journal = VirtualClock(START_S), MemoryJournal()
        self.consents = Consents(MemoryStore())
        configs = tuple(config(task) for task in self.tasks)
        for one in configs:
            self.names.setdefault(one.study, WireName("first", START_S + 1000.0, START_S + 9000.0))
            self.consents.grant(one.study, terms=terms_digest(terms_of(one, PRIVACY)), now_s=1.0)
        self.studies = self.kind(
            configs,
            privacy=PRIVACY,
            consents=self.consents,
            wire_name=self.wire_name,
            start=self.start,
            connected=lambda one: self.connected.append(one.study),
            change_delay_s=lambda: self.delay_s,
            clock=self.clock,
            journal=self.journal,
        )

    def wire_name(self, study: StudyConfig, _now_s: float) -> WireName:
        name = self.names[study.study]
        if isinstance(name, CoveyError):
            raise name
        return name

    def start(self, study: StudyConfig, name: WireName) -> StudyRunner:
        if study.study in self.fails:
            raise self.fails[study.study]
        self.started.append(Runner(study.study, name.device))
        return cast("StudyRunner", self.started[-1])

    def after(self, seconds: float) -> None:
        self.clock.time_s += seconds
        self.studies.check()


def test_what_is_granted_starts_and_is_looked_at_once_a_minute() -> None:
    desk = Desk()
    desk.studies.check()
    assert [runner.name for runner in desk.started] == ["first"]
    desk.consents.withdraw("clinic/watch", now_s=2.0)
    desk.after(LOOK_EVERY_S - 1)
    assert desk.studies.running
    desk.after(1)
    assert not desk.studies.running
    assert desk.studies.standing_still == {"clinic/watch": "consent was withdrawn"}
    assert desk.started[0].told == ["leave"]
    desk.after(10 * LOOK_EVERY_S)
    assert len(desk.journal.named("study_stopped")) == 1


def test_it_looks_again_when_it_is_told_to_or_the_clock_is_set_back() -> None:
    desk = Desk()
    desk.studies.check()
    for change in (desk.studies.look_again, lambda: setattr(desk.clock, "time_s", START_S - 5000.0)):
        desk.consents.withdraw("clinic/watch", now_s=2.0)
        change()
        desk.studies.check()
        assert not desk.studies.running
        desk.consents.grant("clinic/watch", terms=terms_digest(terms_of(config("watch"), PRIVACY)), now_s=3.0)
        desk.studies.look_again()
        desk.studies.check()
        assert desk.studies.running


def test_new_rounds_are_taken_under_a_name_only_in_its_period() -> None:
    desk = Desk()
    desk.studies.check()
    assert desk.started[0].session.new_rounds_until_s == START_S + 1000.0
    desk.names["clinic/watch"] = WireName("second", START_S + 5000.0, START_S + 9000.0)
    desk.after(2000.0)
    desk.after(desk.delay_s)
    assert desk.started[1].session.new_rounds_until_s == START_S + 5000.0


class Impatient(Studies):
    """Broken: it changes names although something is pending."""

    def _must_change(self, study: Any, now_s: float) -> bool:
        return bool(study.name.changes_s <= now_s)


def check_a_name_changes_only_when_nothing_is_pending(kind: type[Studies]) -> None:
    desk = Desk(kind=kind)
    desk.studies.check()
    desk.names["clinic/watch"] = WireName("second", START_S + 99_999.0, START_S + 99_999.0)
    desk.started[0].session.is_settled = False
    desk.after(2000.0)  # the change is due
    assert desk.started[0].told == []
    desk.started[0].session.is_settled = True
    desk.after(LOOK_EVERY_S)
    assert desk.started[0].told[0] == "retire"
    assert not desk.studies.running
    assert "its name on the wire changes" in desk.studies.standing_still["clinic/watch"]
    desk.after(LOOK_EVERY_S)
    assert len(desk.started) == 1, "it came back at once: the two names are easily seen to be one device"
    desk.after(desk.delay_s)
    assert [runner.name for runner in desk.started] == ["first", "second"]


def test_a_name_changes_only_when_nothing_is_pending_and_after_an_absence() -> None:
    check_a_name_changes_only_when_nothing_is_pending(Studies)


def test_an_impatient_copy_is_noticed() -> None:
    with pytest.raises(AssertionError):
        check_a_name_changes_only_when_nothing_is_pending(Impatient)


def test_a_name_that_ended_is_left_whatever_is_pending() -> None:
    desk = Desk()
    desk.studies.check()
    desk.started[0].session.is_settled = False
    desk.names["clinic/watch"] = WireName("second", START_S + 99_999.0, START_S + 99_999.0)
    desk.after(9000.0)
    assert desk.started[0].told[0] == "retire"


def test_an_absence_is_never_longer_than_stated_even_if_the_clock_is_set_back() -> None:
    desk = Desk(delay_s=1e9)
    desk.studies.check()
    desk.after(2000.0)
    assert not desk.studies.running
    desk.after(LONGEST_ABSENCE_S + LOOK_EVERY_S)
    assert desk.studies.running
    desk.clock.time_s = START_S + 12_000.0
    desk.studies.look_again()
    desk.studies.check()
    assert not desk.studies.running
    desk.clock.time_s = START_S - 100_000.0
    desk.studies.look_again()
    desk.studies.check()
    assert desk.studies.running


def test_without_a_name_or_a_start_the_reason_stands_in_status_and_the_others_go_on() -> None:
    desk = Desk(
        tasks=("watch", "steps", "sleep"),
        names={"clinic/watch": NoNameError("no pseudonym: covey-device pseudonyms request")},
        fails={"clinic/steps": ConfigError("broker needs ca")},
    )
    desk.studies.check()
    assert [runner.study for runner in desk.studies.running] == ["clinic/sleep"]
    assert desk.studies.standing_still == {
        "clinic/watch": "no pseudonym: covey-device pseudonyms request",
        "clinic/steps": "broker needs ca",
    }
    desk.names["clinic/watch"] = WireName("w", START_S + 1e6, START_S + 1e6)
    del desk.fails["clinic/steps"]
    desk.after(LOOK_EVERY_S)
    assert len(desk.studies.running) == 3


def test_a_study_that_its_broker_accepted_is_told_of() -> None:
    desk = Desk()
    desk.studies.check()
    assert desk.connected == []
    desk.after(LOOK_EVERY_S)
    assert desk.connected == ["clinic/watch"]


def test_stopping_all_says_goodbye_once_and_may_be_undone() -> None:
    desk = Desk(tasks=("watch", "steps"))
    desk.studies.check()
    desk.studies.stop_all()
    desk.studies.stop_all()
    assert [runner.told for runner in desk.started] == [["leave"], ["leave"]]
    desk.studies.check()
    assert len(desk.studies.running) == 2
