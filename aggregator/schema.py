"""The tables of the aggregator's database (SQLAlchemy Core)."""

from __future__ import annotations

from sqlalchemy import Column, Float, Integer, LargeBinary, MetaData, String, Table, UniqueConstraint

metadata = MetaData()
devices = Table(
    "devices",
    metadata,
    Column("device", String(64), primary_key=True),
    Column("public_key", LargeBinary(32), nullable=False),
    Column("added_s", Float, nullable=False),
)
# A table of its own, so that a database from before it needs no change; no row means always.
device_periods = Table(
    "device_periods",
    metadata,
    Column("device", String(64), primary_key=True),
    Column("not_before_s", Float, nullable=False),
    Column("not_after_s", Float, nullable=False),
)
tasks = Table(
    "tasks",
    metadata,
    Column("task", String(64), primary_key=True),
    Column("graph_digest", LargeBinary(32), nullable=False),
    Column("phase", String(16), nullable=False),
    Column("number", Integer, nullable=False),
    Column("committed", Integer, nullable=False),
)
models = Table(
    "models",
    metadata,
    Column("task", String(64), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("digest", LargeBinary(32), nullable=False),
    Column("params", LargeBinary, nullable=False),
    Column("velocity", LargeBinary, nullable=False),
)
# A table of its own, so that a database from before it needs no change; no row means that c is zero.
controls = Table(
    "controls",
    metadata,
    Column("task", String(64), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("control", LargeBinary, nullable=False),
    Column("population", Integer, nullable=False),
)
rounds = Table(
    "rounds",
    metadata,
    Column("task", String(64), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("outcome", String(16), nullable=False),
    Column("reason", String(200), nullable=False, default=""),
    Column("opened_s", Float, nullable=False),
    Column("deadline_s", Float, nullable=False),
    Column("closed_s", Float),
    Column("kem", String(32), nullable=False),
    Column("secret", LargeBinary),
)
updates = Table(
    "updates",
    metadata,
    Column("task", String(64), primary_key=True),
    Column("update_id", LargeBinary(16), primary_key=True),
    Column("round", Integer, nullable=False, index=True),
    Column("device", String(64), nullable=False),
    Column("sealed_digest", LargeBinary(32), nullable=False),
    Column("accepted_s", Float, nullable=False),
    Column("bytes_up", Integer, nullable=False),
    Column("change", LargeBinary),
    # Security: no update is counted twice, and no device twice in a round, whatever the code above does.
    UniqueConstraint("task", "round", "device"),
)
refusals = Table(
    "refusals",
    metadata,
    Column("task", String(64), primary_key=True),
    Column("reason", String(32), primary_key=True),
    Column("times", Integer, nullable=False),
)
