"""Questions to a device, over its real socket and directly: one answer to each, one sentence if it is wrong."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device_client.adapters.line_server import LineServer, Request, ask
from device_client.assembly import RealDevice
from device_client.control import QUESTIONS, answer
from device_client.deliveries_log import LOG_NAME
from device_client.device import Device
from tests.device_client.one_device import OneDevice

WITHIN_S = 30.0


def asked(device: Device, question: str, study: str = "") -> Any:
    """The answer's value; there must be one."""
    found = json.loads(answer(device, json.dumps({"ask": question, "study": study}).encode()))
    assert "error" not in found, found
    return found.get("value")


@pytest.fixture(scope="module")
def after_a_round() -> OneDevice:
    """A device that took part in one round and is amid the next."""
    one = OneDevice()
    one.start()
    one.scripts["watch"].open_round(1)
    one.until("update_sent")
    one.scripts["watch"].receipt_all()
    one.until("update_delivered")
    one.scripts["watch"].open_round(2)
    one.until("update_sent")
    return one


def test_status_and_ledger_tell_what_was_spent_and_what_waits(after_a_round: OneDevice) -> None:
    device = after_a_round.device
    status = asked(device, "status")
    assert status["may_train"] is True
    (study,) = status["studies"]
    assert (study["study"], study["device"], study["round"], study["pending"]) == ("clinic/watch", "watch-7", 2, 1)
    assert status["spent_epsilon"] == study["spent_epsilon"] == device.ledger.spent_epsilon > 0
    assert {one["model"] for one in study["measured"]} == {"global"}
    ledger = asked(device, "ledger")
    assert [line["round"] for line in ledger["lines"]] == [1, 2]
    assert ledger["spent_epsilon"] == status["spent_epsilon"]
    assert ledger["studies"] == {"clinic/watch": status["spent_epsilon"]}
    assert ledger["left_like_the_last"] > 0


def test_sent_tells_of_every_update_what_became_of_it(after_a_round: OneDevice) -> None:
    device = after_a_round.device
    first, second = asked(device, "sent")
    assert (first["round"], first["outcome"]) == (1, "delivered")
    assert (second["round"], second["outcome"]) == (2, "waiting")
    (waiting,) = device.outbox
    assert second["update_id"] == waiting.update_id.hex()
    assert second["num_bytes"] == len(waiting.envelope)
    assert second["epsilon"] == device.ledger.spent_epsilon
    assert first["epsilon"] < second["epsilon"]


def test_a_torn_line_of_the_deliveries_is_passed_over(after_a_round: OneDevice) -> None:
    store = after_a_round.device.store
    store.append_log(LOG_NAME, b'{"at_s": 1')
    assert [one["outcome"] for one in asked(after_a_round.device, "sent")] == ["delivered", "waiting"]


def test_consent_and_erasure_work_directly() -> None:
    device = OneDevice().start(grant=False)
    (listed,) = asked(device, "consent list")
    assert listed["problem"].startswith("not granted")
    assert asked(device, "consent grant", "watch")["study"] == "clinic/watch"
    assert asked(device, "consent list")[0]["problem"] == ""
    assert asked(device, "consent withdraw", "clinic/watch") == {"study": "clinic/watch", "dropped": 0}
    assert asked(device, "erase data") == {}
    assert len(device.streams["default"]) == 0


def check_is_one_sentence(raw: bytes, payload: bytes) -> None:
    found = json.loads(raw)
    assert set(found) <= {"value", "error", "kind"}
    if "error" in found:
        assert found["error"]
        assert "\n" not in found["error"]
        assert len(found["error"]) < 1000, f"{len(payload)} bytes were echoed"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"garbage",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'{"ask": 3}',
        b'{"ask": "dance"}',
        b'{"ask": "status", "study": 3}',
        b'{"ask": "status", "more": 1}',
        b'{"ask": "consent grant"}',
        b'{"ask": "consent grant", "study": "a\\nb"}',
        b'{"ask": "\\ud800"}',
        b'{"ask": "' + b"x" * 1_000_000 + b'"}',
        b'{"ask": "consent grant", "study": "' + b"x" * 1_000_000 + b'"}',
        b"[" * 200_000,
        b'{"ask":' * 5000,
    ],
)
def test_a_question_that_makes_no_sense_is_answered_with_one_sentence(payload: bytes) -> None:
    raw = answer(_idle(), payload)
    assert "error" in json.loads(raw)
    check_is_one_sentence(raw, payload)


_IDLE: list[Device] = []


def _idle() -> Device:
    if not _IDLE:
        _IDLE.append(OneDevice().start(grant=False))
    return _IDLE[0]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=200),
        st.fixed_dictionaries(
            {"ask": st.sampled_from(["status", "ledger", "sent", "consent list", "consent withdraw"]) | st.text()},
            optional={"study": st.text() | st.none() | st.integers()},
        ).map(lambda question: json.dumps(question).encode()),
    )
)
def test_whatever_is_asked_there_is_one_answer(payload: bytes) -> None:
    check_is_one_sentence(answer(_idle(), payload), payload)


def test_a_wrong_study_is_the_askers_doing_and_a_broken_store_is_not() -> None:
    one = OneDevice()
    device = one.start(grant=False)
    wrong = json.loads(answer(device, b'{"ask": "consent grant", "study": "dance"}'))
    assert (wrong["kind"], "expected one of clinic/watch" in wrong["error"]) == ("configuration", True)
    one.flash.read_only = True
    refused = json.loads(answer(device, b'{"ask": "consent grant", "study": "watch"}'))
    assert refused["kind"] == "store"
    assert "Read-only" in refused["error"]


# Over the real socket.


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[RealDevice, Path]]:
    from tests.device_client.test_embedding import write_device  # noqa: PLC0415

    device = RealDevice.open(write_device(tmp_path))
    device.listen()
    thread = threading.Thread(target=device.run)
    thread.start()
    yield device, tmp_path / "store.sock"
    device.stop()
    thread.join(WITHIN_S)
    assert not thread.is_alive()
    device.close()


def test_every_question_is_answered_over_the_socket(running: tuple[RealDevice, Path]) -> None:
    _, path = running
    for question in QUESTIONS:
        payload = json.dumps({"ask": question, "study": "watch"}).encode()
        found = json.loads(ask(path, payload, timeout_s=WITHIN_S))
        assert "error" not in found, (question, found)
    assert path.stat().st_mode & 0o777 == 0o600


def test_hostile_clients_get_a_sentence_and_the_daemon_goes_on(running: tuple[RealDevice, Path]) -> None:
    _, path = running
    for raw in (b"garbage\n", b'{"ask": "dance"}\n', b"[" * 60_000 + b"\n"):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(WITHIN_S)
            client.connect(str(path))
            client.sendall(raw)
            reply = client.makefile("rb").readline()
        check_is_one_sentence(reply, raw)
        assert b"error" in reply
    with socket.socket(socket.AF_UNIX) as client:  # one that says nothing and goes
        client.connect(str(path))
    assert "value" in json.loads(ask(path, b'{"ask": "status"}', timeout_s=WITHIN_S))


class OneRequest:
    """What a `LineServer` hands out, with the user id that the test wants."""

    def __init__(self, uid: int) -> None:
        self.replies: list[bytes] = []
        self.requests = deque([Request(b'{"ask": "erase data"}', "json", uid, self.replies.append)])

    def take(self) -> Request | None:
        return self.requests.popleft() if self.requests else None


@pytest.mark.parametrize(
    ("uid", "may"), [(os.getuid(), True), (0, True), (os.getuid() + 4321, False), (65_534, os.getuid() == 65_534)]
)
def test_only_the_daemons_own_user_and_root_may_ask(tmp_path: Path, uid: int, *, may: bool) -> None:
    from tests.device_client.test_embedding import write_device  # noqa: PLC0415

    with RealDevice.open(write_device(tmp_path)) as device:
        server = OneRequest(uid)
        device._control = server  # type: ignore[assignment]
        assert device._answer_questions() == 1
        device._control = None
    (reply,) = server.replies
    assert (b"may ask" in reply) != may


def test_the_kernel_says_who_asks(tmp_path: Path) -> None:
    heard = threading.Event()
    server = LineServer(tmp_path / "x.sock", wake=heard.set)
    client = threading.Thread(target=lambda: ask(tmp_path / "x.sock", b"{}", timeout_s=WITHIN_S))
    client.start()
    assert heard.wait(WITHIN_S)
    request = server.take()
    assert request is not None
    assert request.peer_uid == os.getuid()
    request.reply(b"{}")
    client.join(WITHIN_S)
    server.close()
