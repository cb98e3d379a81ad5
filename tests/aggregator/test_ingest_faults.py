"""An ingest worker whose database fails at every attempt: what it left behind never fills up the broker's window."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from aggregator.errors import DatabaseError
from fl_protocol.transport import Received
from tests.aggregator.desk import Desk, a_desk, built_with, make_update, messages
from tests.enrolments import broken_copy

WINDOW = 40
"""The receive maximum of these workers."""


class Outage:
    """A worker's database, away until `ends`."""

    def __init__(self, desk: Desk) -> None:
        database = desk.services["worker"].store.database
        self._is_away = True
        for name in ("reading", "transaction"):
            setattr(database, name, self._sometimes(getattr(database, name)))

    def ends(self) -> None:
        self._is_away = False

    def _sometimes(self, action: Callable[[], object]) -> Callable[[], object]:
        def attempt() -> object:
            if self._is_away:
                raise DatabaseError("the database cannot be read: connection refused")
            return action()

        return attempt


def send(desk: Desk, some: list[Received]) -> None:
    for message in some:
        desk.broker.publish(message.topic, message.payload, retain=False)


def check_ingest_goes_on_after_an_outage(folder: Path) -> None:
    """Messages wait at each attempt to go on, more of them altogether than the broker sends unacknowledged."""
    desk = a_desk(folder, receive_maximum=WINDOW)
    outage = Outage(desk)
    chunks = messages(make_update())
    num_sent = 0
    while num_sent <= 3 * WINDOW:
        send(desk, chunks)
        num_sent += len(chunks)
        desk.settle(1)
        desk.clock.time_s += 1.05  # so that the next step is one that tries again
    assert desk.transport().num_held == 0
    outage.ends()
    desk.let_pass(2.0)
    assert desk.services["worker"].worker.failure == ""
    assert desk.take(chunks) == 1
    assert [one.device for one in desk.receipts()] == ["watch-0"]
    assert desk.transport().num_held == 0


def test_messages_at_every_attempt_of_a_long_outage_do_not_stop_ingest_for_ever(tmp_path: Path) -> None:
    check_ingest_goes_on_after_an_outage(tmp_path)


def test_a_worker_that_leaves_messages_behind_is_caught(tmp_path: Path) -> None:
    copy = broken_copy("aggregator.worker", ("self._intake.drop(inbox)", "pass"))
    with built_with(IngestWorker=copy.IngestWorker), pytest.raises(AssertionError):
        check_ingest_goes_on_after_an_outage(tmp_path)


def check_an_unforeseen_error_leaves_nothing_behind(folder: Path) -> None:
    """Wherever it comes from; the worker may end by it, and its connection may be kept by whoever starts it again."""
    desk = a_desk(folder)
    send(desk, messages(make_update()))
    desk.intake()._register.look_up = _fail  # type: ignore[method-assign, assignment]
    with pytest.raises(ZeroDivisionError):
        desk.settle(1)
    assert desk.transport().num_held == 0


def _fail(*_arguments: object) -> None:
    raise ZeroDivisionError("nobody has thought of this")


def test_an_unforeseen_error_leaves_no_message_unacknowledged(tmp_path: Path) -> None:
    check_an_unforeseen_error_leaves_nothing_behind(tmp_path)


def test_an_intake_that_drops_only_when_the_database_fails_is_caught(tmp_path: Path) -> None:
    copy = broken_copy(
        "aggregator.intake",
        ("        finally:\n            self.drop", "        except OSError:\n            self.drop"),
    )
    with built_with(Intake=copy.Intake), pytest.raises(AssertionError):
        check_an_unforeseen_error_leaves_nothing_behind(tmp_path)
