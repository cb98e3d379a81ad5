"""Wearers from recorded traces."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from firmware_sim.errors import TraceError
from firmware_sim.wearer.situation import Situation
from firmware_sim.wearer.trace_files import load_traces
from firmware_sim.wearer.traces import TracedWearer, parse_traces

WEEK_S = 7 * 86_400.0
TEXT = """device,time,event
a,100,charging_begins
b,50,idle_ends
a,160,idle_begins
a,160,wifi_begins
a,200,charging_ends
b,70,idle_begins
a,300,idle_ends
"""


def test_a_trace_says_when_each_interval_begins_and_ends(tmp_path: Path) -> None:
    path = tmp_path / "week.csv"
    path.write_text(TEXT)
    traces = load_traces(path)
    assert list(traces) == ["a", "b"]
    wearer = TracedWearer(traces["a"])
    at = [(time_s, wearer.situation(time_s)) for time_s in (0.0, 100.0, 160.0, 199.9, 200.0, 1e9)]
    assert [situation for _, situation in at] == [
        Situation(False, False, "away"),
        Situation(True, False, "away"),
        Situation(True, True, "home"),
        Situation(True, True, "home"),
        Situation(False, True, "home"),
        Situation(False, False, "home"),
    ]
    assert [wearer.next_change_s(time_s) for time_s in (0, 100, 160, 200, 300)] == [100, 160, 200, 300, math.inf]
    assert wearer.next_move_s(200) == math.inf
    # What began with an end had been so before; what is never mentioned never holds.
    assert TracedWearer(traces["b"]).situation(0) == Situation(False, True, "away")


def test_a_trace_that_repeats_begins_anew_after_whole_weeks() -> None:
    wearer = TracedWearer(parse_traces(TEXT.splitlines(), where="here")["a"], repeats=True)
    for time_s in (100.0, 170.0, 250.0, 350.0):
        assert wearer.situation(time_s + 3 * WEEK_S) == wearer.situation(time_s)
    assert wearer.next_change_s(WEEK_S + 210.0) == WEEK_S + 300.0
    assert wearer.next_change_s(350.0) == 100.0 + WEEK_S
    assert wearer.situation(100.0 + WEEK_S) != wearer.situation(350.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("device,when,event\n", "line 1: expected the columns device, time, event, got device, when, event"),
        ("", "line 1: expected the columns"),
        ("device,time,event\n", "at least one line"),
        ("device,time,event\na,1,idle_begins\na,soon,idle_ends\n", "line 3: expected Unix seconds .* got 'soon'"),
        ("device,time,event\na,nan,idle_begins\n", "line 2: expected Unix seconds"),
        ("device,time,event\na,1\n", "line 2: expected one of charging_begins.* got ''"),
        ("device,time,event\n,1,idle_begins\n", "line 2: expected a device's name"),
        ("device,time,event\na,5,idle_begins\na,4,idle_ends\n", "line 3: expected a time of at least 5.*sort"),
        ("device,time,event\na,5,idle_begins\na,6,idle_begins\n", "device 'a': expected idle_begins and idle_ends"),
        ('device,time,event\na,5,"idle\n', "after line 1: expected CSV"),
    ],
)
def test_a_line_that_is_not_as_described_is_named(text: str, expected: str) -> None:
    with pytest.raises(TraceError, match=expected):
        parse_traces(text.splitlines(keepends=True), where="x.csv")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"nowhere\.csv"):
        load_traces(tmp_path / "nowhere.csv")
