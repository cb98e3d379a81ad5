"""Alarms: a budget that runs out and devices that stay away are entries of the log, once each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import delete, insert, select, update

from aggregator.alerts import alarms
from aggregator.alerts.alarms import budget_share
from aggregator.store import schema
from tests.aggregator.api.seeded_study import MASKED, NOW_S, OPEN, SeededStudy
from tests.enrolments import broken_copy

Make = Callable[..., SeededStudy]


@pytest.fixture
def make(database_url: str) -> Iterator[Make]:
    made: list[SeededStudy] = []

    def seeded(**options: Any) -> SeededStudy:
        made.append(SeededStudy(database_url, devices=100, **options))
        return made[-1]

    yield seeded
    for one in made:
        one.store.close()


def told(study: SeededStudy, task: str, module: Any = alarms) -> list[tuple[str, str, dict[str, Any]]]:
    """Look twice; the log's alarms."""
    watch = module.Alarms(study.store, now_s=lambda: NOW_S)
    watch.look([task])
    assert watch.look([task]) == []
    entries = [*study.store.audit.page(action="privacy."), *study.store.audit.page(action="fleet.")]
    return [(one.action, one.subject, one.detail) for one in entries]


def close_a_round(study: SeededStudy, arrived: int) -> None:
    """One more round of the open task, with so many of the updates of the one before."""
    rounds, updates = schema.rounds, schema.updates
    with study.store.database.transaction() as connection:
        query = select(rounds).where(rounds.c.task == OPEN).order_by(rounds.c.number.desc()).limit(1)
        last = dict(connection.execute(query).one()._mapping)
        number = last["number"] + 1
        connection.execute(insert(rounds).values({**last, "number": number}))
        query = select(updates).where(updates.c.task == OPEN, updates.c.counted_in == 1).limit(arrived)
        rows = [dict(row._mapping) for row in connection.execute(query)]
        for n, row in enumerate(rows):
            row |= {
                "round": number,
                "counted_in": number,
                "update_id": number.to_bytes(8, "big") + n.to_bytes(8, "big"),
            }
        connection.execute(delete(updates).where(updates.c.task == OPEN, updates.c.counted_in == number))
        if rows:
            connection.execute(insert(updates), rows)


@pytest.mark.parametrize(("rounds", "is_told"), [(40, False), (62, True)])
def test_four_fifths_of_a_budget_are_told_once(make: Make, rounds: int, is_told: bool) -> None:
    study = make(rounds=2, masked_rounds=rounds, arrived=20)
    share = budget_share(study.store, MASKED)
    assert share is not None
    assert (share["epsilon"] >= 0.8 * share["budget"]) is is_told
    assert told(study, MASKED) == ([("privacy.budget_80", MASKED, share)] if is_told else [])


def test_a_task_without_a_budget_has_no_alarm(make: Make) -> None:
    study = make(rounds=2, masked_rounds=2)
    assert budget_share(study.store, OPEN) is None
    assert told(study, OPEN) == []


def check_dropouts(study: SeededStudy, module: Any) -> None:
    """A round with less than half of what rounds had is told of, one after it is not, a later one is."""
    close_a_round(study, 10)
    assert told(study, OPEN, module) == []
    close_a_round(study, 9)
    first = ("fleet.dropout", f"{OPEN}/10", {"count": 9, "expected": 20.0})
    assert told(study, OPEN, module) == [first]
    close_a_round(study, 3)
    assert told(study, OPEN, module) == [first]
    close_a_round(study, 20)
    assert told(study, OPEN, module) == [first]
    close_a_round(study, 0)
    assert len(told(study, OPEN, module)) == 2


def check_lost_rounds_tell_nothing(study: SeededStudy, module: Any) -> None:
    """Devices that stay away after a restore, whose lost rounds have no updates, are told of all the same."""
    for _ in range(6):
        close_a_round(study, 0)
    rounds = schema.rounds
    with study.store.database.transaction() as connection:
        lost = (rounds.c.task == OPEN) & (rounds.c.number > 8)
        connection.execute(update(rounds).where(lost).values(kem="", outcome="aborted"))
    close_a_round(study, 3)
    with study.store.database.transaction() as connection:
        connection.execute(update(rounds).where(rounds.c.task == OPEN, rounds.c.number == 15).values(kem="x25519"))
    assert told(study, OPEN, module) == [("fleet.dropout", f"{OPEN}/15", {"count": 3, "expected": 20.0})]


def test_lost_rounds_keep_no_alarm_silent(make: Make) -> None:
    check_lost_rounds_tell_nothing(make(rounds=8, masked_rounds=1, arrived=20), alarms)


def test_alarms_that_listen_to_lost_rounds_are_caught(make: Make) -> None:
    broken = broken_copy("aggregator.alerts.alarms", (", only_seen=True", ""))
    with pytest.raises(AssertionError):
        check_lost_rounds_tell_nothing(make(rounds=8, masked_rounds=1, arrived=20), broken)


def test_devices_that_stay_away_are_told_of_once_an_episode(make: Make) -> None:
    check_dropouts(make(rounds=8, masked_rounds=1, arrived=20), alarms)


@pytest.mark.parametrize(
    "change",
    [
        ("2 * closed[-1].arrived >= expected", "True"),
        ("2 * closed[-1].arrived >= expected", "closed[-1].arrived >= expected"),
        ("2 * closed[-2].arrived < before", "False"),
    ],
)
def test_alarms_that_are_silent_or_told_too_often_are_caught(make: Make, change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check_dropouts(make(rounds=8, masked_rounds=1, arrived=20), broken_copy("aggregator.alerts.alarms", change))


@pytest.mark.parametrize(("rounds", "arrived"), [(3, 20), (8, 5)])
def test_a_young_or_small_study_gives_no_alarm(make: Make, rounds: int, arrived: int) -> None:
    study = make(rounds=rounds, masked_rounds=1, arrived=arrived)
    close_a_round(study, 0)
    assert told(study, OPEN) == []
