"""Databases of earlier versions come to the schema of this one whole, whatever happens on the way."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, Engine, create_engine, event, insert, inspect, select, text

from aggregator.adapters.local_blobs import LocalBlobs
from aggregator.errors import DatabaseError
from aggregator.server_optimisers import ServerOptimiser, state_from_bytes
from aggregator.store import schema
from aggregator.store.blobs import Blobs
from aggregator.store.database import Database
from aggregator.store.migrations import newest_revision
from aggregator.store.migrations.versions import r0001_everything_in_rows
from aggregator.task_file import read_task, write_task
from fl_protocol.errors import ConfigError
from tests.aggregator.desk import task_config
from tests.contracts.databases import new_url

D = 5
UPDATE_VALUES = b"THESE-ARE-THE-VALUES-OF-AN-UPDATE"
ROUND_SECRET = b"THIS-IS-THE-SECRET-OF-A-ROUND...."

# The statements that the version before revisions sent to SQLite.
OLD_TABLES = """
CREATE TABLE devices (device VARCHAR(64) NOT NULL, public_key BLOB NOT NULL, added_s FLOAT NOT NULL,
    PRIMARY KEY (device));
CREATE TABLE tasks (task VARCHAR(64) NOT NULL, graph_digest BLOB NOT NULL, phase VARCHAR(16) NOT NULL,
    number INTEGER NOT NULL, committed INTEGER NOT NULL, PRIMARY KEY (task));
CREATE TABLE models (task VARCHAR(64) NOT NULL, version INTEGER NOT NULL, digest BLOB NOT NULL, params BLOB NOT NULL,
    velocity BLOB NOT NULL, PRIMARY KEY (task, version));
CREATE TABLE controls (task VARCHAR(64) NOT NULL, version INTEGER NOT NULL, control BLOB NOT NULL,
    population INTEGER NOT NULL, PRIMARY KEY (task, version));
CREATE TABLE rounds (task VARCHAR(64) NOT NULL, number INTEGER NOT NULL, outcome VARCHAR(16) NOT NULL,
    reason VARCHAR(200) NOT NULL, opened_s FLOAT NOT NULL, deadline_s FLOAT NOT NULL, closed_s FLOAT,
    kem VARCHAR(32) NOT NULL, secret BLOB, PRIMARY KEY (task, number));
CREATE TABLE updates (task VARCHAR(64) NOT NULL, update_id BLOB NOT NULL, round INTEGER NOT NULL,
    device VARCHAR(64) NOT NULL, sealed_digest BLOB NOT NULL, accepted_s FLOAT NOT NULL, bytes_up INTEGER NOT NULL,
    change BLOB, PRIMARY KEY (task, update_id), UNIQUE (task, round, device));
CREATE INDEX ix_updates_round ON updates (round);
CREATE TABLE refusals (task VARCHAR(64) NOT NULL, reason VARCHAR(32) NOT NULL, times INTEGER NOT NULL,
    PRIMARY KEY (task, reason));
"""


def params(version: int) -> bytes:
    return np.full(D, version + 0.5, "<f4").tobytes()


def as_the_old_version_left_it(connection: Connection) -> None:
    """Two committed rounds, one aborted between them, one open; a second task that is finished."""
    if connection.dialect.name == "sqlite":
        for statement in OLD_TABLES.split(";"):
            connection.execute(text(statement))
    else:
        r0001_everything_in_rows.metadata.create_all(connection)
    tables = r0001_everything_in_rows.metadata.tables

    def add(name: str, *rows: dict[str, Any]) -> None:
        connection.execute(insert(tables[name]), list(rows))

    add("devices", {"device": "watch-1", "public_key": b"\x01" * 32, "added_s": 3.5})
    digest = {"graph_digest": b"\x07" * 32}
    add("tasks", {"task": "watch", "phase": "open", "number": 4, "committed": 2, **digest})
    add("tasks", {"task": "done", "phase": "finished", "number": 1, "committed": 1, **digest})
    for task, versions in (("watch", 3), ("done", 3)):
        add(
            "models",
            *(
                {"task": task, "version": v, "digest": bytes([v]) * 32, "params": params(v), "velocity": params(v + 7)}
                for v in range(versions)
            ),
        )
    add("controls", {"task": "watch", "version": 2, "control": params(9), "population": 12})
    outcomes = {1: "committed", 2: "aborted", 3: "committed", 4: "open"}
    fixed = {"kem": "x25519", "reason": ""}
    add(
        "rounds",
        *(
            {
                "task": "watch",
                "number": number,
                "outcome": outcome,
                "opened_s": 10.0 * number,
                "deadline_s": 10.0 * number + 9,
                "closed_s": None if outcome == "open" else 10.0 * number + 5,
                "secret": ROUND_SECRET if outcome == "open" else None,
                **fixed,
            }
            for number, outcome in outcomes.items()
        ),
    )
    done = {"outcome": "committed", "opened_s": 1.0, "deadline_s": 9.0, "closed_s": 5.0, "secret": None}
    add("rounds", {"task": "done", "number": 1, **done, **fixed})
    for number in (1, 3, 4):
        add(
            "updates",
            {
                "task": "watch",
                "update_id": bytes([number]) * 16,
                "round": number,
                "device": "watch-1",
                "sealed_digest": bytes([number]) * 32,
                "accepted_s": 10.0 * number + 1,
                "bytes_up": 100 + number,
                "change": UPDATE_VALUES if number == 4 else None,
            },
        )
    add("refusals", {"task": "watch", "reason": "malformed", "times": 3})


@contextmanager
def plain_engine(url: str) -> Iterator[Engine]:
    engine = create_engine(url)
    yield engine
    engine.dispose()


@pytest.fixture
def old_url(database_url: str) -> str:
    """URL of a database that the version before revisions left."""
    with plain_engine(database_url) as engine, engine.begin() as connection:
        as_the_old_version_left_it(connection)
    return database_url


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return LocalBlobs(tmp_path / "blobs")


def differences(database: Database) -> object:
    with database.reading() as connection:
        return compare_metadata(MigrationContext.configure(connection), schema.metadata)


def everything(url: str) -> dict[str, list[str]]:
    """Every table's rows."""
    with plain_engine(url) as engine, engine.connect() as connection:
        names = sorted(inspect(connection).get_table_names())
        return {name: sorted(map(repr, connection.exec_driver_sql(f"SELECT * FROM {name}"))) for name in names}  # noqa: S608


def test_a_fresh_database_has_the_schema_of_the_code(database: Database) -> None:
    assert differences(database) == []
    with database.reading() as connection:
        assert MigrationContext.configure(connection).get_current_revision() == newest_revision()


def reflected(database: Database) -> dict[str, object]:
    """What the database says of each table: columns in any order, keys, constraints and indices."""
    with database.reading() as connection:
        found = inspect(connection)
        return {
            table: (
                sorted((one["name"], str(one["type"]), one["nullable"]) for one in found.get_columns(table)),
                found.get_pk_constraint(table)["constrained_columns"],
                sorted(map(repr, found.get_unique_constraints(table))),
                sorted((str(one["name"]), one["column_names"], one["unique"]) for one in found.get_indexes(table)),
            )
            for table in found.get_table_names()
        }


def test_a_fresh_database_is_what_one_revision_after_the_other_makes_of_an_old_one(
    database: Database, request: pytest.FixtureRequest, tmp_path: Path, blobs: Blobs
) -> None:
    old = new_url(request, tmp_path, database.engine.dialect.name)
    with plain_engine(old) as engine, engine.begin() as connection:
        as_the_old_version_left_it(connection)
    migrated = Database(old, blobs=blobs)
    assert reflected(database) == reflected(migrated)
    migrated.close()


def test_a_migrated_database_has_the_schema_of_the_code(old_url: str, blobs: Blobs) -> None:
    database = Database(old_url, blobs=blobs)
    assert differences(database) == []
    with database.reading() as connection:
        assert set(inspect(connection).get_table_names()) == {*schema.metadata.tables, "alembic_version"}
        # The database's own promises are kept too: names of constraints do not tell.
        assert inspect(connection).get_pk_constraint("updates")["constrained_columns"] == ["task", "update_id"]
        unique = [found["column_names"] for found in inspect(connection).get_unique_constraints("updates")]
        assert unique == [["task", "round", "device"]]
    database.close()


def test_a_difference_between_code_and_migrations_is_caught(database: Database) -> None:
    with database.transaction() as connection:
        connection.exec_driver_sql("ALTER TABLE rounds DROP COLUMN late")
    assert differences(database)


def test_devices_receipts_and_refusals_are_kept(old_url: str, blobs: Blobs) -> None:
    database = Database(old_url, blobs=blobs)
    with database.reading() as connection:
        assert connection.execute(select(schema.devices)).all() == [("watch-1", b"\x01" * 32, 3.5)]
        assert connection.execute(select(schema.refusals)).all() == [("watch", "malformed", 3)]
        rows = connection.execute(select(schema.updates).order_by(schema.updates.c.round)).all()
    assert [tuple(row) for row in rows] == [
        (
            "watch", bytes([n]) * 16, n, n, "watch-1", bytes([n]) * 32, 10.0 * n + 1, 100 + n, None, None, None
        )
        for n in (1, 3, 4)
    ]  # fmt: skip
    database.close()


def test_models_are_kept_with_where_they_came_from(old_url: str, blobs: Blobs) -> None:
    database = Database(old_url, blobs=blobs)
    with database.reading() as connection:
        query = select(schema.models).order_by(schema.models.c.task, schema.models.c.version)
        rows = connection.execute(query).all()
    lineage = [(row.task, row.version, row.parent, row.origin, row.round, row.created_s) for row in rows]
    assert lineage == [
        ("done", 0, None, "initial", None, 1.0),
        ("done", 1, 0, "round", 1, 5.0),
        ("done", 2, 1, "average", None, 5.0),
        ("watch", 0, None, "initial", None, 10.0),
        ("watch", 1, 0, "round", 1, 15.0),
        ("watch", 2, 1, "round", 3, 35.0),
    ]
    for row in rows:
        assert row.digest == bytes([row.version]) * 32
        assert blobs.get(row.params) == params(row.version)
        if row.version:
            state = state_from_bytes(blobs.get(row.optimiser), ServerOptimiser("fedavgm"), length=D)
            assert state.velocity.tobytes() == params(row.version + 7)
    newest = rows[-1]
    assert (blobs.get(newest.control), newest.population) == (params(9), 12)
    assert [row.control for row in rows[:-1]] == [None] * 5
    assert all(msgspec.json.decode(row.metrics) == {} for row in rows)
    database.close()


def test_an_open_round_is_given_up_with_a_reason_and_without_its_key(old_url: str, blobs: Blobs) -> None:
    database = Database(old_url, blobs=blobs)
    with database.reading() as connection:
        tasks = connection.execute(select(schema.tasks).order_by(schema.tasks.c.task)).all()
        rounds = connection.execute(
            select(schema.rounds).where(schema.rounds.c.task == "watch").order_by(schema.rounds.c.number)
        ).all()
    assert [(row.task, row.spec, row.phase, row.number, row.committed, row.version) for row in tasks] == [
        ("done", "", "finished", 1, 1, 2),
        ("watch", "", "paused", 4, 2, 2),
    ]
    assert "task resume" in tasks[1].reason
    assert [(row.outcome, row.version, row.model_digest[0], row.update_length) for row in rounds] == [
        ("committed", 0, 0, D),
        ("aborted", 1, 1, D),
        ("committed", 1, 1, D),
        ("aborted", 2, 2, D),
    ]
    assert all(row.secret is None for row in rounds)
    assert "newer version" in rounds[-1].reason
    assert rounds[-1].closed_s > rounds[-1].opened_s
    database.close()


def test_a_migrated_file_holds_neither_updates_nor_keys(tmp_path: Path, blobs: Blobs) -> None:
    url = f"sqlite:///{tmp_path / 'a.db'}"
    with plain_engine(url) as engine, engine.begin() as connection:
        as_the_old_version_left_it(connection)
    raw = (tmp_path / "a.db").read_bytes()
    assert UPDATE_VALUES in raw
    assert ROUND_SECRET in raw
    database = Database(url, blobs=blobs)
    for path in tmp_path.iterdir():
        if path.is_file():
            assert UPDATE_VALUES not in path.read_bytes(), path
            assert ROUND_SECRET not in path.read_bytes(), path
    database.close()


def test_the_sums_of_a_round_that_was_open_before_they_had_a_secret_can_still_be_opened(
    old_url: str, blobs: Blobs
) -> None:
    Database(old_url, blobs=blobs).close()
    with plain_engine(old_url) as engine, engine.begin() as connection:
        at_revision_2(connection)
    database = Database(old_url, blobs=blobs)
    with database.reading() as connection:
        query = select(schema.rounds.c.outcome, schema.rounds.c.secret, schema.rounds.c.sums_secret)
        rows = connection.execute(query.order_by(schema.rounds.c.task, schema.rounds.c.number)).all()
    assert [(row.outcome, row.secret is not None, row.sums_secret == row.secret) for row in rows] == [
        ("committed", False, True),
        ("committed", True, False),  # asynchronous: late updates of it count
        ("aborted", False, True),
        ("closing", True, True),
        ("open", True, True),
    ]
    assert rows[1].sums_secret is None
    database.close()


def at_revision_2(connection: Connection) -> None:
    """Back to the schema before sums had a secret, with rounds in every state that has a key."""
    at_revision_3(connection)
    connection.execute(text("ALTER TABLE rounds DROP COLUMN sums_secret"))
    connection.execute(text("UPDATE alembic_version SET version_num = '0002'"))
    outcomes = {1: "committed", 3: "closing", 4: "open"}
    for number, outcome in outcomes.items():
        connection.execute(
            text("UPDATE rounds SET outcome = :outcome, secret = :secret WHERE task = 'watch' AND number = :number"),
            {"outcome": outcome, "secret": ROUND_SECRET, "number": number},
        )


def at_revision_3(connection: Connection) -> None:
    """Back to the schema before rounds could be secure."""
    for column in ("manifest", "asked_s"):
        connection.execute(text(f"ALTER TABLE rounds DROP COLUMN {column}"))
    connection.execute(text("UPDATE alembic_version SET version_num = '0003'"))


def test_a_task_that_named_no_engine_stays_open(old_url: str, blobs: Blobs) -> None:
    Database(old_url, blobs=blobs).close()
    before = write_task(task_config()).replace('engine = "open"\n', "")
    with plain_engine(old_url) as engine, engine.begin() as connection:
        at_revision_3(connection)
        connection.execute(text("UPDATE tasks SET spec = :spec WHERE task = 'watch'"), {"spec": before})
    with pytest.raises(ConfigError, match=r"needs a section \[secure\]"):
        read_task(before, "as it was")
    database = Database(old_url, blobs=blobs)
    with database.reading() as connection:
        specs = dict(connection.execute(select(schema.tasks.c.task, schema.tasks.c.spec)).all())
    assert read_task(specs["watch"], "as it is") == task_config()
    assert specs["done"] == ""  # from before there were files
    database.close()


def test_a_second_start_changes_nothing(old_url: str, blobs: Blobs) -> None:
    Database(old_url, blobs=blobs).close()
    before, stored = everything(old_url), sorted(blobs.stored())
    Database(old_url, blobs=blobs).close()
    assert (everything(old_url), sorted(blobs.stored())) == (before, stored)


class PowerCutError(BaseException):
    pass


@contextmanager
def power_cut(statement: int) -> Iterator[list[str]]:
    """Lose power at a statement (0-based), or at the commit after the last; yields what was executed."""
    executed: list[str] = []

    def before(_connection: object, _cursor: object, words: str, *_rest: object) -> None:
        if len(executed) == statement:
            raise PowerCutError
        executed.append(words)

    def at_commit(_connection: object) -> None:
        if len(executed) == statement:
            raise PowerCutError

    event.listen(Engine, "before_cursor_execute", before)
    event.listen(Engine, "commit", at_commit)
    try:
        yield executed
    finally:
        event.remove(Engine, "before_cursor_execute", before)
        event.remove(Engine, "commit", at_commit)


def test_power_lost_at_any_statement_leaves_the_old_database_or_the_new_one(old_url: str, blobs: Blobs) -> None:
    before, cuts = everything(old_url), 0
    for statement in range(0, 1000, 5):
        with power_cut(statement):
            try:
                Database(old_url, blobs=blobs).close()
            except PowerCutError:
                cut = True
            else:
                cut = False
        if not cut:
            break
        cuts += 1
        assert everything(old_url) == before
    else:
        pytest.fail("the migration never ended")
    assert cuts > 5
    database = Database(old_url, blobs=blobs)
    assert differences(database) == []
    with database.reading() as connection:
        row = connection.execute(select(schema.models).where(schema.models.c.version == 2)).first()
    assert row is not None
    assert blobs.get(row.params) == params(2)
    database.close()


START = """
import sys
from pathlib import Path
from aggregator.adapters.local_blobs import LocalBlobs
from aggregator.store.database import Database
sys.stdin.readline()
Database(sys.argv[1], blobs=LocalBlobs(Path(sys.argv[2]))).close()
"""


def start_at_once(url: str, folder: Path, count: int) -> None:
    """Several processes open the database in the same moment."""
    command = [sys.executable, "-c", START, url, str(folder)]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(count)
    ]
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in running:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors


def test_processes_that_start_at_once_migrate_once(old_url: str, tmp_path: Path) -> None:
    start_at_once(old_url, tmp_path / "blobs", 3)
    database = Database(old_url)
    assert differences(database) == []
    # One of them wrote every value once: 6 parameters, 4 states, 1 control variate.
    assert len(list(LocalBlobs(tmp_path / "blobs").stored())) == 11
    database.close()


def test_threads_that_open_a_fresh_database_at_once_all_get_it(database_url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        for opened in pool.map(Database, [database_url] * 4):
            assert differences(opened) == []
            opened.close()


def test_old_models_need_somewhere_to_go_and_nothing_is_lost_without_it(old_url: str, blobs: Blobs) -> None:
    before = everything(old_url)
    with pytest.raises(DatabaseError, match="needs the folder that they move to"):
        Database(old_url)
    assert everything(old_url) == before
    Database(old_url, blobs=blobs).close()


def test_a_database_of_a_newer_version_is_refused_and_left_alone(database_url: str) -> None:
    Database(database_url).close()
    with plain_engine(database_url) as engine, engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    before = everything(database_url)
    with pytest.raises(DatabaseError, match="revision 9999, from a newer version of this software"):
        Database(database_url)
    assert everything(database_url) == before
