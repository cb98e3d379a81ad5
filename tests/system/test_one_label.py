"""An update has one label in both sides' journals, from its first chunk to its receipt, and no other has it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.virtual_fleet import VirtualFleet

DEVICE_EVENTS, AGGREGATOR_EVENTS = {"update_sent", "update_delivered"}, {"update_accepted"}


def followed(fleet: VirtualFleet) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Every line that has a label: who wrote it, by label."""
    found: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for name, journal in fleet.journals.items():
        for event, fields in journal.events:
            if "update" in fields:
                found[fields["update"]].append((name, {"event": event, **fields}))
    return found


def test_an_update_is_followed_through_both_journals_over_a_kill(tmp_path: Path) -> None:
    fleet = VirtualFleet(tmp_path)
    fleet.aggregator.step()
    for _ in range(8):
        for device in fleet.devices.values():
            device.step()
    fleet.kill_aggregator()  # what was sent to it is sent again
    fleet.broker.restart(keep_retained=True)
    fleet.start_aggregator()
    fleet.run()
    labels = followed(fleet)
    accepted = fleet.journals["aggregator"].named("update_accepted")
    assert len(accepted) == len({event["update"] for event in accepted}) == 9
    for event in accepted:
        lines = labels[event["update"]]
        assert {name for name, _ in lines} == {"aggregator", event["device"]}
        assert {line["round"] for _, line in lines} == {event["round"]}
        assert {line["event"] for _, line in lines} >= DEVICE_EVENTS | AGGREGATOR_EVENTS
    # Some were sent twice, under one label.
    assert any(sum(line["event"] == "update_sent" for _, line in lines) > 1 for lines in labels.values())
