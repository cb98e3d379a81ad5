"""The board is read when it matters and no more often; the wearer's rules are those of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

from device_client.config import EligibilityConfig
from device_client.eligibility import Conditions
from device_client.readiness import READ_EVERY_S, Readiness, policy_of
from firmware_sim.virtual_device import VirtualClock


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
    readiness = Readiness(board, clock, EligibilityConfig())
    assert readiness.look() == ()
    for after_s, reads in ((0.0, 1), (READ_EVERY_S - 1, 1), (READ_EVERY_S, 2), (READ_EVERY_S - 5, 3)):
        clock.time_s = 1000.0 + after_s
        readiness.look()
        assert board.reads == reads, after_s


def test_what_is_missing_is_told_in_words_at_once_and_recovers_slowly() -> None:
    board, clock = CountingBoard(Conditions(charging=True)), VirtualClock(1000.0)
    readiness = Readiness(board, clock, EligibilityConfig(require_charging=True))
    assert readiness.look() == ()
    board.conditions = Conditions(charging=False)
    clock.time_s += READ_EVERY_S
    (reason,) = readiness.look()
    assert "charg" in reason
    assert [blocked.rule for blocked in readiness.blocked] == ["charging"]
    board.conditions = Conditions(charging=True)
    clock.time_s += READ_EVERY_S
    assert readiness.look() != ()
    for _ in range(8):
        clock.time_s += READ_EVERY_S
        readiness.look()
    assert readiness.look() == ()


def test_a_time_window_follows_the_clock_on_the_wall() -> None:
    clock = VirtualClock(86_400.0 * 100 + 12 * 3600)
    readiness = Readiness(CountingBoard(), clock, EligibilityConfig(windows=("22:00-06:00",)))
    assert "22:00-06:00" in readiness.look()[0]
    clock.time_s += 11 * 3600
    assert readiness.look() == ()


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
