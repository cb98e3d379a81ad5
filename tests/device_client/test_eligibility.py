"""Each rule stops training at once and is slow to let it start again; broken copies of each rule are caught."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_client.config import EligibilityConfig
from device_client.eligibility import (
    SETTLING_S,
    BrokenReading,
    Conditions,
    Eligibility,
    EligibilityPolicy,
    Moment,
    Rule,
    TimeWindow,
    parse_window,
    rules_of,
)
from fl_protocol.errors import LocalMisuseError

NOON_S = 12 * 3600.0
HOUR_S = 3600.0
NOTHING = EligibilityPolicy(
    minimum_battery_percent=0, require_idle=False, require_unmetered=False, maximum_temperature_celsius=math.inf
)
"""A policy without a rule."""


@dataclass(frozen=True)
class Case:
    """One rule: a reading that suits it, ones that do not, and ones it may go on with but not start again with."""

    rule: str
    policy: EligibilityPolicy
    good: Conditions
    lost: Conditions
    hovering: tuple[Conditions, ...]
    impossible: Conditions
    settles_s: float = 0.0


def _case_of_a_switch(rule: str, field: str, required: str) -> Case:
    good = Conditions(**{field: True})  # type: ignore[arg-type]
    return Case(
        rule,
        dataclasses.replace(NOTHING, **{required: True}),  # type: ignore[arg-type]
        good=good,
        lost=Conditions(**{field: False}),  # type: ignore[arg-type]
        hovering=(good,),
        impossible=Conditions(broken=(BrokenReading(field, "Input/output error"),)),
        settles_s=SETTLING_S,
    )


CASES = [
    Case(
        "battery",
        dataclasses.replace(NOTHING, minimum_battery_percent=30),
        good=Conditions(battery_percent=35),
        lost=Conditions(battery_percent=29.9),
        hovering=(Conditions(battery_percent=30), Conditions(battery_percent=34.9)),
        impossible=Conditions(battery_percent=300),
    ),
    Case(
        "temperature",
        dataclasses.replace(NOTHING, maximum_temperature_celsius=45),
        good=Conditions(temperature_celsius=42),
        lost=Conditions(temperature_celsius=45.1),
        hovering=(Conditions(temperature_celsius=45), Conditions(temperature_celsius=42.1)),
        impossible=Conditions(temperature_celsius=-273.2),
    ),
    _case_of_a_switch("charging", "charging", "require_charging"),
    _case_of_a_switch("idle", "idle", "require_idle"),
    _case_of_a_switch("network", "unmetered", "require_unmetered"),
]
EACH_RULE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule)


class Device:
    """An eligibility and its two clocks."""

    def __init__(self, policy: EligibilityPolicy, *, rules: tuple[Rule, ...] | None = None) -> None:
        self.eligibility = Eligibility(policy, rules=rules)
        self.now_s = 1.8e9
        self.reasons: dict[str, str] = {}

    def blocked(self, conditions: Conditions, *, after_s: float = 0.0, local_time_s: float = NOON_S) -> list[str]:
        self.now_s += after_s
        found = self.eligibility.update(conditions, now_s=self.now_s, local_time_s=local_time_s)
        self.reasons = {blocked.rule: blocked.reason for blocked in found}
        return list(self.reasons)


Guarantee = Callable[[Case, tuple[Rule, ...]], None]


def losing_the_condition_blocks_at_once(case: Case, rules: tuple[Rule, ...]) -> None:
    device = Device(case.policy, rules=rules)
    assert device.blocked(case.good) == []
    assert device.blocked(case.lost) == [case.rule]


def hovering_at_the_limit_does_not_start_it_again(case: Case, rules: tuple[Rule, ...]) -> None:
    device = Device(case.policy, rules=rules)
    for reading in case.hovering:
        assert device.blocked(reading) == []
    device.blocked(case.lost)
    for _ in range(20):
        for reading in case.hovering:
            assert device.blocked(reading, after_s=1) == [case.rule]
        assert device.blocked(case.lost, after_s=1) == [case.rule]


def good_readings_start_it_again(case: Case, rules: tuple[Rule, ...]) -> None:
    device = Device(case.policy, rules=rules)
    assert device.blocked(case.lost) == [case.rule]
    device.blocked(case.good, after_s=1)
    assert device.blocked(case.good, after_s=case.settles_s) == []


def an_impossible_reading_blocks(case: Case, rules: tuple[Rule, ...]) -> None:
    device = Device(case.policy, rules=rules)
    assert device.blocked(case.good) == []
    assert device.blocked(case.impossible) == [case.rule]


GUARANTEES: list[Guarantee] = [
    losing_the_condition_blocks_at_once,
    hovering_at_the_limit_does_not_start_it_again,
    good_readings_start_it_again,
    an_impossible_reading_blocks,
]


def _without_hysteresis(rule: Rule) -> Rule:
    return dataclasses.replace(rule, settles_s=lambda moment: 0.0 if rule.holds(moment) else None)


def _that_ignores_its_limit(rule: Rule) -> Rule:
    return dataclasses.replace(rule, holds=lambda _: True, settles_s=lambda _: 0.0)


def _that_never_settles(rule: Rule) -> Rule:
    return dataclasses.replace(rule, settles_s=lambda _: None)


class _Credulous(Rule):
    def fault(self, moment: Moment) -> str | None:
        return None


def _that_believes_everything(rule: Rule) -> Rule:
    holds = rule.holds
    fields = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    return _Credulous(**{**fields, "holds": lambda moment: rule.fault(moment) is not None or holds(moment)})


@EACH_RULE
@pytest.mark.parametrize("guarantee", GUARANTEES, ids=lambda guarantee: guarantee.__name__)
def test_each_rule_keeps_its_guarantees(case: Case, guarantee: Guarantee) -> None:
    guarantee(case, rules_of(case.policy))


@EACH_RULE
@pytest.mark.parametrize(
    ("broken", "guarantee"),
    [
        (_without_hysteresis, hovering_at_the_limit_does_not_start_it_again),
        (_that_ignores_its_limit, losing_the_condition_blocks_at_once),
        (_that_never_settles, good_readings_start_it_again),
    ],
)
def test_a_broken_copy_of_each_rule_is_caught(case: Case, broken: Callable[[Rule], Rule], guarantee: Guarantee) -> None:
    with pytest.raises(AssertionError):
        guarantee(case, tuple(broken(rule) for rule in rules_of(case.policy)))


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.rule)
def test_a_rule_that_believes_an_impossible_number_is_caught(case: Case) -> None:
    with pytest.raises(AssertionError):
        an_impossible_reading_blocks(case, tuple(_that_believes_everything(rule) for rule in rules_of(case.policy)))


def test_the_defaults_are_those_of_the_configuration_file() -> None:
    config, policy = EligibilityConfig(), EligibilityPolicy()
    for field in dataclasses.fields(EligibilityPolicy):
        assert getattr(policy, field.name) == getattr(config, field.name), field.name


def test_a_device_that_starts_fully_eligible_may_train_at_its_first_reading() -> None:
    conditions = Conditions(
        battery_percent=30, charging=False, idle=True, unmetered=True, temperature_celsius=45, broken=()
    )
    assert Device(EligibilityPolicy()).blocked(conditions) == []


def test_a_machine_without_sensors_is_not_held_up() -> None:
    assert Device(EligibilityPolicy(require_charging=True)).blocked(Conditions()) == []


def test_everything_that_blocks_is_named_in_the_order_of_the_rules() -> None:
    policy = EligibilityPolicy(require_charging=True, windows=(TimeWindow(0, 3600),))
    conditions = Conditions(battery_percent=3, charging=False, idle=False, unmetered=False, temperature_celsius=60)
    assert Device(policy).blocked(conditions) == [
        "battery",
        "charging",
        "idle",
        "network",
        "temperature",
        "time_window",
    ]


def test_only_what_the_policy_asks_for_blocks() -> None:
    conditions = Conditions(battery_percent=-3, charging=False, idle=False, unmetered=False, temperature_celsius=900)
    assert Device(NOTHING).blocked(conditions) == []


@pytest.mark.parametrize(
    ("case", "conditions", "words"),
    [
        (CASES[0], Conditions(battery_percent=27), ["27 %", "below 30 %", "again at 35 %"]),
        (CASES[0], Conditions(battery_percent=-5), ["battery's charge", "-5", "0 to 100"]),
        (CASES[1], Conditions(temperature_celsius=47.25), ["47.2 °C", "above 45 °C", "again at 42 °C"]),
        (CASES[1], Conditions(temperature_celsius=math.nan), ["temperature", "nan"]),
        (CASES[2], CASES[2].lost, ["charger is not connected", "60 s"]),
        (CASES[3], CASES[3].lost, ["device is in use", "60 s"]),
        (CASES[4], CASES[4].lost, ["network is metered", "60 s"]),
        (CASES[4], CASES[4].impossible, ["network", "Input/output error", "[board]"]),
    ],
)
def test_a_reason_gives_what_was_read_and_what_is_wanted(case: Case, conditions: Conditions, words: list[str]) -> None:
    device = Device(case.policy)
    assert device.blocked(conditions) == [case.rule]
    for word in words:
        assert word in device.reasons[case.rule]


def test_a_switch_that_settles_says_how_long_it_has_held() -> None:
    case = CASES[2]
    device = Device(case.policy)
    device.blocked(case.lost)
    device.blocked(case.good, after_s=5)
    assert device.blocked(case.good, after_s=20) == ["charging"]
    assert "20 of the 60 s" in device.reasons["charging"]


def test_a_floor_of_a_hundred_percent_can_be_reached() -> None:
    device = Device(dataclasses.replace(NOTHING, minimum_battery_percent=100))
    assert device.blocked(Conditions(battery_percent=99)) == ["battery"]
    assert device.blocked(Conditions(battery_percent=100)) == []


class TestTheChargerInPlaceOfTheFloor:
    POLICY = dataclasses.replace(NOTHING, minimum_battery_percent=30, charging_lifts_battery_floor=True)

    def test_a_charger_lifts_the_floor(self) -> None:
        assert Device(self.POLICY).blocked(Conditions(battery_percent=10, charging=True)) == []

    def test_pulling_it_below_the_floor_blocks_at_once(self) -> None:
        device = Device(self.POLICY)
        device.blocked(Conditions(battery_percent=10, charging=True))
        assert device.blocked(Conditions(battery_percent=10, charging=False), after_s=1) == ["battery"]

    def test_a_loose_plug_does_not_start_it_again(self) -> None:
        device = Device(self.POLICY)
        device.blocked(Conditions(battery_percent=10, charging=False))
        for _ in range(10):
            assert device.blocked(Conditions(battery_percent=10, charging=True), after_s=30) == ["battery"]
            assert device.blocked(Conditions(battery_percent=10, charging=False), after_s=30) == ["battery"]
        assert device.blocked(Conditions(battery_percent=10, charging=True), after_s=30) == ["battery"]
        assert device.blocked(Conditions(battery_percent=10, charging=True), after_s=SETTLING_S) == []

    def test_without_the_setting_a_charger_changes_nothing(self) -> None:
        policy = dataclasses.replace(self.POLICY, charging_lifts_battery_floor=False)
        assert Device(policy).blocked(Conditions(battery_percent=10, charging=True)) == ["battery"]


class TestBrokenSensors:
    def test_one_bad_reading_costs_a_minute_and_not_the_margin(self) -> None:
        device = Device(CASES[0].policy)
        device.blocked(Conditions(battery_percent=32))
        assert device.blocked(Conditions(battery_percent=math.nan), after_s=1) == ["battery"]
        assert device.blocked(Conditions(battery_percent=32), after_s=1) == ["battery"]
        assert "read well for 0 of the 60 s" in device.reasons["battery"]
        assert device.blocked(Conditions(battery_percent=32), after_s=SETTLING_S) == []

    def test_the_margin_outlasts_a_bad_reading(self) -> None:
        device = Device(CASES[0].policy)
        device.blocked(Conditions(battery_percent=29))
        device.blocked(Conditions(battery_percent=math.nan), after_s=1)
        device.blocked(Conditions(battery_percent=32), after_s=1)
        assert device.blocked(Conditions(battery_percent=32), after_s=HOUR_S) == ["battery"]

    @EACH_RULE
    def test_a_sensor_that_was_there_and_is_missing_blocks(self, case: Case) -> None:
        device = Device(case.policy)
        assert device.blocked(case.good) == []
        assert device.blocked(Conditions(), after_s=1) == [case.rule]
        assert "now there is none" in device.reasons[case.rule]

    @EACH_RULE
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e9, 1e9])
    def test_a_number_that_cannot_be_blocks_under_the_rules_name(self, case: Case, value: float) -> None:
        field = rules_of(case.policy)[0].reading
        assert field is not None
        assert Device(case.policy).blocked(Conditions(**{field: value})) == [case.rule]  # type: ignore[arg-type]


class TestClocksThatJump:
    @EACH_RULE
    @pytest.mark.parametrize("jump_s", [-1.0, -HOUR_S, -10 * 365 * 24 * HOUR_S])
    def test_a_clock_set_back_does_not_hold_training_up_for_longer(self, case: Case, jump_s: float) -> None:
        device = Device(case.policy)
        device.blocked(case.lost)
        device.blocked(case.good, after_s=1)
        device.blocked(case.good, after_s=case.settles_s / 2)
        device.blocked(case.good, after_s=jump_s)
        assert device.blocked(case.good, after_s=case.settles_s / 2) == []

    def test_a_clock_that_is_set_back_again_and_again_still_counts_forward_time(self) -> None:
        case = CASES[3]
        device = Device(case.policy)
        device.blocked(case.lost)
        device.blocked(case.good)
        for _ in range(6):
            assert device.blocked(case.good, after_s=-HOUR_S) == ["idle"]
            found = device.blocked(case.good, after_s=SETTLING_S / 6)
        assert found == []

    def test_one_good_reading_is_not_enough_however_far_the_clock_jumps(self) -> None:
        case = CASES[3]
        device = Device(case.policy)
        device.blocked(case.lost)
        assert device.blocked(case.good, after_s=10 * 365 * 24 * HOUR_S) == ["idle"]


readings = st.builds(
    Conditions,
    battery_percent=st.none() | st.floats() | st.floats(0, 100),
    charging=st.none() | st.booleans(),
    idle=st.none() | st.booleans(),
    unmetered=st.none() | st.booleans(),
    temperature_celsius=st.none() | st.floats() | st.floats(20, 60),
)
GOOD = Conditions(battery_percent=90, charging=True, idle=True, unmetered=True, temperature_celsius=30)
STRICT = EligibilityPolicy(require_charging=True, windows=(TimeWindow(0, 43_200),))


@given(history=st.lists(st.tuples(readings, st.floats(-1e12, 1e12), st.floats(-1e6, 1e6))))
def test_no_history_of_readings_and_clocks_leaves_it_stuck(history: list[tuple[Conditions, float, float]]) -> None:
    eligibility = Eligibility(STRICT)
    now_s = 0.0
    for conditions, now_s, local_time_s in history:
        eligibility.update(conditions, now_s=now_s, local_time_s=local_time_s)
    # From its last time, or where adding a minute to that changes nothing, from another.
    now_s = now_s if abs(now_s) < 1e9 else 0.0
    eligibility.update(GOOD, now_s=now_s, local_time_s=0)
    assert eligibility.update(GOOD, now_s=now_s + SETTLING_S, local_time_s=0) == ()


@given(history=st.lists(readings), last=readings)
def test_no_history_lets_it_train_below_the_floor_or_with_a_broken_sensor(
    history: list[Conditions], last: Conditions
) -> None:
    eligibility = Eligibility(STRICT)
    for step, conditions in enumerate([*history, last]):
        found = eligibility.update(conditions, now_s=100.0 * step, local_time_s=0)
    names = {blocked.rule for blocked in found}
    if last.battery_percent is not None and not 30 <= last.battery_percent <= 100:
        assert "battery" in names
    if last.temperature_celsius is not None and not -60 <= last.temperature_celsius <= 45:
        assert "temperature" in names
    assert ("idle" in names) >= (last.idle is False)
    assert ("charging" in names) >= (last.charging is False)
    assert ("network" in names) >= (last.unmetered is False)


class TestTimeWindows:
    def test_a_window_over_midnight(self) -> None:
        device = Device(dataclasses.replace(NOTHING, windows=(parse_window("22:00-06:00"),)))
        hours = [hour for hour in range(24) if not device.blocked(Conditions(), local_time_s=hour * HOUR_S)]
        assert hours == [0, 1, 2, 3, 4, 5, 22, 23]

    def test_a_window_that_does_not_know_of_midnight_is_caught(self) -> None:
        class Naive(TimeWindow):
            def __contains__(self, local_time_s: float) -> bool:
                return self.start_s <= local_time_s < self.end_s

        device = Device(dataclasses.replace(NOTHING, windows=(Naive(22 * 3600, 6 * 3600),)))
        hours = [hour for hour in range(24) if not device.blocked(Conditions(), local_time_s=hour * HOUR_S)]
        assert hours != [0, 1, 2, 3, 4, 5, 22, 23]

    def test_several_windows_and_what_is_said_outside_them(self) -> None:
        windows = (parse_window("01:00-02:00"), parse_window("13:00-14:30"))
        device = Device(dataclasses.replace(NOTHING, windows=windows))
        assert device.blocked(Conditions(), local_time_s=14 * HOUR_S) == []
        assert device.blocked(Conditions(), local_time_s=14 * HOUR_S + 1865) == ["time_window"]
        assert device.reasons["time_window"] == "it is 14:31; training may run at 01:00-02:00, 13:00-14:30 only"

    def test_the_whole_day_is_a_window(self) -> None:
        assert all(second in parse_window("00:00-24:00") for second in (0, 1, 43_200, 86_399.999))

    def test_the_time_of_day_wraps(self) -> None:
        device = Device(dataclasses.replace(NOTHING, windows=(parse_window("00:00-01:00"),)))
        assert device.blocked(Conditions(), local_time_s=86_400) == []
        assert device.blocked(Conditions(), local_time_s=-1) == ["time_window"]

    def test_a_time_of_day_that_is_no_number_blocks(self) -> None:
        device = Device(dataclasses.replace(NOTHING, windows=(parse_window("00:00-24:00"),)))
        assert device.blocked(Conditions(), local_time_s=math.nan) == ["time_window"]

    @pytest.mark.parametrize(
        "text",
        [
            *("", "22:00", "22:00-", "25:00-06:00", "22:60-06:00", "24:00-06:00", "06:00-24:01", "22-6", "06:00-06:00"),
            *("night", "٢٢:٠٠-٠٦:٠٠", "22:00-06:00 daily", "22:00–06:00"),
        ],
    )
    def test_what_is_no_window_is_named(self, text: str) -> None:
        with pytest.raises(LocalMisuseError, match="22:00-06:00") as caught:
            parse_window(text)
        assert repr(text) in str(caught.value)

    @given(
        start=st.integers(0, 1439),
        end=st.integers(0, 1440),
        now_s=st.floats(0, 86_400, exclude_max=True),
    )
    def test_a_window_and_the_one_from_its_end_to_its_start_share_the_day(
        self, start: int, end: int, now_s: float
    ) -> None:
        if start == end % 1440:
            return
        window, rest = TimeWindow(start * 60, end * 60), TimeWindow(end % 1440 * 60, start * 60)
        assert (now_s in window) != (now_s in rest)
        assert parse_window(str(window)) == window


@pytest.mark.parametrize("percent", [-1, 101, math.nan, math.inf])
def test_a_floor_that_is_no_percentage_is_refused(percent: float) -> None:
    with pytest.raises(LocalMisuseError, match="minimum_battery_percent"):
        EligibilityPolicy(minimum_battery_percent=percent)


def test_a_ceiling_that_is_no_number_is_refused() -> None:
    with pytest.raises(LocalMisuseError, match="maximum_temperature_celsius"):
        EligibilityPolicy(maximum_temperature_celsius=math.nan)
