"""Rubbish from outside fills no journal, and obeys no terminal."""

from __future__ import annotations

import pytest

from device_client import refusals, session
from device_client.refusals import AT_ONCE, EVERY_S, Refusals, printable
from fl_protocol.errors import RefusalReason
from fl_protocol.signing import sign
from fl_protocol.topics import down_topic, model_topic, round_topic
from fl_protocol.transport import Disconnected, Received
from tests.device_client.delivery_line import nack
from tests.device_client.ports import DEVICE, TASK, TENANT
from tests.device_client.session_driver import AGGREGATOR, Driver, notes, some_update

ESCAPES = "\x1b[2J\x1b]0;owned\x07 \u202egnp.exe\r\n\x9b"


def told(driver: Driver, topic: str, count: int) -> list[dict[str, object]]:
    """What is told of that many bad messages, all at the same time."""
    actions = [action for _ in range(count) for action in driver.tell(Received(topic, b"\x80"))]
    assert set(notes(actions)) <= {"message_refused"}
    return [action.fields for action in actions]  # type: ignore[union-attr]


def test_a_flood_of_bad_messages_is_told_once_a_minute_and_counted() -> None:
    driver, topic = Driver(), round_topic(TENANT, TASK)
    assert len(told(driver, topic, 500)) == AT_ONCE
    driver.now_s += EVERY_S
    assert [fields.get("untold") for fields in told(driver, topic, 500)] == [500 - AT_ONCE]
    total = 0
    for _ in range(60):  # an hour
        driver.now_s += EVERY_S
        total += len(told(driver, topic, 100))
    assert total == 60


def test_a_session_that_tells_of_all_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "EVERY_S", 1e-9)
    with pytest.raises(AssertionError):
        test_a_flood_of_bad_messages_is_told_once_a_minute_and_counted()


def test_a_flood_of_one_kind_hides_no_other() -> None:
    driver = Driver()
    driver.open_round()
    told(driver, round_topic(TENANT, TASK), 500)
    assert len(told(driver, down_topic(TENANT, DEVICE, "receipt"), 1)) == 1
    digest = driver.session._round.manifest.model_digest  # type: ignore[union-attr]
    assert len(told(driver, model_topic(TENANT, digest, 0), 1)) == 1


def test_a_clock_that_is_set_back_silences_nothing_for_long() -> None:
    limited = Refusals()
    for _ in range(AT_ONCE):
        limited.note("round", topic="t", reason="r", now_s=1e9)
    assert limited.note("round", topic="t", reason="r", now_s=1e9) == []
    limited.note("round", topic="t", reason="r", now_s=1000.0)
    assert limited.note("round", topic="t", reason="r", now_s=1000.0 + EVERY_S)


def test_what_is_told_holds_nothing_that_a_terminal_obeys() -> None:
    assert printable(ESCAPES, length=200).isprintable()
    assert printable("±3 °C, „quoted“", length=200) == "±3 °C, „quoted“"
    assert len(printable(ESCAPES * 100, length=50)) == 50


def told_of_escapes() -> str:
    """Everything a session tells after every text that comes from outside was full of escapes."""
    driver = Driver()
    driver.open_round()
    update = some_update()
    driver.session._deliveries.add(update)
    refusal = nack(update, RefusalReason.WRONG_ROUND, detail=ESCAPES)
    actions = [
        *driver.tell(Received(round_topic(TENANT, TASK), b"\x81\xaa" + ESCAPES.encode()[:10] + b"\x01")),
        *driver.tell(Received(model_topic(TENANT, b"\x01" * 32, 0)[:-1] + ESCAPES, b"\x80")),
        *driver.tell(Received(down_topic(TENANT, DEVICE, "nack"), sign(refusal, AGGREGATOR))),
        *driver.tell(Disconnected(ESCAPES)),
    ]
    assert {"update_refused", "disconnected", "message_refused"} <= set(notes(actions))
    fields = [value for action in actions for value in getattr(action, "fields", {}).values()]
    return " ".join(str(value) for value in fields) + driver.session.view().refused


def test_no_text_from_outside_is_told_unescaped() -> None:
    assert told_of_escapes().isprintable()


def test_a_session_that_passes_text_on_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "printable", lambda text, length: text[:length])
    assert not told_of_escapes().isprintable()
