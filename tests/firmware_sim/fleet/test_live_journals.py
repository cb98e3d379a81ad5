"""What processes tell becomes what a virtual run would have counted."""

from __future__ import annotations

from typing import Any

import pytest

from firmware_sim.fleet.live_journals import PROFILE, LiveJournals
from firmware_sim.fleet_metrics import FleetRound
from firmware_sim.settings import AGGREGATOR

BEGAN_S = 1_800_000_000.0
DEVICES = ["device-0000000", "device-0000001"]


@pytest.fixture
def journals() -> LiveJournals:
    return LiveJournals(BEGAN_S, goal=2, devices=DEVICES)


def tell(journals: LiveJournals, source: str, after_s: float, event: str, **fields: Any) -> None:
    journals.take(source, {"event": event, "at_s": BEGAN_S + after_s, **fields})


def one_round(journals: LiveJournals) -> None:
    """A round of two devices, until before the receipts."""
    tell(journals, AGGREGATOR, 1.0, "round_opened", task="study", round=1, model_digest="aa")
    for name in DEVICES:
        tell(journals, name, 1.5, "study_started", study="fleet/study")
        tell(journals, name, 2.0, "model_received", round=1, bytes=1000)
        tell(journals, name, 2.5, "charged", round=1, epsilon=0.25)
        tell(journals, name, 3.0, "trained", round=1, epsilon=0.25, steps=1)
        tell(journals, name, 3.0, "update_sent", round=1, attempt=1, bytes=1500)
    tell(journals, AGGREGATOR, 4.0, "round_committed", task="study", round=1, arrived=2, bytes_up=3000, version=1)
    tell(journals, AGGREGATOR, 4.0, "task_finished", task="study", model_digest="bb")


def test_rounds_are_counted_in_seconds_since_the_beginning(journals: LiveJournals) -> None:
    one_round(journals)
    assert journals.chronicle.rounds == [
        FleetRound(
            task="study", round=1, outcome="committed", reason="", opened_s=1.0, closed_s=4.0, arrived=2, goal=2,
            bytes_up=3000,
        )
    ]  # fmt: skip
    assert journals.ended_s == 4.0


def test_a_run_is_settled_when_every_update_has_come_to_its_end(journals: LiveJournals) -> None:
    one_round(journals)
    assert not journals.is_settled
    tell(journals, DEVICES[0], 4.1, "update_delivered", round=1)
    assert not journals.is_settled
    tell(journals, DEVICES[1], 4.2, "update_refused", round=1, reason="round_closed")
    assert journals.is_settled
    assert journals.totals.deliveries == {"delivered": 1, "refused": 1}


def test_devices_are_counted_as_in_a_virtual_run(journals: LiveJournals) -> None:
    one_round(journals)
    tell(journals, DEVICES[0], 3700.0, "update_delivered", round=1)
    assert journals.totals.awake_hours == {0: 2}
    assert journals.totals.began_hours == {0: 2}
    assert journals.totals.delivered_hours == {1: 1}
    record = journals.records[DEVICES[0]]
    assert (record.profile, record.updates, record.bytes_down, record.bytes_up) == (PROFILE, 1, 1000, 1500)


def test_events_are_those_of_a_virtual_run_and_processes_that_died(journals: LiveJournals) -> None:
    one_round(journals)
    journals.happened("device-0000001 ended (code -9); starting it again", at_s=2.2)
    told = sorted((event.time_s, event.device, event.event) for event in journals.events())
    assert told == [
        (1.0, AGGREGATOR, "round_opened"),
        (2.2, "device-0000001", "crash"),
        (2.5, "device-0000000", "charged"),
        (2.5, "device-0000001", "charged"),
        (4.0, AGGREGATOR, "round_committed"),
        (4.0, AGGREGATOR, "task_finished"),
    ]


def test_helpers_and_clocks_that_round_down_change_nothing(journals: LiveJournals) -> None:
    tell(journals, "helper-a", 1.0, "round_committed", round=7)
    tell(journals, AGGREGATOR, -0.0004, "round_opened", task="study", round=1)
    assert not journals.chronicle.rounds
    assert [event.time_s for event in journals.events()] == [0.0]
