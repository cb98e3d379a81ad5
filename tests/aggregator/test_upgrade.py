"""An upgrade has a backup of what was, and ends with the new schema and every row, or with the database as it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Engine, create_engine, event, insert, inspect, make_url, select, text, update

from aggregator import upgrade as upgrading
from aggregator.adapters.local_blobs import LocalBlobs
from aggregator.audit.checkpoints import origin_of
from aggregator.audit.log import AuditLog
from aggregator.audit.verification import LogKeys
from aggregator.backup_file import BackupFile
from aggregator.errors import DatabaseError
from aggregator.store import schema
from aggregator.store.blobs import Blobs
from aggregator.store.database import Database
from aggregator.store.migrations import newest_revision
from aggregator.upgrade import Upgraded, plan
from tests.aggregator.old_databases import AT_S, SECRET, database_of
from tests.aggregator.operator_desk import ROOT
from tests.contracts.databases import new_url
from tests.enrolments import broken_copy

KEYS = LogKeys(origin_of("study"), Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key(), {})
NOW_S = AT_S + 1000.0
Rows = dict[str, list[tuple[Any, ...]]]


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return LocalBlobs(tmp_path / "blobs")


@pytest.fixture(params=["0004", "0005"])
def old(request: pytest.FixtureRequest, database_url: str, blobs: Blobs) -> Iterator[Database]:
    """A database of an earlier version, opened as it is."""
    database_of(database_url, str(request.param), blobs)
    database = Database(database_url, blobs=blobs, older="leave")
    yield database
    database.close()


def everything(url: str) -> Rows:
    """Every table's rows, the revision's too."""
    engine = create_engine(url)
    with engine.connect() as connection:
        names = sorted(inspect(connection).get_table_names())
        found = {name: connection.execute(text(f"SELECT * FROM {name}")).all() for name in names}  # noqa: S608
    engine.dispose()
    return {name: sorted(map(tuple, rows), key=repr) for name, rows in found.items()}


def upgraded(
    database: Database, blobs: Blobs, folder: Path, *, module: ModuleType = upgrading, now_s: float = NOW_S
) -> Upgraded:
    done: Upgraded = module.upgrade(
        database, blobs, folder / "before.backup", keys=KEYS, actor="local:maria", now_s=now_s
    )
    return done


def test_every_row_is_there_under_the_new_schema_and_the_backup_is_of_the_old(
    old: Database, blobs: Blobs, tmp_path: Path
) -> None:
    before, revision = everything(old.url), plan(old).revision
    done = upgraded(old, blobs, tmp_path)
    after = everything(old.url)
    for name in before.keys() - {"alembic_version", "audit_entries", "audit_nodes"}:
        assert after[name] == before[name], name
    with old.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
    newest, *earlier = AuditLog(old).page()
    assert (newest.action, newest.actor) == ("database.upgraded", "local:maria")
    assert newest.detail == {"from": revision, "to": newest_revision(), "backup": "before.backup"}
    assert len(earlier) == done.log.entries == len(before.get("audit_entries", ()))
    assert plan(old).steps == []
    # The backup is one that software of that revision restores: whole, of that revision, with every row but the keys.
    assert revision is not None
    kept = BackupFile(tmp_path / "before.backup", revision=revision)
    names = {name.split("/")[1].split(".")[0] for name in kept.manifest.members if name.startswith("rows/")}
    assert names == before.keys() - {"alembic_version", "partials", "leases", "workers"}
    for name in names - {"rounds", "updates"}:
        found = list(kept.rows(schema.metadata.tables[name]))
        assert sorted((tuple(row.values()) for row in found), key=repr) == before[name], name
    assert done.rows == sum(len(rows) for name, rows in before.items() if name != "alembic_version")
    assert done.backup.blobs == 6
    raw = (tmp_path / "before.backup").read_bytes()
    assert SECRET not in raw
    assert b'"secret":null' in raw


def test_a_plan_names_the_migrations_and_changes_nothing(old: Database) -> None:
    before = everything(old.url)
    planned = plan(old)
    assert [step.revision for step in planned.steps][-1] == newest_revision() > (planned.revision or "")
    assert all(step.what.endswith(".") for step in planned.steps)
    assert everything(old.url) == before


def refused(
    old: Database, blobs: Blobs, tmp_path: Path, words: str, *, now_s: float = NOW_S, has_backup: bool = False
) -> None:
    """It is one sentence, and nothing has changed."""
    before, revision = everything(old.url), plan(old).revision
    with pytest.raises(DatabaseError, match=words) as caught:
        upgraded(old, blobs, tmp_path, now_s=now_s)
    assert f"nothing was upgraded, and the database is as it was, of revision {revision}" in str(caught.value)
    assert everything(old.url) == before
    found = {path.name for path in tmp_path.iterdir() if "backup" in path.name}
    assert found == ({"before.backup"} if has_backup else set())
    assert ("before.backup is whole" in str(caught.value)) == has_backup


def lease(**values: object) -> Callable[[Any], None]:
    row = {"worker": "worker-1", "until_s": NOW_S + 5} | values
    return lambda connection: connection.execute(insert(schema.leases).values(name="shard-01", **row))


def worker(**values: object) -> Callable[[Any], None]:
    row = {"seen_s": NOW_S - 5, "state": "ingest"} | values
    return lambda connection: connection.execute(
        insert(schema.workers).values(worker="worker-1", started_s=1.0, detail="", **row)
    )


@pytest.mark.parametrize("add", [lease(), worker()], ids=["lease", "heard of"])
def test_nothing_is_upgraded_under_a_process_that_is_at_work(
    old: Database, blobs: Blobs, tmp_path: Path, add: Callable[[Any], None]
) -> None:
    with old.transaction() as connection:
        add(connection)
    refused(old, blobs, tmp_path, "worker-1 is at work on this database")


@pytest.mark.parametrize(
    "add",
    [lease(until_s=NOW_S - 1), lease(until_s=NOW_S + 1e6), worker(seen_s=NOW_S - 16), worker(state="stopped")],
    ids=["run out", "under a clock that was wrong", "killed", "stopped"],
)
def test_one_that_is_gone_keeps_nobody_waiting(
    old: Database, blobs: Blobs, tmp_path: Path, add: Callable[[Any], None]
) -> None:
    with old.transaction() as connection:
        add(connection)
    assert upgraded(old, blobs, tmp_path).rows > 0


def test_nothing_is_upgraded_while_somebody_reads(old: Database, blobs: Blobs, tmp_path: Path) -> None:
    """The HTTP API and the desk have neither lease nor heartbeat; a connection that is open tells of them."""
    api = Database(old.url, blobs=blobs, older="leave")
    assert plan(api).steps
    words = "another process has .* open" if old.is_sqlite else "1 other connections to this database are open"
    before = everything(old.url)
    with pytest.raises(DatabaseError, match=words):
        upgraded(old, blobs, tmp_path)
    api.close()
    assert everything(old.url) == before
    assert upgraded(old, blobs, tmp_path).rows > 0


COMPANY = {
    "leases": ("if at_work:", "if False:"),
    "connections": ("if others := _other_connections(connection):", "if others := 0:"),
    "files": ("_refuse_open_file(database)\n        with", "with"),
}


@pytest.mark.parametrize("left_out", COMPANY)
def test_an_upgrade_that_does_not_look_around_is_caught(
    old: Database, blobs: Blobs, tmp_path: Path, left_out: str
) -> None:
    module = broken_copy("aggregator.upgrade", COMPANY[left_out])
    if left_out == "leases":
        with old.transaction() as connection:
            lease()(connection)
        assert upgraded(old, blobs, tmp_path, module=module).rows > 0
        return
    if old.is_sqlite != (left_out == "files"):
        pytest.skip("of the other database")
    api = Database(old.url, blobs=blobs, older="leave")
    assert plan(api).steps
    if old.is_sqlite:  # then the connection that migrates finds that it is not alone
        with pytest.raises(DatabaseError, match="database is locked"):
            upgraded(old, blobs, tmp_path, module=module)
    else:
        assert upgraded(old, blobs, tmp_path, module=module).rows > 0
    api.close()


def test_an_open_transaction_is_told_and_not_waited_for(old: Database, blobs: Blobs, tmp_path: Path) -> None:
    if old.is_sqlite:
        pytest.skip("of the other database")
    other = create_engine(old.url)
    with other.connect() as connection:
        connection.execute(select(schema.devices)).all()  # and it stays in its transaction
        refused(old, blobs, tmp_path, "1 other connections to this database are open")
        sooner = ("_LOCKS_WITHIN_S = 5", "_LOCKS_WITHIN_S = 1")
        module = broken_copy("aggregator.upgrade", COMPANY["connections"], sooner)
        with pytest.raises(DatabaseError, match=r"the table devices cannot be had .* another connection is in a trans"):
            upgraded(old, blobs, tmp_path, module=module)
    other.dispose()
    assert upgraded(old, blobs, tmp_path).rows > 0


def test_of_two_upgrades_the_later_writes_nothing(old: Database, blobs: Blobs, tmp_path: Path) -> None:
    """It looked at the database before the other one took it."""

    def other(_what: str) -> None:
        upgraded(old, blobs, tmp_path)

    module = broken_copy(
        "aggregator.upgrade", ("        database.close()", "        meanwhile('')\n        database.close()")
    )
    module.meanwhile = other  # type: ignore[attr-defined]
    with pytest.raises(DatabaseError, match="another upgrade was quicker"):
        module.upgrade(old, blobs, tmp_path / "later.backup", keys=KEYS, actor="local:maria", now_s=NOW_S)
    assert not (tmp_path / "later.backup").exists()
    assert plan(old).steps == []


def newcomer(old: Database, folder: Path) -> str:
    """What a process gets that comes while an upgrade is at work: it would write later, as its own version does."""
    code = (
        "import sys\nfrom sqlalchemy import create_engine\n"
        "engine = create_engine(sys.argv[1], connect_args={'timeout': 0})\n"
        "with engine.begin() as c: print('found', *c.exec_driver_sql('SELECT version_num FROM alembic_version').one())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, old.url], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


def check_a_newcomer_is_kept_out(old: Database, blobs: Blobs, folder: Path) -> None:
    told: list[str] = []

    def progress(what: str, _done: int, _all: int) -> None:
        if what == "backing up" and not told:
            told.append(newcomer(old, folder))

    upgrading.upgrade(
        old, blobs, folder / "before.backup", keys=KEYS, actor="local:maria", now_s=NOW_S, progress=progress
    )
    (said,) = told
    assert "database is locked" in said
    assert "found" not in said
    # And the file is everybody's again.
    assert newcomer(old, folder) == f"found {newest_revision()}\n"


def test_a_process_that_comes_while_it_is_at_work_is_kept_out(old: Database, blobs: Blobs, tmp_path: Path) -> None:
    if not old.is_sqlite:
        pytest.skip("of the other database, whose tables are locked")
    check_a_newcomer_is_kept_out(old, blobs, tmp_path)


def test_an_upgrade_that_lets_others_in_is_caught(
    old: Database, blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not old.is_sqlite:
        pytest.skip("of the other database")
    broken = broken_copy("aggregator.store.database", ("locking_mode=EXCLUSIVE", "locking_mode=NORMAL"))
    monkeypatch.setattr(Database, "migrating", broken.Database.migrating)
    monkeypatch.setattr(Database, "_patient_engine", broken.Database._patient_engine)
    with pytest.raises(AssertionError):
        check_a_newcomer_is_kept_out(old, blobs, tmp_path)


def test_a_file_that_cannot_be_written_is_told_as_what_it_is(old: Database, blobs: Blobs, tmp_path: Path) -> None:
    if not old.is_sqlite:
        pytest.skip("of the other database")
    old.close()
    name = make_url(old.url).database or ""
    Path(name).write_bytes(b"rubbish" * 1000)
    with pytest.raises(DatabaseError, match=r"cannot be written \(file is not a database\)"):
        upgrading._refuse_open_file(old)


@contextmanager
def meddling(statement: str) -> Iterator[None]:
    """A migration with a mistake: a statement more, when it makes the table of presence."""

    def after(connection: Any, _cursor: object, words: str, *_rest: object) -> None:
        if words.strip().startswith("CREATE TABLE presence"):
            connection.exec_driver_sql(statement)

    event.listen(Engine, "after_cursor_execute", after)
    try:
        yield
    finally:
        event.remove(Engine, "after_cursor_execute", after)


MISTAKES = {
    "rows": ("DELETE FROM devices WHERE device = 'watch-7'", "table devices had 300 rows and would have 299"),
    "schema": ("ALTER TABLE devices ADD COLUMN colour INTEGER", "led to another schema"),
    "log": ("UPDATE audit_entries SET actor = 'local:nobody'", "audit log would not be what it was"),
    "error": ("SELECT * FROM nowhere", "cannot be brought up to date"),
}
CHECKS = {
    "rows": ("if before[name] != after[name]:", "if False:"),
    "schema": ("    if differences:", "    if False:"),
    "log": ("if verify_log(connection, keys, progress=progress) != log:", "if False:"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_migration_that_goes_wrong_is_undone_and_its_backup_kept(
    old: Database, blobs: Blobs, tmp_path: Path, what: str
) -> None:
    if what == "log" and plan(old).revision == "0004":
        pytest.skip("it has no log")
    statement, words = MISTAKES[what]
    with meddling(statement):
        refused(old, blobs, tmp_path, words, has_backup=True)
    (tmp_path / "before.backup").unlink()
    assert upgraded(old, blobs, tmp_path).rows > 0


@pytest.mark.parametrize("what", CHECKS)
def test_an_upgrade_that_does_not_compare_is_caught(old: Database, blobs: Blobs, tmp_path: Path, what: str) -> None:
    if what == "log" and plan(old).revision == "0004":
        pytest.skip("it has no log")
    module = broken_copy("aggregator.upgrade", CHECKS[what])
    with meddling(MISTAKES[what][0]):
        assert upgraded(old, blobs, tmp_path, module=module).rows > 0


def test_a_log_that_was_tampered_with_before_is_told_and_upgraded_as_it_is(
    old: Database, blobs: Blobs, tmp_path: Path
) -> None:
    if plan(old).revision == "0004":
        pytest.skip("it has no log")
    with old.transaction() as connection:
        table = schema.audit_entries
        connection.execute(update(table).where(table.c.number == 2).values(actor="local:nobody"))
    done = upgraded(old, blobs, tmp_path)
    assert done.log.fault is not None
    assert (done.log.fault.outcome, done.log.fault.number) == ("edited", 2)


def test_a_backup_is_never_replaced_and_a_lost_model_keeps_the_database_as_it_is(
    old: Database, blobs: Blobs, tmp_path: Path
) -> None:
    before = everything(old.url)
    (tmp_path / "before.backup").write_bytes(b"last week's")
    with pytest.raises(DatabaseError, match="is not replaced"):
        upgraded(old, blobs, tmp_path)
    assert (tmp_path / "before.backup").read_bytes() == b"last week's"
    (tmp_path / "before.backup").unlink()
    with old.reading() as connection:
        lost = str(connection.execute(select(schema.models.c.params)).scalar())
    blobs.delete([lost])
    refused(old, blobs, tmp_path, f"would lack {lost}")
    assert everything(old.url) == before


UPGRADE = """
import os, resource, signal, sys
from pathlib import Path
from sqlalchemy import Engine, event
from aggregator.adapters.local_blobs import LocalBlobs
from aggregator.errors import DatabaseError
from aggregator.store.database import Database
from aggregator.upgrade import upgrade
from tests.aggregator.test_upgrade import KEYS, NOW_S
url, folder, statement, limit = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
blobs = LocalBlobs(folder / "blobs")
database = Database(url, blobs=blobs, older="leave")
executed = 0
def before(*_):
    global executed
    if executed == statement:
        os.kill(os.getpid(), signal.SIGKILL)
    executed += 1
def at_commit(_connection):
    if executed == statement:
        os.kill(os.getpid(), signal.SIGKILL)
event.listen(Engine, "before_cursor_execute", before)
event.listen(Engine, "commit", at_commit)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
path = Path(sys.argv[5]) if len(sys.argv) > 5 else folder / "before.backup"
try:
    upgrade(database, blobs, path, keys=KEYS, actor="local:maria", now_s=NOW_S)
except DatabaseError as error:
    print(error)
else:
    print("done", executed)
"""


def in_a_process(url: str, folder: Path, *, statement: int = -1, limit: int = 0) -> tuple[int, str]:
    """Exit code and words of an upgrade that is killed at a statement, or may write no file longer than a limit."""
    done = subprocess.run(
        [sys.executable, "-c", UPGRADE, url, str(folder), str(statement), str(limit)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in {0, -signal.SIGKILL}, done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize("old", ["0005"], indirect=True)
def test_an_upgrade_that_is_killed_leaves_the_old_database_and_the_next_goes_through(
    old: Database, blobs: Blobs, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    before = everything(old.url)
    old.close()
    (tmp_path / "twin").mkdir()
    twin = new_url(request, tmp_path / "twin", old.engine.dialect.name)
    database_of(twin, "0005", LocalBlobs(tmp_path / "twin" / "blobs"))
    code, words = in_a_process(twin, tmp_path / "twin")
    assert (code, words.split()[0]) == (0, "done")
    statements = int(words.split()[1])
    for share in (0.2, 0.5, 0.8, 1.0):  # the last is the commit itself
        code, words = in_a_process(old.url, tmp_path, statement=int(share * statements))
        assert code == -signal.SIGKILL, words
        assert everything(old.url) == before
        (tmp_path / "before.backup").unlink(missing_ok=True)
    assert in_a_process(old.url, tmp_path)[0] == 0
    assert plan(old).steps == []


@pytest.mark.parametrize("old", ["0004"], indirect=True)
@pytest.mark.parametrize("limit", [40_000, 100_000])
def test_a_disk_that_is_full_leaves_the_old_database(old: Database, blobs: Blobs, tmp_path: Path, limit: int) -> None:
    """The smaller limit keeps the backup from being written, the larger one SQLite's log of the migration."""
    if not old.is_sqlite and limit > 40_000:
        pytest.skip("PostgreSQL writes its files itself")
    before = everything(old.url)
    old.close()
    code, words = in_a_process(old.url, tmp_path, limit=limit)
    assert code == 0
    assert words.startswith("nothing was upgraded, and the database is as it was, of revision 0004"), words
    assert ("is whole" in words) == (limit > 40_000)
    assert everything(old.url) == before
    left = {path.name for path in tmp_path.iterdir() if "backup" in path.name}
    assert left == ({"before.backup"} if limit > 40_000 else set())


@pytest.mark.parametrize("old", ["0004"], indirect=True)
def test_a_disk_that_is_full_after_the_commit_is_told_as_what_it_is(
    old: Database, blobs: Blobs, tmp_path: Path
) -> None:
    """The log is on the disk, and the file cannot grow; whoever opens it next finds everything."""
    if not old.is_sqlite:
        pytest.skip("PostgreSQL writes its files itself")
    before = everything(old.url)
    old.close()
    code, words = in_a_process(old.url, tmp_path, limit=200_000)
    assert code == 0
    assert words.startswith(f"the database is upgraded and the backup {tmp_path / 'before.backup'} whole"), words
    assert plan(old).steps == []
    assert everything(old.url)["devices"] == before["devices"]


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(database_url: str, tmp_path: Path) -> None:
    """On a real file system of 64 KiB, where a new mount namespace can be had."""
    blobs, small = LocalBlobs(tmp_path / "blobs"), tmp_path / "small"
    small.mkdir()
    probe = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"]), "sh", "-c"]
    if subprocess.run([*probe, f"mount -t tmpfs tmpfs {small}"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    database_of(database_url, "0005", blobs)
    before = everything(database_url)
    run = f'mount -t tmpfs -o size=64k tmpfs {small} && exec {sys.executable} -c "$SCRIPT" "$@"'
    arguments = [database_url, str(tmp_path), "-1", "0", str(small / "before.backup")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SCRIPT": UPGRADE}
    done = subprocess.run([*probe, run, "sh", *arguments], capture_output=True, text=True, check=True, env=environment)
    assert "the backup needs up to" in done.stdout
    assert "0.1 MB are free; name a file on another disk with --backup" in done.stdout
    assert everything(database_url) == before


def test_a_backup_takes_no_more_disk_than_is_asked_for(old: Database, blobs: Blobs, tmp_path: Path) -> None:
    """Of ten thousand receipts, most of a real database; while it is made, its rows are on the disk twice."""
    with old.transaction() as connection:
        rows = [
            {"task": "watch", "update_id": number.to_bytes(16, "big"), "round": number, "counted_in": number,
             "device": f"p{number:032x}", "sealed_digest": bytes(32), "accepted_s": AT_S + number / 7, "bytes_up": 9}
            for number in range(100, 10_100)
        ]  # fmt: skip
        connection.execute(insert(schema.updates), rows)
    with old.reading() as connection:
        size = upgrading._bytes_of(connection)
    done = upgraded(old, blobs, tmp_path)
    assert 2 * done.backup.num_bytes <= upgrading._ROWS_TAKE * size


def test_a_database_of_an_earlier_version_is_refused_by_everything_else(old: Database, blobs: Blobs) -> None:
    before = everything(old.url)
    with pytest.raises(DatabaseError, match="stop every process that uses it and run covey-aggregator upgrade"):
        Database(old.url, blobs=blobs, older="refuse")
    assert everything(old.url) == before


def test_an_empty_database_gets_its_schema_at_once(database_url: str) -> None:
    database = Database(database_url, older="refuse")
    assert plan(database).steps == []
    with database.transaction() as connection:
        assert connection.execute(text("SELECT count(*) FROM devices")).scalar() == 0
    database.close()
