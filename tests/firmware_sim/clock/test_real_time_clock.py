"""A device's clock over true time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware_sim.clock.real_time_clock import ClockModel, RealTimeClock
from firmware_sim.virtual_device import VirtualClock
from fl_protocol.errors import LocalMisuseError
from tests.enrolments import broken_copy

DAY_S = 86_400.0
JUMPY = ClockModel(drift_ppm=20, jumps_per_day=0.5, jump_s=600, ntp_every_s=1000)


def _clock(model: ClockModel, time: VirtualClock, kind: Any = RealTimeClock, **options: Any) -> RealTimeClock:
    clock: RealTimeClock = kind(model, true_s=time.now_s, **{"began_s": 0.0, "seed": 5, "device": "watch-1", **options})
    return clock


def test_twenty_millionths_are_1_7_seconds_a_day() -> None:
    time = VirtualClock(0.0)
    clock = _clock(ClockModel(drift_ppm=20), time)
    time.time_s = DAY_S
    assert clock.now_s() - time.time_s == pytest.approx(1.728)
    slow = _clock(ClockModel(drift_ppm=-20), time, error_s=10.0)
    assert slow.now_s() - time.time_s == pytest.approx(10 - 1.728)


def test_local_time_is_the_wearer_s() -> None:
    time = VirtualClock(3 * DAY_S + 3600)
    assert _clock(ClockModel(), time).local_time_s() == 3600
    assert _clock(ClockModel(utc_offset_s=-2 * 3600), time).local_time_s() == 23 * 3600
    assert _clock(ClockModel(utc_offset_s=5.5 * 3600), time).local_time_s() == 6.5 * 3600


def test_planned_jumps_add_up_and_ntp_undoes_them() -> None:
    time = VirtualClock(0.0)
    clock = _clock(ClockModel(ntp_error_s=0.05), time, jumps=[(500.0, 3600.0), (900.0, -60.0)])
    errors = []
    for time.time_s in (499.0, 500.0, 901.0):
        errors.append(clock.now_s() - time.time_s)
    assert errors == [0, 3600, 3540]
    assert not clock.connected()  # set when it was made, less than `ntp_every_s` ago
    time.time_s = 3000.0
    assert clock.connected()
    assert abs(clock.now_s() - 3000) <= 0.05
    time.time_s = 9000.0
    assert abs(clock.now_s() - 9000) <= 0.05


def test_a_clock_without_ntp_stays_wrong() -> None:
    time = VirtualClock(1e6)
    clock = _clock(ClockModel(ntp=False), time, error_s=77.0)
    assert not clock.connected()
    assert clock.now_s() == 1e6 + 77


def test_jumps_come_as_often_as_was_asked() -> None:
    time = VirtualClock(0.0)
    model = ClockModel(jumps_per_day=0.5, jump_s=600, ntp=False)
    jumps = 0
    for device in range(20):
        clock, before = _clock(model, time, device=f"watch-{device}"), 0.0
        for day in range(1, 51):
            after = clock.error_at(day * DAY_S)
            jumps += after != before
            assert abs(after - before) <= 600
            before = after
    # Binomial(1000, 1/2): more than 95 away has a probability of 1.9e-9.
    assert 405 < jumps < 595


@given(
    looks=st.lists(st.floats(0, 60 * DAY_S), max_size=12), sets=st.lists(st.floats(0, 60 * DAY_S), max_size=3),
)  # fmt: skip
def test_what_a_clock_shows_does_not_depend_on_when_it_was_looked_at(looks: list[float], sets: list[float]) -> None:
    def errors(*, looked: bool, slept: bool) -> float:
        time = VirtualClock(0.0)
        clock = _clock(JUMPY, time)
        for at_s, is_set in sorted([(at_s, False) for at_s in looks] + [(at_s, True) for at_s in sets]):
            time.time_s = at_s
            if is_set:
                clock.connected()
            elif looked:
                clock.now_s()
            if slept:
                state, clock = clock.state(), _clock(JUMPY, time)
                clock.restore(state)
        return clock.error_at(60 * DAY_S)

    assert errors(looked=False, slept=False) == errors(looked=True, slept=False) == errors(looked=False, slept=True)


def test_a_clock_that_adds_a_day_at_every_look_is_caught() -> None:
    copy = broken_copy(
        "firmware_sim.clock.real_time_clock",
        ("self._whole_days = (day, total_s)", "self._whole_days = (first, total_s)"),
    )
    time = VirtualClock(0.0)
    clocks = [
        _clock(ClockModel(jumps_per_day=1, jump_s=9, ntp=False), time, kind)
        for kind in (RealTimeClock, copy.RealTimeClock)
    ]
    for day in range(1, 5):
        errors = [clock.error_at(day * DAY_S) for clock in clocks]
    assert errors[0] != errors[1]


def test_a_sleeping_clock_is_16_bytes() -> None:
    assert len(_clock(JUMPY, VirtualClock()).state()) == 16
    with pytest.raises(LocalMisuseError, match="state: expected 16 bytes, got 3"):
        _clock(JUMPY, VirtualClock()).restore(b"abc")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"utc_offset_s": 90_000.0}, "utc_offset_s: expected -43200 to 50400"),
        ({"jumps_per_day": 1.5}, "jumps_per_day: expected 0 to 1, got 1.5"),
        ({"drift_ppm": -1e6}, "drift_ppm: expected within"),
    ],
)
def test_an_impossible_clock_is_refused(wrong: dict[str, float], told: str) -> None:
    with pytest.raises(LocalMisuseError, match=told):
        ClockModel(**wrong)  # type: ignore[arg-type]
