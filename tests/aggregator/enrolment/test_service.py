"""The desk's process takes up studies that are created while it runs."""

from __future__ import annotations

from hashlib import sha256
from types import ModuleType

import pytest

from aggregator.enrolment import service as service_module
from aggregator.errors import DatabaseError
from firmware_sim.virtual_broker import VirtualBroker, VirtualTransport
from fl_protocol.errors import ConfigError
from fl_protocol.joining import EnrolmentAnswerMsg, StudyPins, opened_answer, sealed_request, signed_request
from fl_protocol.sealing import RoundKey
from fl_protocol.topics import enrolment_topic
from fl_protocol.transport import Received
from tests.aggregator.enrolment.desks import PINS, Asking, DeskOffice
from tests.enrolments import AGGREGATOR, NOW_S, TASK, TENANT, broken_copy

OPENS = RoundKey("x25519", b"\x21" * 32)


class Lines:
    """A journal that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, object]]] = []

    def write(self, event: str, *, at_s: float, **fields: object) -> None:
        del at_s
        self.told.append((event, fields))

    def count(self, event: str) -> int:
        return sum(name == event for name, _ in self.told)


class RunningDesk:
    """A desk that begins with no study, in virtual time, and a device's line to it.

    Attributes:
        studies: that there are; or what the look at them raises.
    """

    def __init__(self, module: ModuleType = service_module) -> None:
        self.office, self.device, self.journal = DeskOffice(), Asking("a"), Lines()
        self.studies: dict[str, StudyPins] | Exception = {}
        self.office.desk.pins.clear()
        self.now_s = NOW_S
        broker = VirtualBroker()
        self.line = VirtualTransport(broker)
        self.service = module.DeskService(
            self.office.desk,
            tenant=TENANT,
            keys=module.DeskKeys(OPENS, AGGREGATOR),
            transports=[VirtualTransport(broker)],
            journal=self.journal,
            now_s=lambda: self.now_s,
            pacing=module.Pacing(600),
            wait=lambda _longest_s: None,
            studies=self._found,
        )
        self.service.start()
        self.line.open()
        self.line.subscribe(enrolment_topic(TENANT, self.device.client, "answer"))
        self.let_pass(0.0)

    def _found(self) -> dict[str, StudyPins]:
        if isinstance(self.studies, Exception):
            raise self.studies
        return self.studies

    def let_pass(self, seconds: float) -> None:
        self.now_s += seconds
        self.service.step()

    def ask(self, signed: bytes) -> EnrolmentAnswerMsg | None:
        """The answer to a request, if one comes at once."""
        client = self.device.client
        sealed = sealed_request(signed, OPENS.recipient(), tenant=TENANT, task=TASK, client=client)
        self.line.publish(enrolment_topic(TENANT, client, "request"), sealed)
        self.let_pass(0.0)
        while (event := self.line.poll(0.0)) is not None:
            if isinstance(event, Received):
                return opened_answer(
                    event.payload,
                    self.device.answer_key,
                    client=client,
                    request_digest=sha256(signed).digest(),
                    aggregator=AGGREGATOR.public_key(),
                )
        return None


def check_a_new_study_is_taken_up(module: ModuleType) -> None:
    desk = RunningDesk(module)
    signed = signed_request(desk.device.request(desk.office.token()), desk.device.renewal)
    assert desk.ask(signed) is None
    desk.studies = {TASK: PINS}
    desk.let_pass(module.LOOK_FOR_STUDIES_EVERY_S)
    answer = desk.ask(signed)
    assert answer is not None
    assert (answer.outcome, answer.pins) == ("enrolled", PINS)
    assert desk.journal.count("enrolment_study_taken_up") == 1


def test_a_new_study_is_taken_up() -> None:
    check_a_new_study_is_taken_up(service_module)


@pytest.mark.parametrize(
    "change",
    [
        ("self._desk.pins[task] = found[task]", "pass"),
        ("        self._look_for_studies()\n", ""),
    ],
)
def test_a_desk_that_has_to_be_started_again_is_caught(change: tuple[str, str]) -> None:
    copy = broken_copy("aggregator.enrolment.service", change)
    with pytest.raises(AssertionError):
        check_a_new_study_is_taken_up(copy)


@pytest.mark.parametrize(
    ("error", "event"),
    [
        (ConfigError("task steps: expected a publisher_key"), "enrolment_study_unreadable"),
        (DatabaseError("disk full"), "enrolment_degraded"),
    ],
)
def test_a_look_that_fails_keeps_the_studies_that_are_there_and_is_told_once(error: Exception, event: str) -> None:
    desk = RunningDesk()
    desk.studies = {TASK: PINS}
    desk.let_pass(3.0)
    desk.studies = error
    for _ in range(3):
        desk.let_pass(3.0)
    assert desk.ask(signed_request(desk.device.request(desk.office.token()), desk.device.renewal)) is not None
    assert desk.journal.count(event) == 1, desk.journal.told
