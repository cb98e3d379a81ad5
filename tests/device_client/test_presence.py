"""What a device says of itself: why it rests, in six words about the board, seldom, and nothing about its data."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import get_args

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from device_client.config import EligibilityConfig, PrivacyConfig, StudyConfig
from device_client.consent import terms_of
from device_client.eligibility import Blocked, Conditions
from device_client.events import Publish
from device_client.presence import Presence, reason_of
from device_client.readiness import Readiness
from device_client.session_config import Floors, SessionConfig
from fl_protocol.broker_config import BrokerConfig
from fl_protocol.errors import ProtocolError
from fl_protocol.messages import PresenceMsg, PresenceReason, decode, encode
from tests.enrolments import broken_copy

HALF_HOUR_S = 1800.0
STUDY = StudyConfig(
    tenant="clinic",
    task="watch",
    broker=BrokerConfig("localhost", 1883),
    bundle="model.covey",
    publisher_key="aa",
    aggregator_key="bb",
)
CONFIG = SessionConfig(
    tenant="clinic",
    task="watch",
    device="w-1",
    role="train",
    aggregator_key=Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key(),
    graph_digest=bytes(32),
    num_parameters=5,
    floors=Floors(),
    software="covey test",
    tells_why_every_s=HALF_HOUR_S,
)


def said(published: list[Publish]) -> list[str]:
    """The reasons in these messages, each retained in its place."""
    for one in published:
        assert (one.topic, one.retain) == ("fl/v1/clinic/state/w-1", True)
    return [decode(one.payload, PresenceMsg).reason for one in published]


def told_in_a_day(presence: Presence, reason_at: dict[float, PresenceReason]) -> list[tuple[float, str]]:
    """What is published in a day on which the reason changes at some hours, looked at every ten seconds."""
    found: list[tuple[float, str]] = []
    now: PresenceReason = ""
    for step in range(8640):
        now_s = 10.0 * step
        now = reason_at.get(now_s / 3600, now)
        if presence.is_due(now_s):
            found += [(now_s, reason) for reason in said(presence.take(now, now_s))]
    return found


def check_it_tells_seldom(kind: type[Presence]) -> None:
    """A charger that comes and goes every two minutes is told of at most every half hour."""
    restless: dict[float, PresenceReason] = {n / 30: "charger" if n % 2 else "" for n in range(720)}
    told = [at_s for at_s, _ in told_in_a_day(kind(CONFIG), restless)]
    assert all(later - sooner >= HALF_HOUR_S - 10 for sooner, later in pairwise(told[1:]))
    assert len(told) <= 49
    # What stays is told once.
    assert [reason for _, reason in told_in_a_day(kind(CONFIG), {3.0: "battery"})] == ["battery"]


def test_it_tells_seldom_and_only_what_has_changed() -> None:
    check_it_tells_seldom(Presence)


@pytest.mark.parametrize(
    "change",
    [
        ("return [self.online()] if reason != before else []", "return [self.online()]"),
        ("(passed + 1) * self._every_s + self._phase_s", "now_s"),
    ],
)
def test_a_device_that_tells_too_often_is_caught(change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check_it_tells_seldom(broken_copy("device_client.presence", change).Presence)


def test_when_it_looks_follows_from_the_name_and_from_nothing_that_it_found() -> None:
    def looks(device: str, reasons: list[PresenceReason]) -> list[float]:
        presence, found = Presence(replace(CONFIG, device=device)), []
        for step in range(8640):
            if presence.is_due(10.0 * step):
                found.append(10.0 * step)
                presence.take(reasons[len(found) % len(reasons)], 10.0 * step)
        return found

    assert looks("w-1", [""]) == looks("w-1", ["charger", "battery", ""])
    assert looks("w-1", [""]) != looks("w-2", [""])


def test_whoever_does_not_want_it_told_tells_nothing() -> None:
    silent = Presence(replace(CONFIG, tells_why_every_s=0.0))
    assert told_in_a_day(silent, {0.0: "battery"}) == []
    assert said([silent.online(), silent.offline()]) == ["", ""]


def test_a_clock_that_was_set_back_does_not_silence_it() -> None:
    presence = Presence(CONFIG)
    presence.take("", 1e9)
    assert presence.is_due(1e6)


def test_every_rule_of_the_board_has_its_word_and_the_first_counts() -> None:
    rules = ("battery", "charging", "idle", "network", "temperature", "time_window")
    assert {reason_of([Blocked(rule, "")]) for rule in rules} == set(get_args(PresenceReason)) - {""}
    assert reason_of([Blocked("charging", ""), Blocked("battery", "")]) == "charger"
    assert reason_of([]) == ""


def test_offline_gives_no_reason() -> None:
    with pytest.raises(ValueError, match="offline gives no reason"):
        PresenceMsg(state="offline", software="x", reason="battery")
    said_it = encode(PresenceMsg(state="online", software="x", reason="battery")).replace(b"\xa6online", b"\xa7offline")
    with pytest.raises(ProtocolError, match="offline gives no reason"):
        decode(said_it, PresenceMsg)


class Board:
    """A board that says the same until told otherwise."""

    def __init__(self) -> None:
        self.says = Conditions(battery_percent=10.0)

    def read(self) -> Conditions:
        return self.says


class StoppedClock:
    def now_s(self) -> float:
        return 1000.0

    def local_time_s(self) -> float:
        return 1000.0


def test_the_reason_is_of_a_reading_of_its_own_that_changes_nothing_else() -> None:
    board = Board()
    readiness = Readiness(board, StoppedClock(), EligibilityConfig(minimum_battery_percent=50.0))  # type: ignore[arg-type]
    assert readiness.reason() == "battery"
    assert readiness.blocked == ()  # nobody has looked whether to train
    assert readiness.look()
    board.says = Conditions(battery_percent=90.0)
    assert readiness.reason() != "battery"


def test_the_wearer_agrees_to_what_is_told() -> None:
    key, privacy = "tells the study and its broker", PrivacyConfig(epsilon=3.0, delta=1e-5)
    assert "battery" in terms_of(STUDY, privacy)[key]
    assert key not in terms_of(msgspec.structs.replace(STUDY, tells_why_every_minutes=0.0), privacy)
    with pytest.raises(ValueError, match="at least 5"):
        msgspec.structs.replace(STUDY, tells_why_every_minutes=1.0).__post_init__()
