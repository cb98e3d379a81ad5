"""A device that was thrown out is in no sum, even where the aggregator has forgotten that it was: helpers have not."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import delete, insert

from aggregator.store import schema
from aggregator.store.rounds import RoundRecord
from tests.aggregator.desk import built_with
from tests.enrolments import broken_copy
from tests.system.test_secure_studies import HELPERS, secure_fleet
from tests.virtual_fleet import TASK, VirtualFleet

REVOKED = "watch-1"


def throw_out(fleet: VirtualFleet) -> None:
    """Put a device on the list of certificates that are not to be accepted."""
    now_s = fleet.clock.now_s()
    row = {"serial": "01", "device": REVOKED, "revoked_s": now_s, "not_before_s": now_s - 10, "not_after_s": 1e10}
    with fleet.store.database.transaction() as connection:
        connection.execute(insert(schema.revoked_certificates), [row])


def forget(fleet: VirtualFleet) -> None:
    """What an old backup does."""
    with fleet.store.database.transaction() as connection:
        connection.execute(delete(schema.revoked_certificates))


def known_to(fleet: VirtualFleet) -> list[str]:
    """Helpers that keep the device's name."""
    return [name for name in HELPERS if [one.device for one in fleet.helpers[name].store.revoked.all()] == [REVOKED]]


def ended(fleet: VirtualFleet) -> list[RoundRecord]:
    """Rounds that are over."""
    return [one for one in fleet.store.rounds.history(TASK) if one.outcome != "open"]


def check_a_forgotten_device_is_in_no_sum(folder: Path) -> None:
    fleet = secure_fleet(folder, devices=0)
    throw_out(fleet)
    fleet.run(until=lambda: len(known_to(fleet)) == len(HELPERS), most_s=60.0)
    assert known_to(fleet) == list(HELPERS)
    forget(fleet)
    for index in range(3):
        fleet.start_device(f"watch-{index}", minimum_helpers=2, minimum_operators=2)
    fleet.run(until=lambda: bool(ended(fleet)), most_s=300.0)
    (first, *_) = ended(fleet)
    assert first.outcome == "aborted", first
    assert "revoked_device" in first.reason
    assert REVOKED in first.reason
    assert fleet.state.committed == 0


def test_a_device_that_the_aggregator_forgot_is_in_no_sum(tmp_path: Path) -> None:
    check_a_forgotten_device_is_in_no_sum(tmp_path)


@pytest.mark.parametrize(
    ("module", "name", "change"),
    [
        (
            "aggregator.revocation_notices",
            "aggregator.assembly.RevocationNotices",
            ("self._line.tell_of_revocations(name, message)", "pass"),
        ),
        (
            "aggregator.helper.revocations",
            "aggregator.helper.answerer.Revocations",
            ("        if found:\n", "        if False:\n"),
        ),
    ],
    ids=["helpers are not told", "helpers do not mind"],
)
def test_a_study_that_sums_it_all_the_same_is_caught(
    module: str, name: str, change: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(name, getattr(broken_copy(module, change), name.rpartition(".")[2]))
    with built_with(), pytest.raises(AssertionError):
        check_a_forgotten_device_is_in_no_sum(tmp_path)
