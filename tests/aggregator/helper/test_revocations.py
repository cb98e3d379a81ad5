"""A helper that was told who was thrown out adds up no list with such a device, whatever it is told later."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event

from aggregator.helper import answerer, revocations, revoked_devices
from fl_protocol.revocation_messages import LONGEST_NOTICE_BYTES, MOST_REVOKED, RevocationsKeptMsg, RevokedDevicesMsg
from fl_protocol.secagg.errors import UnmaskRefusal
from fl_protocol.secagg.messages import MaskSumMsg, UnmaskRefusalMsg
from fl_protocol.signing import sign, verify
from tests.aggregator.helper.helper_desk import (
    DEVICES,
    HELPER,
    IDENTITY,
    TENANT,
    Desk,
    request_for,
    rounds_reply,
)
from tests.enrolments import broken_copy
from tests.fl_protocol.examples import AGGREGATOR_KEY

STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(32))
REVOKED = DEVICES[2]


def notice(*devices: str, key: Ed25519PrivateKey = AGGREGATOR_KEY, **changes: Any) -> bytes:
    fields = {"tenant": TENANT, "helper": HELPER, "devices": devices or (REVOKED,)}
    return sign(RevokedDevicesMsg(**{**fields, **changes}), key)


def kept(desk: Desk) -> list[str]:
    return [one.device for one in desk.store.revoked.all()]


def is_kept(desk: Desk, data: bytes) -> None:
    (answer,) = desk.ask(data)
    said = verify(answer, RevocationsKeptMsg, IDENTITY.public_key())
    assert (said.tenant, said.helper) == (TENANT, HELPER)
    assert said.request_digest == hashlib.sha256(data).digest()


def is_refused(desk: Desk, request: bytes) -> None:
    reply = rounds_reply(desk.ask(request))
    assert isinstance(reply, UnmaskRefusalMsg), reply
    assert reply.reason is UnmaskRefusal.REVOKED_DEVICE
    assert REVOKED in reply.detail


def is_answered(desk: Desk, request: bytes) -> MaskSumMsg:
    reply = rounds_reply(desk.ask(request))
    assert isinstance(reply, MaskSumMsg), reply
    return reply


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


# What has to hold, each with a copy of the code that does not hold it.


def a_list_with_a_device_that_was_thrown_out_is_refused(desk: Desk) -> None:
    is_kept(desk, notice())
    is_refused(desk, request_for(desk.manifest(), DEVICES[:5]))
    assert is_answered(desk, request_for(desk.manifest(), [*DEVICES[:2], *DEVICES[3:6]])).count == 5


def what_is_told_later_takes_nothing_back(desk: Desk) -> None:
    is_kept(desk, notice())
    is_kept(desk, notice(DEVICES[7]))
    is_refused(desk, request_for(desk.manifest(), DEVICES[:5]))
    assert kept(desk) == [REVOKED, DEVICES[7]]


def another_studys_revocations_are_no_business_of_this_one(desk: Desk) -> None:
    desk.store.revoked.add("hospital", [REVOKED], now_s=0.0)
    is_answered(desk, request_for(desk.manifest(), DEVICES[:5]))


def what_a_stranger_says_is_ignored(desk: Desk) -> None:
    assert desk.ask(notice(key=STRANGER)) == []
    assert kept(desk) == []
    assert desk.journal.named("request_ignored")


def what_another_helper_is_told_is_ignored(desk: Desk) -> None:
    assert desk.ask(notice(helper="helper-b")) == []
    assert kept(desk) == []


def what_another_study_is_told_is_ignored(desk: Desk) -> None:
    assert desk.ask(notice(tenant="hospital")) == []
    assert kept(desk) == []


CHECKS = (
    a_list_with_a_device_that_was_thrown_out_is_refused,
    what_is_told_later_takes_nothing_back,
    another_studys_revocations_are_no_business_of_this_one,
    what_a_stranger_says_is_ignored,
    what_another_helper_is_told_is_ignored,
    what_another_study_is_told_is_ignored,
)


@pytest.mark.parametrize("check", CHECKS)
def test_it_holds(check: Any, desk: Desk) -> None:
    check(desk)


_VERIFIED = "told = verify(data, RevokedDevicesMsg, study.aggregator)"


@pytest.mark.parametrize(
    ("check", "change"),
    [
        (CHECKS[0], ("        if found:\n", "        if False:\n")),
        (CHECKS[0], ("self._kept.add(study.tenant, told.devices, now_s=self._now_s())", "0")),
        (CHECKS[3], (_VERIFIED, "told = named_revocations(data); assert told")),
        (CHECKS[4], ("(told.tenant, told.helper) !=", "(study.tenant, self._helper.name) !=")),
        (CHECKS[5], ("(told.tenant, told.helper) !=", "(study.tenant, self._helper.name) !=")),
    ],
    ids=["adds up all the same", "keeps nothing", "believes anybody", "hears another's", "hears another study's"],
)
def test_a_helper_that_does_not_is_caught(
    check: Any, change: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = broken_copy("aggregator.helper.revocations", change)
    monkeypatch.setattr(answerer, "Revocations", broken.Revocations)
    desk = Desk(tmp_path)
    with pytest.raises((AssertionError, ValueError)):
        check(desk)


@pytest.mark.parametrize(
    ("check", "change"),
    [
        (CHECKS[1], ("            rows = [", "            connection.execute(_TABLE.delete())\n            rows = [")),
        (CHECKS[2], ("where(_TABLE.c.tenant == tenant, these)", "where(these)")),
    ],
    ids=["takes the newest for all", "mixes studies"],
)
def test_a_store_that_forgets_is_caught(
    check: Any, change: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = broken_copy("aggregator.helper.revoked_devices", change)
    monkeypatch.setattr("aggregator.helper.helper_store.RevokedDevices", broken.RevokedDevices)
    desk = Desk(tmp_path)
    with pytest.raises(AssertionError):
        check(desk)


def test_it_is_durable_before_it_is_acknowledged(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    told_at: list[int] = []
    event.listen(desk.store.database.engine, "commit", lambda _connection: told_at.append(len(desk.hear())))
    is_kept(desk, notice())
    assert told_at
    assert not any(told_at)
    # Killed, and started again from what is on the disk.
    desk.ears.close()
    desk.transport.close()
    again = Desk(tmp_path)
    is_refused(again, request_for(again.manifest(), DEVICES[:5]))


def test_a_round_that_was_answered_before_gets_the_same_bytes(desk: Desk) -> None:
    request = request_for(desk.manifest(), DEVICES[:5])
    (first,) = desk.ask(request)
    is_kept(desk, notice())
    assert desk.ask(request) == [first]


def test_the_same_names_again_are_acknowledged_and_told_once(desk: Desk) -> None:
    for _ in range(3):
        is_kept(desk, notice(REVOKED, DEVICES[3], REVOKED))
        desk.now_s += 50
    (told,) = desk.journal.named("devices_revoked")
    assert (told["tenant"], told["devices"]) == (TENANT, 2)
    assert {one.told_s for one in desk.store.revoked.all()} == {desk.now_s - 150}


def test_the_longest_notice_fits_and_a_longer_one_is_none(desk: Desk) -> None:
    longest = notice(*(f"{number:03}".ljust(64, "x") for number in range(MOST_REVOKED)))
    assert len(longest) <= LONGEST_NOTICE_BYTES
    is_kept(desk, longest)
    assert len(kept(desk)) == MOST_REVOKED
    assert revocations.named_revocations(longest + bytes(LONGEST_NOTICE_BYTES)) is None


def test_a_store_that_fails_acknowledges_nothing(desk: Desk) -> None:
    with desk.store.database.transaction() as connection:
        connection.exec_driver_sql("DROP TABLE revoked_devices")
    assert desk.ask(notice()) == []
    assert desk.journal.named("degraded")


@given(st.binary(max_size=200))
def test_rubbish_is_no_notice(data: bytes) -> None:
    assert revocations.named_revocations(data) is None


def test_a_list_of_any_length_is_looked_through(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revoked_devices, "_AT_ONCE", 2)
    desk.store.revoked.add(TENANT, DEVICES[3:8], now_s=0.0)
    assert desk.store.revoked.among(TENANT, DEVICES) == DEVICES[3:8]
