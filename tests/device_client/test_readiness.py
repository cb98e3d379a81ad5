"""The board is read when it matters and no more often; the wearer's rules are those of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from device_client import delivery, readiness
from device_client.config import EligibilityConfig
from device_client.eligibility import Conditions
from device_client.readiness import READ_EVERY_S, Readiness, policy_of
from firmware_sim.virtual_device import SteadyBoard, VirtualClock
from tests.device_client.one_device import OneDevice


@dataclass
class CountingBoard:
    """Says what it was told to, and how often it was asked."""

    conditions: Conditions = field(default_factory=Conditions)
    reads: int = 0

    def read(self) -> Conditions:
        self.reads += 1
        return self.conditions


def test_a_reading_holds_for_a_quarter_minute_unless_the_clock_is_set_back() -> None:
    board, clock = CountingBoard(), VirtualClock(1000.0)
    subject = Readiness(board, clock, EligibilityConfig())
    assert subject.look() == ()
    for after_s, reads in ((0.0, 1), (READ_EVERY_S - 1, 1), (READ_EVERY_S, 2), (READ_EVERY_S - 5, 3)):
        clock.time_s = 1000.0 + after_s
        subject.look()
        assert board.reads == reads, after_s


def test_what_is_missing_is_told_in_words_at_once_and_recovers_slowly() -> None:
    board, clock = CountingBoard(Conditions(charging=True)), VirtualClock(1000.0)
    subject = Readiness(board, clock, EligibilityConfig(require_charging=True))
    assert subject.look() == ()
    board.conditions = Conditions(charging=False)
    clock.time_s += READ_EVERY_S
    (reason,) = subject.look()
    assert "charg" in reason
    assert [blocked.rule for blocked in subject.blocked] == ["charging"]
    board.conditions = Conditions(charging=True)
    clock.time_s += READ_EVERY_S
    assert subject.look() != ()
    for _ in range(8):
        clock.time_s += READ_EVERY_S
        subject.look()
    assert subject.look() == ()


def test_a_time_window_follows_the_clock_on_the_wall() -> None:
    clock = VirtualClock(86_400.0 * 100 + 12 * 3600)
    subject = Readiness(CountingBoard(), clock, EligibilityConfig(windows=("22:00-06:00",)))
    assert "22:00-06:00" in subject.look()[0]
    clock.time_s += 11 * 3600
    assert subject.look() == ()


def test_a_metered_network_or_a_low_battery_holds_uploads_and_nothing_else_does() -> None:
    config = EligibilityConfig(require_charging=True, require_idle=True, require_unmetered=True)
    good = Conditions(battery_percent=90.0, charging=True, idle=True, unmetered=True)
    held = {"battery_percent": 5.0, "unmetered": False}
    for name, bad in {**held, "charging": False, "idle": False}.items():
        board, clock = CountingBoard(good), VirtualClock(1000.0)
        subject = Readiness(board, clock, config)
        assert (subject.look(), subject.holds_uploads) == ((), False)
        board.conditions = replace(good, **{name: bad})  # type: ignore[arg-type]
        clock.time_s += READ_EVERY_S
        assert subject.look()
        assert subject.holds_uploads == (name in held), name


def resent_in_an_hour(*, unmetered: bool) -> int:
    """How often a device sends its update again, a large one, while no receipt comes."""
    board = SteadyBoard(Conditions(unmetered=True))
    one = OneDevice(board=board, eligibility=EligibilityConfig(require_idle=False, require_unmetered=True))
    one.start()
    one.scripts["watch"].open_round(lasts_s=7200.0)
    one.until("update_sent")
    board.conditions = Conditions(unmetered=unmetered)
    one.clock.time_s += READ_EVERY_S
    one.device.step()
    before, ends_s = len(one.journal.named("update_sent")), one.clock.time_s + 3600.0
    while one.clock.time_s < ends_s:
        one.device.step()
    return len(one.journal.named("update_sent")) - before


def test_a_device_on_a_metered_network_does_not_send_a_large_update_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "LARGE_BYTES", 100)
    assert resent_in_an_hour(unmetered=True) > 5
    assert resent_in_an_hour(unmetered=False) == 0


def test_a_device_that_does_not_tell_of_its_network_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "LARGE_BYTES", 100)
    monkeypatch.setattr(readiness, "HOLDING_RULES", frozenset())
    assert resent_in_an_hour(unmetered=False) > 5


def test_every_rule_of_the_configuration_reaches_the_policy() -> None:
    config = EligibilityConfig(
        minimum_battery_percent=55.0,
        charging_lifts_battery_floor=True,
        require_charging=True,
        require_idle=False,
        require_unmetered=False,
        maximum_temperature_celsius=33.0,
        windows=("01:00-02:00", "03:00-04:00"),
    )
    policy = policy_of(config)
    for name in (
        "minimum_battery_percent",
        "charging_lifts_battery_floor",
        "require_charging",
        "require_idle",
        "require_unmetered",
        "maximum_temperature_celsius",
    ):
        assert getattr(policy, name) == getattr(config, name)
    assert [str(window) for window in policy.windows] == list(config.windows)
