"""Records of sleeping devices, windows' uploads and totals, diary and chronicle, curves of accuracy."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware_sim.errors import FleetError
from firmware_sim.fleet.chronicle import Chronicle
from firmware_sim.fleet.diary import Diary
from firmware_sim.fleet.measuring import accuracy_on_curve
from firmware_sim.fleet.record import DeviceRecord, packed, unpacked
from firmware_sim.fleet.simulation import played_back, with_seed
from firmware_sim.fleet.windows import FleetEvent, Totals, Upload, WindowReport, added_up, merged_uploads
from firmware_sim.fleet_metrics import FleetRound
from firmware_sim.lasting_flash import LastingFlash
from firmware_sim.scenario.schema import Curve
from firmware_sim.virtual_flash import PAGE_BYTES

NAMES = st.text("ab/.", min_size=1, max_size=6).filter(lambda name: "//" not in name and name.strip("/") == name)
CONTENTS = st.one_of(
    st.binary(max_size=40),
    st.builds(
        lambda head, zeros, tail: head + bytes(zeros) + tail,
        st.binary(max_size=20),
        st.integers(PAGE_BYTES - 30, 2 * PAGE_BYTES + 5),
        st.binary(max_size=20),
    ),
)


@given(st.dictionaries(NAMES, CONTENTS, max_size=4))
def test_a_packed_flash_is_the_same_when_it_is_unpacked(files: dict[str, bytes]) -> None:
    flash = unpacked(packed(files))
    assert flash.image() == files
    assert packed(flash.image()) == packed(files)


def test_a_held_flash_goes_on_as_the_one_whose_image_it_has() -> None:
    first = LastingFlash()
    first.make_folder("a")
    first.write("a/b", bytes(3 * PAGE_BYTES) + b"end")
    second = LastingFlash(first.image())
    for flash in (first, second):
        flash.append("a/b", b"more")
        flash.rename("a/b", "a/c")
    assert first.image() == second.image()
    second.capacity_bytes = 3 * PAGE_BYTES + 7
    with pytest.raises(OSError, match="No space left"):
        second.append("a/c", b"x")


UPLOADS = st.lists(st.tuples(st.sampled_from([0.5, 1.0, 1.5]), st.sampled_from(["a", "b", "c"])), max_size=12).map(
    lambda pairs: [Upload(at_s, name, number, "t", b"") for number, (at_s, name) in enumerate(pairs)]
)


@given(UPLOADS, st.integers(1, 3))
def test_uploads_are_merged_the_same_way_however_many_shards_there_are(uploads: list[Upload], count: int) -> None:
    reports = [
        WindowReport(tuple(one for one in uploads if ord(one.device) % count == number), (), (), math.inf)
        for number in range(count)
    ]
    merged = merged_uploads(reports)
    assert merged == merged_uploads([WindowReport(tuple(uploads), (), (), math.inf)])
    assert [one.arrives_s for one in merged] == sorted(one.arrives_s for one in uploads)


def test_totals_of_shards_add_up() -> None:
    first = Totals(awake_hours={0: 1, 1: 2}, blocked={"idle": 3}, turns=5)
    second = Totals(awake_hours={1: 1}, deliveries={"delivered": 1}, starts=2)
    assert added_up([first, second]) == Totals(
        awake_hours={0: 1, 1: 3}, blocked={"idle": 3}, deliveries={"delivered": 1}, turns=5, starts=2
    )
    assert first.awake_hours == {0: 1, 1: 2}


def test_a_diary_counts_a_device_once_an_hour_and_an_event_each_time() -> None:
    record, totals, events, now_s = DeviceRecord(index=0, name="d", profile="p"), Totals(), list[FleetEvent](), [10.0]
    for life in range(2):
        diary = Diary(record, lambda: now_s[0], totals, events.append)
        diary.write("eligibility", at_s=0.0, blocked=["idle", "charging"])
        diary.write("eligibility", at_s=0.0, blocked=[])
        diary.write("charged", at_s=0.0, round=life + 1, epsilon=0.5)
        diary.write("update_delivered", at_s=0.0, round=life + 1)
        diary.write("update_refused", at_s=0.0, round=life + 1, reason="late: by 3 s")
        diary.write("participation_ended", at_s=0.0, round=life + 1, reason="budget: 3 of 3")
        diary.write("connected", at_s=0.0)
    now_s[0] = 3600.0
    diary.count_awake()
    assert totals == Totals(
        awake_hours={0: 1, 1: 1},
        eligible_hours={0: 1},
        began_hours={0: 1},
        delivered_hours={0: 1},
        blocked={"idle": 2, "charging": 2},
        declined={"budget": 2},
        deliveries={"delivered": 2, "refused": 2},
    )
    assert record.updates == 2
    told = [event.event for event in events]
    assert told == ["charged", "update_delivered", "update_refused", "participation_ended"] * 2
    assert events[0] == FleetEvent(10.0, "d", "p", "charged", 1, 0.5, "")


def test_a_traced_device_tells_everything() -> None:
    events: list[FleetEvent] = []
    record = DeviceRecord(index=0, name="d", profile="p")
    diary = Diary(record, lambda: 1.0, Totals(), events.append, tells_all=True)
    diary.write("connected", at_s=0.0, b=2, a=1)
    assert events == [FleetEvent(1.0, "d", "p", "connected", 0, 0.0, "a=1, b=2")]


def test_a_chronicle_has_every_round_that_ended_and_every_refusal() -> None:
    chronicle = Chronicle(began_s=1000.0, goal=5)
    chronicle.write("round_opened", at_s=1010.0, round=1)
    chronicle.write("update_refused", at_s=1011.0, device="d", reason="late", count=2)
    chronicle.write("update_refused", at_s=1012.0, device="d", reason="late")
    chronicle.write("round_committed", at_s=1020.0, round=1, version=2, arrived=4, bytes_up=9)
    chronicle.write("round_opened", at_s=1020.0, round=2)
    chronicle.write("round_aborted", at_s=1050.0, round=2, reason="too few")
    chronicle.write("lease_taken", at_s=1051.0)
    assert chronicle.refused == {"late": 3}
    assert [
        (one.round, one.outcome, one.opened_s, one.closed_s, one.arrived, one.bytes_up) for one in chronicle.rounds
    ] == [
        (1, "committed", 10.0, 20.0, 4, 9),
        (2, "aborted", 20.0, 50.0, 0, 0),
    ]
    assert chronicle.models == [(1, 2)]
    assert not chronicle.opened
    assert [event.event for event in chronicle.take_news()] == [
        "round_opened",
        "update_refused",
        "update_refused",
        "round_committed",
        "round_opened",
        "round_aborted",
    ]
    assert not chronicle.take_news()


def a_round(number: int, outcome: str, arrived: int) -> FleetRound:
    return FleetRound(
        task="t",
        round=number,
        outcome=outcome,
        reason="",
        opened_s=0.0,
        closed_s=1.0,
        arrived=arrived,
        goal=4,
        bytes_up=0,
    )


def test_accuracy_follows_the_curve_of_updates_and_an_aborted_round_has_none() -> None:
    curve = Curve(floor=0.1, ceiling=0.9, updates=10.0)
    rounds = [a_round(1, "committed", 10), a_round(2, "aborted", 100), a_round(3, "committed", 20)]
    assert accuracy_on_curve(curve, []) == []
    first, second, third = accuracy_on_curve(curve, rounds)
    assert first == (pytest.approx(0.1 + 0.8 * (1 - math.exp(-1))), None)
    assert second == (None, None)
    assert third == (pytest.approx(0.1 + 0.8 * (1 - math.exp(-3))), None)


def test_a_run_that_is_no_run_cannot_be_played_back(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="no run"):
        played_back(tmp_path / "fleet.json", [])


def test_another_seed_replaces_the_scenarios_own() -> None:
    assert with_seed('name = "x"\nseed=3\n[task]\nrounds = 1', 7) == 'seed = 7\nname = "x"\n[task]\nrounds = 1\n'
