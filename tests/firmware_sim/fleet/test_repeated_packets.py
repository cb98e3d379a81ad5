"""A network that hands every message of the devices over twice: no update counts twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from sqlalchemy import Connection

from aggregator.store.updates import NewUpdate, Updates
from tests.aggregator.desk import broken_committer
from tests.firmware_sim.fleet.small_fleets import HARDWARE, ran
from tests.firmware_sim.fleet.test_service_faults import check_every_receipt_counts_once

REPEATED = {"kind": "packets", "at_s": 0.0, "for_s": 4000.0, "repeat": 1.0, "direction": "up"}


def check_nothing_that_is_repeated_counts_twice(folder: Path) -> None:
    left = ran(folder, fault=[REPEATED], **HARDWARE)
    check_every_receipt_counts_once(left)
    assert [one.arrived for one in left.run.chronicle.rounds] == [8] * 6
    assert not left.of("update_refused")  # the same bytes of the same device: another receipt, not a replay


def test_an_update_that_the_network_repeats_counts_once(tmp_path: Path) -> None:
    check_nothing_that_is_repeated_counts_twice(tmp_path)


def test_an_aggregator_that_counts_what_the_network_repeats_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, known = Updates.add, set[bytes]()

    def add_what_is_new(self: Updates, connection: Connection, rows: Sequence[NewUpdate]) -> None:
        """Without this the database's constraints would refuse what the committer lets through."""
        fresh = {row.update_id: row for row in rows if row.update_id not in known}
        known.update(fresh)
        if fresh:
            honest(self, connection, list(fresh.values()))

    counting_twice = broken_committer(
        ("known = accepted_updates(connection, ids, tasks=of_tasks)", "known = {}"),
        ("elif other != index:", "elif False:"),
        ("if sender in batch.taken:", "if False:"),
        ("if counting in batch.counted or", "if"),
    )
    monkeypatch.setattr("aggregator.assembly.Committer", counting_twice)
    monkeypatch.setattr(Updates, "add", add_what_is_new)
    with pytest.raises(AssertionError):
        check_nothing_that_is_repeated_counts_twice(tmp_path)
