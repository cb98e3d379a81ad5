"""Databases as earlier versions left them: made by the migrations up to a revision, with rows in every table."""

from __future__ import annotations

from alembic import command
from sqlalchemy import MetaData, create_engine, insert, inspect

from aggregator.audit.log import AuditEvent, append
from aggregator.store.blobs import Blobs
from aggregator.store.database import Database
from aggregator.store.migrations import _config
from tests.aggregator.store.rows import TASK, put_all_kinds, round_row

SECRET = b"THE-SECRET-OF-A-ROUND-THAT-IS-OPEN"
AT_S = 1_790_000_000.0


def database_of(url: str, revision: str, blobs: Blobs) -> None:
    """Make one."""
    engine = create_engine(url)
    with engine.begin() as connection:
        config = _config()
        config.attributes["connection"], config.attributes["blobs"] = connection, blobs
        command.upgrade(config, revision)
    engine.dispose()
    database = Database(url, blobs=blobs, older="leave")
    put_all_kinds(database, blobs)
    with database.transaction() as connection:
        tables = MetaData()
        tables.reflect(connection)

        def add(table: str, **values: object) -> None:
            connection.execute(insert(tables.tables[table]).values(**values))

        for number in range(300):
            add("devices", device=f"watch-{number}", public_key=number.to_bytes(32, "big"), added_s=0.1 + number)
        add("rounds", **round_row(1, outcome="open", secret=SECRET, sums_secret=SECRET, closed_s=None))
        add("model_tags", task=TASK, tag="released", version=0)
        add("refusals", task=TASK, reason="malformed", times=3)
        add("leases", name="coordinator", worker="killed", until_s=AT_S)
        add("workers", worker="killed", started_s=1.0, seen_s=AT_S, state="ingest", detail="")
        add("orders", task=TASK, name="pause", argument="", asked_s=1.0, done_s=2.0, outcome="done")
        if inspect(connection).has_table("audit_entries"):
            add("owners", owner="ward-3", quota=5, created_s=1.0)
            add("accounts", account="maria", role="admin", created_s=1.0)
            for number in range(5):
                append(connection, AuditEvent(AT_S + number, "local:maria", "task.paused", TASK, {"why": "lunch"}))
    database.close()
