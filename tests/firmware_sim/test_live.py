"""The display of a run: one line a round, printed when its measurement is there, with the run's own numbers."""

from __future__ import annotations

import io

from rich.console import Console

from firmware_sim.live import LiveRounds
from firmware_sim.observation import Observation
from firmware_sim.settings import AGGREGATOR, DemoSettings
from tests.firmware_sim.runs import (
    HELD_OUT,
    SETTINGS,
    TRAINING,
    Event,
    aborted,
    accepted,
    committed,
    evaluated,
    feed,
    opened,
    unmasking,
    whole_run,
)


def shown(*events: tuple[str, Event], settings: DemoSettings = SETTINGS, terminal: bool = False) -> str:
    """What is printed when the display is refreshed after every event."""
    out = io.StringIO()
    observation = Observation(settings)
    console = Console(file=out, width=120, force_terminal=terminal)
    with LiveRounds(console, observation) as live:
        for source, event in events:
            observation.take(source, event)
            live.refresh()
    return out.getvalue()


def test_each_round_is_one_line_with_its_numbers() -> None:
    assert shown(*whole_run()).splitlines() == [
        "round   1 ━━━━━━ 16/16 48.0 kB up, unmasked in 0.4 s, accuracy 51.5 %, ε 1.15/3",
        "round   2 ━━━━━━ 16/16 48.0 kB up, unmasked in 0.3 s, accuracy 74.5 %, ε 2.15/3",
    ]


def test_a_line_of_a_round_fits_80_columns() -> None:
    assert {len(line) for line in shown(*whole_run()).splitlines()} == {79}


def test_with_the_engine_open_nothing_is_unmasked() -> None:
    settings = DemoSettings(held_out=(9, 10), rounds=2, engine="open")
    assert shown(*whole_run(settings), settings=settings).splitlines() == [
        "round   1 ━━━━━━ 16/16 48.0 kB up, accuracy 51.5 %, ε 1.15/3",
        "round   2 ━━━━━━ 16/16 48.0 kB up, accuracy 74.5 %, ε 2.15/3",
    ]


def test_a_round_waits_for_its_measurement_but_not_for_ever() -> None:
    beginning = [
        (AGGREGATOR, opened(1, digest="d0", version=0)),
        (AGGREGATOR, committed(1, digest="d1", version=1)),
        (AGGREGATOR, opened(2, digest="d1", version=1)),
        *((name, evaluated("d1", correct=50)) for name in HELD_OUT[:3]),
    ]
    assert shown(*beginning) == ""
    assert "accuracy 50.0 %" in shown(*beginning, (HELD_OUT[3], evaluated("d1", correct=50)))
    overdue = shown(
        *beginning,
        (AGGREGATOR, committed(2, digest="d2", version=2)),
        (AGGREGATOR, opened(3, digest="d2", version=2)),
    )
    assert overdue.splitlines() == ["round   1 ━━━━━━ 16/16 48.0 kB up, accuracy      –, ε 0.00/3"]


def test_an_aborted_round_says_why_and_brackets_in_the_reason_are_kept() -> None:
    text = shown(
        (AGGREGATOR, opened(1, digest="d0", version=0)),
        (AGGREGATOR, aborted(1, "expected [378] values, got [/] [red]")),
    )
    assert text == "round   1 aborted: expected [378] values, got [/] [red]\n"


def test_a_round_with_fewer_updates_has_a_shorter_bar() -> None:
    events = [
        (AGGREGATOR, opened(1, digest="d0", version=0)),
        (AGGREGATOR, committed(1, digest="d1", version=1, arrived=8)),
        *((name, evaluated("d1", correct=50)) for name in HELD_OUT),
    ]
    assert "━━━     8/16" in shown(*events)


def test_without_noise_no_privacy_is_claimed() -> None:
    settings = DemoSettings(held_out=(9, 10), rounds=2, epsilon=None)
    lines = shown(*whole_run(settings), settings=settings).splitlines()
    assert len(lines) == 2
    assert all("no privacy claimed" in line and "ε" not in line for line in lines)


def test_a_terminal_shows_the_open_round_moving() -> None:
    out = io.StringIO()
    observation = feed(Observation(SETTINGS), (AGGREGATOR, opened(1, digest="d0", version=0)))
    feed(observation, *((AGGREGATOR, accepted(1, device)) for device in TRAINING[:5]))
    with LiveRounds(Console(file=out, width=120, force_terminal=True), observation) as live:
        live.refresh()
    assert " 5/16 15.0 kB up" in out.getvalue()


def test_a_terminal_shows_what_an_open_round_waits_for() -> None:
    waiting = {
        "event": "waiting_for_helpers",
        "at_s": 1.0,
        "round": 1,
        "reason": "helper [helper-a] has published no key",
    }
    events = [(AGGREGATOR, opened(1, digest="d0", version=0)), (AGGREGATOR, waiting)]
    assert "waits: helper [helper-a] has published no key" in shown(*events, terminal=True)
    asked = [(AGGREGATOR, opened(1, digest="d0", version=0)), (AGGREGATOR, unmasking(1))]
    assert "helpers are asked" in shown(*asked, terminal=True)


def test_a_long_line_is_not_broken() -> None:
    reason = " ".join(["why"] * 60)
    events = [(AGGREGATOR, opened(1, digest="d0", version=0)), (AGGREGATOR, aborted(1, reason))]
    assert shown(*events) == f"round   1 aborted: {reason}\n"


def test_lines_of_their_own_are_shown() -> None:
    out = io.StringIO()
    with LiveRounds(Console(file=out, width=120), Observation(SETTINGS)) as live:
        live.say("aggregator ended (code -9); starting it again")
    assert out.getvalue() == "aggregator ended (code -9); starting it again\n"
