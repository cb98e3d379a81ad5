"""Broker outages and kills of the aggregator in a simulated fleet: seen in the outcome, and nothing with a receipt is
lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from firmware_sim.fleet.checkpoint import latest_checkpoint
from tests.enrolments import broken_copy
from tests.firmware_sim.fleet.small_fleets import Ran, ran

OUTAGE = {"kind": "broker_restart", "at_s": 4.0, "for_s": 300.0}
KILLS = {"kind": "aggregator_kill", "every_s": 3.0, "for_s": 2.0}
LONG_OVER_S = 600.0


def check_every_receipt_counts_once(left: Ran) -> None:
    """What devices were told has arrived is what rounds had, no more and no less."""
    assert left.run.totals.deliveries == {"delivered": 48}
    assert left.arrived == left.count("update_delivered") == 48
    assert left.count("round_committed") == 6
    assert not left.of("crash")


def check_nothing_passes_a_broker_that_is_down(left: Ran) -> None:
    """No receipt reached a device, and no round came to its end, while the broker was away."""
    (down,), (up,) = left.of("broker_down"), left.of("broker_up")
    assert (down.time_s, up.time_s, down.device) == (4.0, 304.0, "broker")
    within = {event.event for event in left.events if down.time_s < event.time_s < up.time_s}
    assert not within & {"update_delivered", "round_opened"}


@pytest.mark.parametrize("keeps", [True, False])
def test_a_broker_outage_stops_the_study_and_it_goes_on_afterwards(tmp_path: Path, keeps: bool) -> None:
    left = ran(tmp_path, fault=[{**OUTAGE, "keep_retained": keeps, "keep_sessions": keeps}])
    check_nothing_passes_a_broker_that_is_down(left)
    check_every_receipt_counts_once(left)


def test_a_broker_that_hands_on_what_it_should_lose_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = broken_copy("firmware_sim.fleet.hub", ("self.broker.go_down(", "dict("))
    monkeypatch.setattr("firmware_sim.fleet.build.Hub", broken.Hub)
    deaf = broken_copy("firmware_sim.fleet.edge", ("self._is_down, now_s = True", "self._is_down, now_s = False"))
    monkeypatch.setattr("firmware_sim.fleet.shard.ShardEdge", deaf.ShardEdge)
    left = ran(tmp_path, fault=[OUTAGE])
    with pytest.raises(AssertionError):
        check_nothing_passes_a_broker_that_is_down(left)


@pytest.mark.parametrize("wire", ["on", "off"])
@pytest.mark.parametrize("for_s", [0.5, 2.0])
def test_an_aggregator_that_is_killed_again_and_again_loses_nothing_that_has_a_receipt(
    tmp_path: Path, for_s: float, wire: str
) -> None:
    left = ran(tmp_path, wire=wire, fault=[{**KILLS, "for_s": for_s}])
    assert left.count("aggregator_killed") >= 5
    assert left.count("aggregator_killed") - left.count("aggregator_started") in {0, 1}
    check_every_receipt_counts_once(left)


def test_an_aggregator_that_gives_receipts_for_what_it_has_not_stored_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = '"count": partial.num_updates}'
    broken = broken_copy("aggregator.store.updates", (counts, counts.replace("}", " - (partial.num_updates > 5)}")))
    monkeypatch.setattr("aggregator.store.updates.Updates.put_partial", broken.Updates.put_partial)
    # The sound copy is done after a minute of virtual time; this one never is.
    left = ran(tmp_path, should_stop=lambda run: run.now_s > LONG_OVER_S, fault=[KILLS])
    assert left.count("update_delivered")
    with pytest.raises(AssertionError):
        check_every_receipt_counts_once(left)


def test_a_killed_aggregator_does_nothing_until_it_is_started(tmp_path: Path) -> None:
    left = ran(tmp_path, fault=[{"kind": "aggregator_kill", "at_s": 3.0, "for_s": 120.0}])
    (killed,), (started,) = left.of("aggregator_killed"), left.of("aggregator_started")
    assert (killed.time_s, started.time_s) == (3.0, 123.0)
    assert not [
        one for one in left.of("round_opened", "round_committed") if killed.time_s < one.time_s < started.time_s
    ]
    check_every_receipt_counts_once(left)


@pytest.mark.parametrize("fault", [OUTAGE, KILLS], ids=lambda fault: str(fault["kind"]))
def test_the_same_bytes_come_out_however_many_shards_there_are(tmp_path: Path, fault: dict[str, Any]) -> None:
    assert ran(tmp_path / "one", fault=[fault]).table == ran(tmp_path / "two", shards=2, fault=[fault]).table


@pytest.mark.parametrize("fault", [{**OUTAGE, "at_s": 3.0}, {**KILLS, "every_s": None, "at_s": 3.0, "for_s": 200.0}])
def test_a_run_that_is_put_down_in_an_outage_goes_on_in_it(tmp_path: Path, fault: dict[str, Any]) -> None:
    # A round ends when the fault strikes: the run is put down then, what it struck still away.
    struck = {key: value for key, value in fault.items() if value is not None}
    whole = ran(tmp_path / "whole", fault=[struck])
    stopped = ran(tmp_path / "parts", should_stop=lambda run: run.now_s > 20.0, fault=[struck])
    assert not stopped.run.finished
    found = latest_checkpoint(tmp_path / "parts")
    assert found is not None
    assert found.now_s == 4.0
    assert found.hub.services.broker_away or found.hub.services.aggregator_away
    resumed = ran(tmp_path / "parts")
    assert resumed.table == whole.table
    check_every_receipt_counts_once(resumed)
