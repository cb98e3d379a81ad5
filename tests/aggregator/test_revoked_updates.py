"""Updates of a device that is revoked while its round is open are in no model; broken copies are caught."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import insert

from aggregator import combination
from aggregator.rounds import Phase
from aggregator.store import schema
from aggregator.task_file import Rule
from tests.aggregator.small_study import SmallStudy, plain_study
from tests.enrolments import broken_copy
from tests.fl_protocol.examples import TASK

MEDIAN = Rule(name="median", mix_neighbours=False)


def revoke(study: SmallStudy, *positions: int) -> list[str]:
    """Throw out devices that have sent an update for the open round, by their place among those."""
    kept = study.store.updates
    with study.store.database.transaction() as connection:
        devices = connection.execute(
            schema.updates.select().where(schema.updates.c.counted_in == study.state.number)
        ).all()
        names = sorted(row.device for row in devices)
        chosen = [names[position] for position in positions]
        rows = [
            {
                "serial": name[:8].ljust(8, "0"),
                "device": name,
                "revoked_s": 0.0,
                "not_before_s": 0.0,
                "not_after_s": 1e12,
            }
            for name in chosen
        ]
        connection.execute(insert(schema.revoked_certificates), rows)
    assert kept.revoked(TASK, study.state.number) == sorted(chosen)
    return chosen


def outcomes(study: SmallStudy) -> list[str]:
    return [one.outcome for one in study.store.rounds.history(TASK)]


def check_a_sum_with_a_revoked_update_is_given_up_at_once(folder: Path) -> None:
    study = plain_study(folder, goal=4)
    study.plain_round([1.0, 1.0])
    revoke(study, 0)
    study.settle()
    assert outcomes(study) == ["aborted", "open"]
    (first, _) = study.store.rounds.history(TASK)
    assert "1 of its updates are of devices that were revoked" in first.reason
    assert len(study.store.models.records(TASK)) == 1


def check_a_rule_for_single_updates_goes_on_without_it(folder: Path) -> None:
    study = plain_study(folder, rule=MEDIAN, goal=5, minimum_cohort=3)
    study.plain_round([0.5, 0.25, 0.75, 100.0])
    revoke(study, 3)
    study.let_the_round_end()
    study.settle()
    assert outcomes(study)[0] == "committed", study.noted("degraded")
    assert float(study.params(1)[0]) == 0.5


def check_too_few_are_left_without_them(folder: Path) -> None:
    study = plain_study(folder, rule=MEDIAN, goal=5, minimum_cohort=3)
    study.plain_round([0.5, 0.25, 0.75])
    revoke(study, 0)
    study.let_the_round_end()
    assert outcomes(study)[0] == "aborted"
    assert "2 updates are left without those of 1 revoked" in study.store.rounds.history(TASK)[0].reason


CHECKS = (
    check_a_sum_with_a_revoked_update_is_given_up_at_once,
    check_a_rule_for_single_updates_goes_on_without_it,
    check_too_few_are_left_without_them,
)


@pytest.mark.parametrize("check", CHECKS)
def test_it_holds(check: object, tmp_path: Path) -> None:
    assert callable(check)
    check(tmp_path)


def test_a_round_in_which_nobody_was_revoked_goes_on(tmp_path: Path) -> None:
    study = plain_study(tmp_path)
    study.plain_round([0.5, 0.25, 0.75])
    revoke_later = study.state
    assert revoke_later.phase is Phase.OPEN
    assert outcomes(study) == ["committed", "open"]


@pytest.mark.parametrize(
    ("check", "change"),
    [
        (CHECKS[1], (" if one.device not in revoked]", "]")),
        (CHECKS[2], ("if revoked and len(kept) < config.minimum_cohort:", "if False:")),
    ],
    ids=["counts them", "below the floor"],
)
def test_a_combination_with_revoked_updates_is_caught(
    check: object, change: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = broken_copy("aggregator.combination", change)
    monkeypatch.setattr("aggregator.round_outcomes.combine", broken.combine)
    assert callable(check)
    with pytest.raises(AssertionError):
        check(tmp_path)


def test_a_sum_that_is_used_all_the_same_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aggregator.task_runner.adds_up", lambda config: False)
    broken = broken_copy("aggregator.combination", ("if revoked and adds_up(config):", "if False:"))
    monkeypatch.setattr("aggregator.round_outcomes.combine", broken.combine)
    with pytest.raises(AssertionError):
        check_a_sum_with_a_revoked_update_is_given_up_at_once(tmp_path)
    assert combination.adds_up is not None
