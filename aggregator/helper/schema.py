"""The tables of a helper's store (SQLAlchemy Core, SQLite)."""

from __future__ import annotations

from sqlalchemy import Column, Float, Integer, LargeBinary, MetaData, String, Table, Text, UniqueConstraint

VERSION = 2
"""Of this schema, in SQLite's `user_version`."""

metadata = MetaData()
keys = Table(
    "keys",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("kem", String(32), nullable=False),
    Column("public_digest", LargeBinary(32), nullable=False, unique=True),
    Column("secret", LargeBinary),  # erased when no request can need it any more
    Column("made_s", Float, nullable=False),
    Column("not_after_s", Float, nullable=False),
    Column("erased_s", Float),
)
# Rows stay for ever.
answers = Table(
    "answers",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("task", String(64), nullable=False),
    Column("round", Integer, nullable=False),
    Column("manifest_digest", LargeBinary(32), nullable=False),
    Column("included_digest", LargeBinary(32), nullable=False),
    Column("count", Integer, nullable=False),
    Column("answered_s", Float, nullable=False),
    Column("answer_digest", LargeBinary(32), nullable=False),
    Column("chain", LargeBinary(32), nullable=False),
    Column("answer", LargeBinary),  # dropped after some days
    # Security: one answer for a round, whatever the code above does.
    UniqueConstraint("tenant", "task", "round", name="uq_answers_round"),
)
# One row: the signature over the newest answer's chain.
heads = Table(
    "heads",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("signature", LargeBinary(64), nullable=False),
)
refusals = Table(
    "refusals",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("at_s", Float, nullable=False),
    Column("tenant", String(64), nullable=False),
    Column("task", String(64), nullable=False),
    Column("round", Integer, nullable=False),
    Column("reason", String(32), nullable=False),
    Column("detail", Text, nullable=False),
)
refusal_counts = Table(
    "refusal_counts",
    metadata,
    Column("tenant", String(64), primary_key=True),
    Column("reason", String(32), primary_key=True),
    Column("times", Integer, nullable=False),
)
# The newest checkpoint of a study's audit log that was co-signed; rows of logs that were given up stay.
cosigned_logs = Table(
    "cosigned_logs",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("tenant", String(64), nullable=False),
    Column("size", Integer, nullable=False),
    Column("root", LargeBinary(32), nullable=False),
    Column("note", Text, nullable=False),
    Column("cosigned_s", Float, nullable=False),
    Column("given_up_s", Float),
)
devices = Table(
    "devices",
    metadata,
    Column("tenant", String(64), primary_key=True),
    Column("device", String(64), primary_key=True),
    Column("public_key", LargeBinary(32), nullable=False),
)
# Security: rows are only added, and stay for ever.
revoked_devices = Table(
    "revoked_devices",
    metadata,
    Column("tenant", String(64), primary_key=True),
    Column("device", String(64), primary_key=True),
    Column("told_s", Float, nullable=False),
)
