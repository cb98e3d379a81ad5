"""Fault plans: read strictly, the same for a device whatever the others are."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
import tomllib
from hypothesis import given, settings
from hypothesis import strategies as st

from firmware_sim.errors import SettingsError
from firmware_sim.faults import plan as plan_module
from firmware_sim.faults.kinds import (
    KINDS,
    BrokerRestart,
    Crash,
    EnrolmentStorm,
    Fault,
    Hang,
    OfProfile,
    Packets,
    Partition,
    SlowLoris,
    Timed,
)
from firmware_sim.faults.parsing import parse_faults
from firmware_sim.faults.plan import FaultPlan, FaultSchedule, Strike
from firmware_sim.radio.links import Interval
from fl_protocol.errors import LocalMisuseError
from tests.enrolments import broken_copy

BEGAN_S, DAY_S = 1_700_000_000.0, 86_400.0
WEEK_S = 7 * DAY_S

EVERY_KIND = """
[[fault]]
kind = "crash"
probability = 0.1
target = {profile = "watch"}
[[fault]]
kind = "hang"
at_s = 3600
for_s = 600
target = ["watch-1", "watch-2"]
[[fault]]
kind = "reboot_loop"
at_s = 0
every_s = 86400
for_s = 1800
target = 0.05
[[fault]]
kind = "clock_skew"
at_s = 100
by_s = -7200
[[fault]]
kind = "corrupted_flash"
probability = 0.01
damage = "bit_flips"
files = ["outbox/*"]
bits = 3
[[fault]]
kind = "packets"
at_s = 0
for_s = 1e6
drop = 0.01
reorder = 0.02
direction = "up"
[[fault]]
kind = "slow_loris"
at_s = 0
for_s = 1e5
gap_s = 60
target = 0.1
[[fault]]
kind = "broker_restart"
at_s = 10800
keep_retained = false
[[fault]]
kind = "aggregator_kill"
every_s = 43200
[[fault]]
kind = "partition"
at_s = 7200
for_s = 3600
target = 0.3
[[fault]]
kind = "enrolment_storm"
at_s = 60
for_s = 120
[[fault]]
kind = "time_zone_herd"
utc_offset_s = 3600
"""


def _plan(*faults: Fault, seed: int = 1, days: float = 7, module: ModuleType = plan_module) -> FaultPlan:
    plan: FaultPlan = module.FaultPlan(faults, seed=seed, began_s=BEGAN_S, ends_s=BEGAN_S + days * DAY_S)
    return plan


def _strikes(plan: FaultPlan, device: str, profile: str = "watch") -> list[Strike]:
    return plan.faults_of(device, profile).strikes(BEGAN_S, BEGAN_S + WEEK_S)


def test_every_kind_can_be_said_in_toml() -> None:
    faults = parse_faults(tomllib.loads(EVERY_KIND)["fault"])
    assert {fault.__struct_config__.tag for fault in faults} == set(KINDS)
    assert faults[0] == Crash(probability=0.1, target=OfProfile("watch"))
    assert faults == tuple(parse_faults([msgspec.to_builtins(fault) for fault in faults]))


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"kind": "flood"}, r"\[\[fault\]\] number 2: kind: expected one of aggregator_kill, .*, got 'flood'"),
        ({"at_s": 1}, "kind: expected one of .*, got None"),
        (
            {"kind": "crash", "at_s": 5, "shere": 0.3},
            r"number 2 \(crash\): shere: unknown key; allowed are at_s, every_s, probability, target, got 0.3",
        ),
        ({"kind": "crash", "at_s": -5}, r"at_s: Expected `float` >= 0.0, got -5"),
        ({"kind": "crash", "at_s": "noon"}, r"at_s: Expected `float \| null`, got `str`, got 'noon'"),
        ({"kind": "partition", "at_s": 5}, "missing required field `for_s`"),
        (
            {"kind": "partition", "at_s": 5, "for_s": 9, "target": 1.5},
            "target: Expected `float` <= 1.0; allowed are .*, got 1.5",
        ),
        (
            {"kind": "partition", "at_s": 5, "for_s": 9, "target": "some"},
            "allowed are \"all\", a share .*, got 'some'",
        ),
        ({"kind": "packets", "at_s": 5, "for_s": 9, "drop": 2}, "drop: Expected `float` <= 1.0, got 2"),
        (
            {"kind": "corrupted_flash", "at_s": 5, "damage": "fire"},
            "damage: .*; allowed are bit_flips, torn, full, read_only, got 'fire'",
        ),
        ({"kind": "crash"}, "expected at_s .with or without every_s., or every_s, or probability, got none"),
        ({"kind": "crash", "at_s": 5, "probability": 0.5}, "or probability, got {'at_s': 5.0, 'probability': 0.5}"),
        ({"kind": "crash", "at_s": math.nan}, "at_s"),
        ({"kind": "crash", "at_s": math.inf}, "at_s: expected a finite number, got inf"),
        ({"kind": "hang", "every_s": 60, "for_s": 61}, r"every_s: expected at least for_s \(61\), got 60"),
        ({"kind": "time_zone_herd", "utc_offset_s": 90_000}, "utc_offset_s: Expected `float` <= 50400.0, got 90000"),
    ],
)
def test_what_is_wrong_is_told_with_its_key_its_value_and_what_is_allowed(table: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        parse_faults([{"kind": "crash", "at_s": 5}, table])


def test_the_page_about_faults_is_right() -> None:
    page = (Path(__file__).parents[3] / "docs" / "simulation-faults.md").read_text(encoding="utf-8")
    examples = map(tomllib.loads, re.findall(r"```toml\n(.*?)```", page, re.DOTALL))
    assert [len(parse_faults(one["fault"])) for one in examples if "fault" in one] == [3]
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\|([^|]*)\|$", page, re.MULTILINE))
    common = {"at_s", "every_s", "probability", "target"}
    for name, kind in KINDS.items():
        keys = {field.name for field in msgspec.structs.fields(kind)}
        own = keys - (common if issubclass(kind, Timed) else {"at_s", "for_s"})
        assert set(re.findall(r"`(\w+)`", rows[name])) == own, name
    with pytest.raises(SettingsError) as error:
        parse_faults([{"kind": "crash", "at_s": 5}, {"kind": "crash", "at_s": 5, "shere": 0.3}])
    assert str(error.value) in page


# When.


def test_a_fault_strikes_once_or_again_and_again() -> None:
    plan = _plan(Crash(at_s=500), Crash(every_s=2 * DAY_S), Hang(at_s=600, every_s=DAY_S, for_s=60), days=3)
    times = [
        (one.starts_s - BEGAN_S, one.ends_s - one.starts_s, type(one.fault).__name__) for one in _strikes(plan, "a")
    ]
    assert times == [
        (0, 0, "Crash"), (500, 0, "Crash"), (600, 60, "Hang"), (DAY_S + 600, 60, "Hang"), (2 * DAY_S, 0, "Crash"),
        (2 * DAY_S + 600, 60, "Hang"),
    ]  # fmt: skip


def test_chance_strikes_as_often_as_was_asked() -> None:
    plan = _plan(Crash(probability=0.25))
    count = sum(len(_strikes(plan, f"watch-{number}")) for number in range(200))
    # Binomial(1400, 1/4): more than six standard deviations away has a probability of 2e-9.
    assert abs(count - 350) < 98


@given(
    seed=st.integers(0, 99), cuts=st.lists(st.floats(0, WEEK_S), max_size=6),
    probability=st.floats(0.05, 1), every_s=st.floats(7200, 2 * DAY_S), share=st.floats(0.01, 1),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_schedule_read_in_pieces_is_the_whole_schedule(
    seed: int, cuts: list[float], probability: float, every_s: float, share: float
) -> None:
    partition = Partition(at_s=50, every_s=every_s, for_s=every_s * share)
    plan = _plan(Crash(probability=probability), partition, seed=seed)
    schedule = plan.faults_of("watch-1", "watch")
    edges = [BEGAN_S, *sorted(BEGAN_S + cut for cut in cuts), BEGAN_S + WEEK_S]
    pieces = [strike for a, b in itertools.pairwise(edges) for strike in schedule.strikes(a, b)]
    whole = schedule.strikes(BEGAN_S, BEGAN_S + WEEK_S)
    assert pieces == whole
    assert _walked(schedule) == sorted({edge_s for one in whole for edge_s in (one.starts_s, one.ends_s)})


def _walked(schedule: FaultSchedule) -> list[float]:
    """All beginnings and ends, from one to the next."""
    found = [schedule.next_s(BEGAN_S - 1)]
    while found[-1] < math.inf:
        found.append(schedule.next_s(found[-1]))
    return found[:-1]


def test_a_fault_is_active_from_its_beginning_up_to_its_end() -> None:
    schedule = _plan(Hang(at_s=100, every_s=1000, for_s=50)).faults_of("a", "watch")
    assert schedule.active(Hang, BEGAN_S + 99) == []
    assert len(schedule.active(Hang, BEGAN_S + 1100)) == 1
    assert len(schedule.active(Hang, BEGAN_S + 1149)) == 1
    assert schedule.active(Hang, BEGAN_S + 1150) == []
    assert schedule.active(Partition, BEGAN_S + 1100) == []


# Whom.


def test_targets_are_shares_names_profiles_or_all() -> None:
    names = [f"watch-{number}" for number in range(1000)]

    def struck(target: Any) -> set[str]:
        plan = _plan(Crash(at_s=5, target=target))
        return {name for name in names if _strikes(plan, name)}

    assert struck("all") == set(names)
    assert struck(("watch-3", "watch-8")) == {"watch-3", "watch-8"}
    assert struck(OfProfile("watch")) == set(names)
    assert struck(OfProfile("phone")) == set()
    assert struck(0.0) == set()
    assert struck(1.0) == set(names)
    # Binomial(1000, 0.3): more than six standard deviations away has a probability of 2e-9.
    assert abs(len(struck(0.3)) - 300) < 87
    assert struck(0.1) < struck(0.3)


_FAULTS = [
    Crash(probability=0.4),
    Crash(probability=0.3, target=0.5),
    Hang(probability=0.2),
    Partition(at_s=9, for_s=9, target=0.5),
    Packets(probability=0.5, for_s=3600, drop=0.1),
    SlowLoris(probability=0.3, for_s=600),
    BrokerRestart(at_s=5),
]


def _moved(module: ModuleType, order: list[int], others: list[str]) -> bool:
    """Whether a device's strikes depend on other devices or on faults of other kinds, added before or after its own."""
    crashes = [fault for fault in _FAULTS if isinstance(fault, Crash)]
    alone = _plan(*crashes, module=module)
    added = [_FAULTS[index] for index in order if not isinstance(_FAULTS[index], Crash)]
    crowded = _plan(*added[::2], *crashes, *added[1::2], module=module)
    for other in others:
        _strikes(crowded, other)

    def of(plan: FaultPlan) -> list[Strike]:
        return [one for one in _strikes(plan, "watch-1") if isinstance(one.fault, Crash)]

    return of(alone) != of(crowded)


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(len(_FAULTS))), others=st.lists(st.text(max_size=5), max_size=4))
def test_a_device_is_struck_alike_whatever_the_others_are(order: list[int], others: list[str]) -> None:
    assert not _moved(plan_module, order, others)


def test_a_plan_whose_chances_follow_the_place_in_the_file_is_caught() -> None:
    copy = broken_copy(
        "firmware_sim.faults.plan", ('yield fault, f"{kind} {seen[kind]}"', 'yield fault, f"{sum(seen.values())}"')
    )
    assert _moved(copy, list(range(len(_FAULTS))), [])


def test_a_plan_that_strikes_all_devices_alike_is_caught() -> None:
    copy = broken_copy(
        "firmware_sim.faults.plan", ('key_of(self._seed, "fault", label, device)', 'key_of(self._seed, "fault", label)')
    )

    def alike(module: ModuleType) -> bool:
        plan = _plan(Crash(probability=0.5), module=module)
        return len({tuple(one.starts_s for one in _strikes(plan, f"watch-{number}")) for number in range(9)}) == 1

    assert alike(copy)
    assert not alike(plan_module)


def test_another_seed_gives_other_strikes() -> None:
    one, other = (_strikes(_plan(Crash(probability=0.5), seed=seed), "watch-1") for seed in (1, 2))
    assert one != other


# What is asked of a schedule.


def test_partitions_become_outages_and_skews_become_jumps() -> None:
    faults = parse_faults(tomllib.loads(EVERY_KIND)["fault"])
    plan = _plan(*faults)
    cut_off = [plan.faults_of(f"watch-{number}", "watch").outages() for number in range(300)]
    expected = [Interval(BEGAN_S + 7200, BEGAN_S + 10_800)]
    assert {len(outages) for outages in cut_off} == {0, 1}
    assert all(outages in ([], expected) for outages in cut_off)
    assert plan.faults_of("watch-1", "watch").clock_jumps() == [(BEGAN_S + 100, -7200)]


def test_packet_faults_add_up_by_direction() -> None:
    plan = _plan(
        Packets(at_s=0, for_s=100, drop=0.5, direction="up"), Packets(at_s=50, for_s=100, drop=0.5, corrupt=0.1)
    )
    schedule = plan.faults_of("a", "watch")
    assert schedule.packet_rates(BEGAN_S + 10, up=True).drop == 0.5
    assert schedule.packet_rates(BEGAN_S + 10, up=False).drop == 0
    assert schedule.packet_rates(BEGAN_S + 60, up=True).drop == 0.75
    assert schedule.packet_rates(BEGAN_S + 60, up=False).corrupt == pytest.approx(0.1)
    assert schedule.packet_rates(BEGAN_S + 160, up=True) == schedule.packet_rates(BEGAN_S - 1, up=True)


def test_services_have_a_schedule_of_their_own() -> None:
    plan = _plan(*parse_faults(tomllib.loads(EVERY_KIND)["fault"]))
    strikes = plan.service_faults().strikes(BEGAN_S, BEGAN_S + DAY_S)
    assert [(one.starts_s - BEGAN_S, type(one.fault).__name__) for one in strikes] == [
        (0, "AggregatorKill"), (10_800, "BrokerRestart"), (43_200, "AggregatorKill"),
    ]  # fmt: skip
    aimed: list[Timed] = [one.fault for one in _strikes(plan, "watch-1")]
    assert not any(isinstance(fault, BrokerRestart) for fault in aimed)


def test_a_storm_brings_everybody_within_its_time() -> None:
    plan = _plan(EnrolmentStorm(at_s=60, for_s=120))
    times = [plan.appears_s(f"watch-{number}") for number in range(100)]
    assert all(time is not None and BEGAN_S + 60 <= time < BEGAN_S + 180 for time in times)
    assert len(set(times)) == 100
    assert _plan().appears_s("watch-1") is None
    with pytest.raises(LocalMisuseError, match="expected at most one fault of the kind enrolment_storm, got 2"):
        _plan(EnrolmentStorm(for_s=1), EnrolmentStorm(for_s=2))


def test_a_herd_lives_in_one_time_zone() -> None:
    assert _plan(*parse_faults([{"kind": "time_zone_herd", "utc_offset_s": 3600}])).utc_offset_s == 3600
    assert _plan().utc_offset_s is None
