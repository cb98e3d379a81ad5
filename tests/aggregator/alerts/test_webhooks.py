"""Webhooks: every event that the log has, in order, at least once, signed, with nothing in it that is not listed."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest

from aggregator.adapters.webhook_post import WebhookPost
from aggregator.alerts import webhooks
from aggregator.alerts.events import EVENTS, body_of, event_of
from aggregator.alerts.signature import headers_of, is_signed, new_secret, secret_bytes
from aggregator.alerts.webhooks import GIVEN_UP_AFTER_S, LONGEST_RETRY_S, Webhook, standings
from aggregator.audit.entries import AuditEntry
from aggregator.audit.log import AuditEvent, append
from aggregator.errors import AggregatorError
from aggregator.store.database import Database
from fl_protocol.errors import ConfigError
from tests.aggregator.alerts.receiver import Receiver, receiving
from tests.enrolments import broken_copy

KEY, NOW_S = bytes(range(32)), 1_700_000_000.0
ABORTED = ("round.closed", "watch/7", {"outcome": "aborted", "reason": "too few", "count": 3})


class Desk:
    """A log, a receiver, and what tells it."""

    def __init__(self, database: Database, receiver: Receiver, module: Any = webhooks) -> None:
        self.database, self.receiver, self.now_s = database, receiver, NOW_S
        self.notes: list[tuple[str, dict[str, Any]]] = []
        self.module = module
        self.begin()

    def begin(self, **changes: Any) -> None:
        """The process starts."""
        post = WebhookPost(f"http://127.0.0.1:{self.receiver.port}/hook", ca=None, timeout_s=5.0)
        hook = Webhook(name="pager", events=frozenset(EVENTS), key=KEY, post=post)._replace(**changes)
        self.webhooks = self.module.Webhooks(
            self.database,
            tenant="clinic",
            hooks=[hook],
            note=lambda event, **fields: self.notes.append((event, fields)),
            now_s=lambda: self.now_s,
        )
        self.webhooks.begin()

    def happens(self, action: str, subject: str = "watch", detail: dict[str, Any] | None = None) -> int:
        with self.database.transaction() as connection:
            return append(connection, AuditEvent(self.now_s, "aggregator", action, subject, detail or {}))

    def tell(self, *, after_s: float = 0.0) -> None:
        """Everything that can be told now, some seconds later."""
        self.now_s += after_s
        self.receiver.now_s = self.now_s
        while self.webhooks.step():
            pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving(KEY, NOW_S) as found:
        yield found


def test_every_event_is_told_once_in_its_order_and_signed(database: Database, receiver: Receiver) -> None:
    desk = Desk(database, receiver)
    desk.happens("round.closed", "watch/6", {"outcome": "committed"})
    desk.happens(*ABORTED)
    for action in ("model.rolled_back", "model.released", "task.paused", "task.aborted", "task.finished"):
        desk.happens(action)
    for action in ("privacy.budget_80", "privacy.halted", "fleet.dropout", "device.revoked", "database.restored"):
        desk.happens(action)
    desk.tell()
    desk.tell(after_s=10.0)
    assert [one["event"] for one in receiver.taken] == list(EVENTS)
    assert receiver.ids == [f"clinic-{n}" for n in range(1, 12)]
    assert all(receiver.signed)
    assert receiver.taken[0] == {
        "id": "clinic-1", "event": "round.aborted", "at_s": NOW_S, "tenant": "clinic", "subject": "watch/7",
        "detail": {"outcome": "aborted", "reason": "too few", "count": 3}, "entry": 1,
    }  # fmt: skip
    with database.reading() as connection:
        (found,) = standings(connection)
    assert (found.delivered, found.waiting, found.failures, found.problem) == (11, 0, 0, "")


def check_nothing_is_lost(database: Database, receiver: Receiver, module: Any) -> None:
    """Over refusals, hang-ups and a process that is started again."""
    desk = Desk(database, receiver, module)
    receiver.answers += [500, 0, 302, 404, 429]
    desk.happens(*ABORTED)
    desk.happens("task.paused")
    for _ in range(6):
        desk.tell(after_s=3601.0)
        desk.begin()
    assert receiver.ids == ["clinic-0", "clinic-1"]
    assert set(receiver.paths) == {"/hook"}  # a redirect is not followed


def test_nothing_is_lost_over_refusals_and_restarts(database: Database, receiver: Receiver) -> None:
    check_nothing_is_lost(database, receiver, webhooks)


@pytest.mark.parametrize(
    "change",
    [
        ('"due_s": now_s + wait_s, "problem"', '"position": row.position + 1, "due_s": 0.0, "problem"'),
        ("if name not in known:", "if True:\n                    connection.execute(delete(_TABLE))"),
    ],
)
def test_one_that_loses_an_event_is_caught(database: Database, receiver: Receiver, change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check_nothing_is_lost(database, receiver, broken_copy("aggregator.alerts.webhooks", change))


def test_a_process_killed_before_it_notes_the_answer_tells_it_again_under_the_same_id(
    database: Database, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(database, receiver)
    desk.happens(*ABORTED)
    with monkeypatch.context() as patch:
        patch.setattr(desk.webhooks, "_move", lambda *_args, **_values: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            desk.tell()
    desk.begin()
    desk.tell()
    assert receiver.ids == ["clinic-0", "clinic-0"]


def test_retries_become_rarer_and_end_after_three_days(database: Database, receiver: Receiver) -> None:
    desk = Desk(database, receiver)
    receiver.answers += [503] * 10_000
    desk.happens(*ABORTED)
    began_s = desk.now_s
    while not any(event == "webhook_given_up" for event, _ in desk.notes):
        desk.tell(after_s=5.0 if desk.now_s - began_s < 600 else 600.0)
        assert desk.now_s < began_s + 2 * GIVEN_UP_AFTER_S
    waits = [fields["again_in_s"] for event, fields in desk.notes if event == "webhook_failed"]
    assert waits[:4] == [5, 10, 20, 40]
    assert max(waits) == LONGEST_RETRY_S
    assert len(waits) < 100
    receiver.answers.clear()
    desk.happens("task.paused")
    desk.tell(after_s=1.0)
    assert [one["event"] for one in receiver.taken] == ["task.paused"]


def test_a_new_webhook_is_not_told_of_the_past_and_one_that_is_gone_is_forgotten(
    database: Database, receiver: Receiver
) -> None:
    desk = Desk(database, receiver)
    desk.happens(*ABORTED)
    desk.begin(name="other", events=frozenset({"task.paused"}))
    desk.happens("task.aborted")
    desk.happens("task.paused")
    desk.tell()
    assert [one["event"] for one in receiver.taken] == ["task.paused"]
    with database.reading() as connection:
        assert [one.name for one in standings(connection)] == ["other"]


def test_a_log_of_thousands_of_other_entries_is_passed_by(database: Database, receiver: Receiver) -> None:
    desk = Desk(database, receiver)
    with database.transaction() as connection:
        for number in range(1200):
            append(connection, AuditEvent(NOW_S, "aggregator", "round.opened", f"watch/{number}", {}))
    desk.happens("task.paused")
    desk.tell()
    assert receiver.ids == ["clinic-1200"]


def entry(action: str, subject: str, **detail: Any) -> AuditEntry:
    return AuditEntry(number=3, previous="", at_s=1.0, actor="anna", action=action, subject=subject, detail=detail)


def test_neither_devices_nor_anything_unlisted_leaves_the_house() -> None:
    revoked = entry("device.revoked", "e-17", reason="lost", names="w-1 w-2", account="anna")
    event = event_of(revoked)
    assert event == "device.revoked"
    told = body_of(revoked, event, tenant="clinic")
    assert (told.subject, told.detail) == ("", {"reason": "lost"})
    assert event_of(entry("round.closed", "watch/1", outcome="committed")) is None
    assert event_of(entry("token.created", "anna")) is None


def test_the_signature_is_that_of_the_standards_example() -> None:
    # https://www.standardwebhooks.com, the specification's own example of secret, message and signature.
    key = secret_bytes("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    body = b'{"test": 2432232314}'
    headers = headers_of("msg_p5jXN8AQM9LWM0D4loKWxJek", body, key=key, now_s=1614265330.0)
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize("changed", ["body", "id", "time", "key", "old", "rubbish"])
def test_a_changed_or_old_message_is_not_taken_for_ours(changed: str) -> None:
    headers, body, key, now_s = headers_of("m-1", b"{}", key=KEY, now_s=NOW_S), b"{}", KEY, NOW_S
    assert is_signed(headers, body, key=key, now_s=now_s)
    match changed:
        case "body":
            body = b"{ }"
        case "id":
            headers["webhook-id"] = "m-2"
        case "time":
            headers["webhook-timestamp"] = str(int(NOW_S) + 1)
        case "key":
            key = bytes(32)
        case "old":
            now_s += 301.0
        case _:
            headers["webhook-timestamp"] = "soon"
    assert not is_signed(headers, body, key=key, now_s=now_s)


def test_secrets() -> None:
    text = new_secret(lambda count: bytes(range(count)))
    assert secret_bytes(text + "\n") == bytes(range(32))
    for wrong in (
        "",
        "whsec_",
        "whsec_!!",
        text.removeprefix("whsec_"),
        "whsec_" + base64.b64encode(b"short").decode(),
    ):
        with pytest.raises(AggregatorError, match="webhook secret"):
            secret_bytes(wrong)


@pytest.mark.parametrize(
    "url", ["ftp://x", "http://study.example/x", "https://", "https://u:p@host/", "https://host:x/"]
)
def test_a_receiver_that_cannot_be_asked_safely_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="webhook"):
        WebhookPost(url, ca=None, timeout_s=1.0)


def test_nobody_listening_and_a_wrong_certificate_are_reasons() -> None:
    with receiving(KEY, NOW_S) as found:
        port = found.port
        # The receiver speaks no TLS: whatever does not prove who it is gets nothing.
        assert WebhookPost(f"https://127.0.0.1:{port}/", ca=None, timeout_s=5.0)(b"{}", {}).startswith("no answer")
        assert found.paths == []
    assert WebhookPost(f"http://127.0.0.1:{port}/", ca=None, timeout_s=5.0)(b"{}", {}).startswith("no answer")
