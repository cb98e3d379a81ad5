"""What the desk asks the database does not grow with how many devices there are: held by plans that SQLite makes."""

from __future__ import annotations

import re

import pytest
from sqlalchemy import Connection, event, text

from tests.aggregator.enrolment.desks import Asking, DeskOffice

_WHOLE_TABLE = re.compile(r"\bSCAN (devices|enrolments|enrolment_names|enrolment_tokens|device_periods)\b")


def plans_of_an_enrolment(*, without: tuple[str, ...] = ()) -> list[str]:
    """How SQLite looks up what an enrolment asks for, a line a step."""
    office, first, second = DeskOffice(), Asking("a"), Asking("b")
    assert office.ask(first, first.request(office.token())).outcome == "enrolled"
    request = second.request(office.token())
    with office.store.database.transaction() as connection:
        for name in without:
            connection.execute(text(f"DROP INDEX {name}"))
    asked: list[tuple[str, object]] = []

    def note(_c: Connection, _cursor: object, statement: str, parameters: object, *_rest: object) -> None:
        if statement.startswith("SELECT"):
            asked.append((statement, parameters))

    engine = office.store.database.engine
    event.listen(engine, "before_cursor_execute", note)
    assert office.ask(second, request).outcome == "enrolled"
    event.remove(engine, "before_cursor_execute", note)
    plans: list[str] = []
    with office.store.database.reading() as connection:
        for statement, parameters in asked:
            rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)  # type: ignore[arg-type]
            plans += [row[3] for row in rows]
    return plans


def test_an_enrolment_reads_no_whole_table_and_counts_an_owners_devices_in_an_index() -> None:
    plans = plans_of_an_enrolment()
    assert [plan for plan in plans if _WHOLE_TABLE.search(plan)] == []
    assert any("COVERING INDEX ix_enrolments_quota" in plan for plan in plans)


@pytest.mark.parametrize("index", ["ix_devices_public_key", "ix_enrolments_quota"])
def test_a_database_without_the_index_is_caught(index: str) -> None:
    """As it was: after 3,200 devices a look took 177 ms without the first, and 12 ms without the second."""
    plans = plans_of_an_enrolment(without=(index,))
    found = [plan for plan in plans if _WHOLE_TABLE.search(plan)]
    assert found or not any("ix_enrolments_quota" in plan for plan in plans)
