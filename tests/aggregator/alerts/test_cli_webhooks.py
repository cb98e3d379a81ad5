"""``covey-aggregator webhook``, and a running aggregator that tells a receiver what happens."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from aggregator.alerts.signature import secret_bytes
from aggregator.audit.log import AuditEvent, append
from tests.aggregator.alerts.receiver import Receiver, receiving
from tests.aggregator.operator_desk import Operator, one_sentence, operator

__all__ = ["operator"]
ENOUGH_S = 60.0
SECTION = """
[[webhook]]
name = "pager"
url = "http://127.0.0.1:{port}/hook"
secret = "keys/pager.secret"
"""


@pytest.fixture
def receiver(operator: Operator) -> Iterator[Receiver]:
    """A receiver that shares a secret with the configured webhook."""
    operator.says("webhook", "secret", "--out", "./keys/pager.secret")
    key = secret_bytes((operator.folder / "keys" / "pager.secret").read_text())
    with receiving(key, time.time()) as found:
        operator.write("aggregator.toml", operator.config.read_text() + SECTION.format(port=found.port))
        operator.says("init", "CONFIG")
        yield found


def test_a_message_can_be_tried(operator: Operator, receiver: Receiver) -> None:
    assert "pager took the message" in operator.says("webhook", "test", "pager", "CONFIG")
    assert ([one["event"] for one in receiver.taken], receiver.signed) == (["test"], [True])
    receiver.answers.append(401)
    one_sentence(operator.run("webhook", "test", "pager", "CONFIG"), 1, "401")
    one_sentence(operator.run("webhook", "test", "nobody", "CONFIG"), 2, "nobody", "pager")
    assert operator.json("webhook", "list", "CONFIG") == []


def test_secrets_are_made_once_and_read_by_their_owner_only(operator: Operator, receiver: Receiver) -> None:
    del receiver
    path = operator.folder / "keys" / "pager.secret"
    one_sentence(operator.run("webhook", "secret", "--out", str(path)), 2, "already")
    assert path.stat().st_mode & 0o077 == 0
    path.chmod(0o644)
    one_sentence(operator.run("webhook", "test", "pager", "CONFIG"), 2, "chmod 600")
    path.chmod(0o600)
    path.write_text("guess")
    one_sentence(operator.run("webhook", "test", "pager", "CONFIG"), 2, "whsec_")


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ('name = "pager"', 'name = "pager"\nevents = ["everything"]', "events"),
        ("http://127.0.0.1", "http://study.example", "https://"),
        ("keys/pager.secret", "keys/none.secret", "none.secret"),
    ],
)
def test_a_webhook_that_cannot_be_is_one_sentence(
    operator: Operator, receiver: Receiver, old: str, new: str, word: str
) -> None:
    del receiver
    operator.edit("aggregator.toml", old, new)
    one_sentence(operator.run("webhook", "test", "pager", "CONFIG"), 2, word)


def test_two_webhooks_of_one_name_are_refused(operator: Operator, receiver: Receiver) -> None:
    operator.write("aggregator.toml", operator.config.read_text() + SECTION.format(port=receiver.port))
    one_sentence(operator.run("status", "CONFIG"), 2, "webhook", "once")


def test_a_running_aggregator_tells_what_happens_also_what_did_while_it_was_down(
    operator: Operator, receiver: Receiver
) -> None:
    """Its broker is away: what an operator is told does not hang on it."""
    command = [sys.executable, "-m", "aggregator.cli", "run", "--config", str(operator.config)]

    def run_until(told: int) -> None:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + ENOUGH_S
            try:
                while len(receiver.taken) < told or not operator.json("webhook", "list", "CONFIG"):
                    assert time.monotonic() < deadline
                    receiver.now_s = time.time()
                    time.sleep(0.05)
            finally:
                process.send_signal(signal.SIGTERM)  # gives its lease back

    run_until(0)
    store = operator.store()
    with store.database.transaction() as connection:
        append(connection, AuditEvent(time.time(), "aggregator", "task.paused", "watch", {"reason": "asked"}))
    store.close()
    run_until(1)
    assert [one["event"] for one in receiver.taken] == ["task.paused"]
    assert receiver.signed == [True]
