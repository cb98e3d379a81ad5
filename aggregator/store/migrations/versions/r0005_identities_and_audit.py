"""Identities: owners, tokens and enrolments of devices; accounts and their tokens; the audit log."""

from __future__ import annotations

from alembic import op
from sqlalchemy import Column, Float, Index, Integer, LargeBinary, MetaData, String, Table, Text

revision = "0005"
down_revision = "0004"

metadata = MetaData()
Table(
    "owners",
    metadata,
    Column("owner", String(64), primary_key=True),
    Column("quota", Integer, nullable=False),
    Column("created_s", Float, nullable=False),
)
Table(
    "enrolment_tokens",
    metadata,
    Column("digest", LargeBinary(32), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("task", String(64), nullable=False),
    Column("created_s", Float, nullable=False),
    Column("expires_s", Float, nullable=False),
    Column("withdrawn_s", Float),
    Column("used_s", Float),
    Column("enrolment", String(64)),
)
Table(
    "enrolments",
    metadata,
    Column("enrolment", String(64), primary_key=True),
    Column("task", String(64), nullable=False),
    Column("owner", String(64), nullable=False),
    Column("renewal_key", LargeBinary(32), nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("enrolled_s", Float, nullable=False),
    Column("changed_s", Float, nullable=False),
    Column("lasts_until_s", Float, nullable=False),
    Column("request_digest", LargeBinary(32), nullable=False),
    Column("answer", LargeBinary, nullable=False),
    Index("ix_enrolments_owner", "owner"),
)
Table(
    "enrolment_names",
    metadata,
    Column("device", String(64), primary_key=True),
    Column("enrolment", String(64), nullable=False),
    Column("serial", String(40), nullable=False),
    Column("not_before_s", Float, nullable=False),
    Column("not_after_s", Float, nullable=False),
    Index("ix_enrolment_names_enrolment", "enrolment"),
)
Table(
    "revoked_certificates",
    metadata,
    Column("serial", String(40), primary_key=True),
    Column("device", String(64), nullable=False),
    Column("revoked_s", Float, nullable=False),
    Column("not_before_s", Float, nullable=False),
    Column("not_after_s", Float, nullable=False),
    Column("enforced_s", Float),
)
Table(
    "accounts",
    metadata,
    Column("account", String(64), primary_key=True),
    Column("role", String(16), nullable=False),
    Column("created_s", Float, nullable=False),
    Column("disabled_s", Float),
)
Table(
    "access_tokens",
    metadata,
    Column("token", String(32), primary_key=True),
    Column("account", String(64), nullable=False),
    Column("secret_hash", Text, nullable=False),
    Column("scopes", Text, nullable=False),
    Column("note", Text, nullable=False),
    Column("created_s", Float, nullable=False),
    Column("expires_s", Float, nullable=False),
    Column("revoked_s", Float),
    Column("last_used_s", Float),
    Column("last_address", String(64), nullable=False),
    Index("ix_access_tokens_account", "account"),
)
Table(
    "audit_entries",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("at_s", Float, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("entry", LargeBinary, nullable=False),
    Column("leaf", LargeBinary(32), nullable=False),
    Index("ix_audit_entries_actor", "actor", "number"),
    Index("ix_audit_entries_action", "action", "number"),
    Index("ix_audit_entries_subject", "subject", "number"),
)
Table(
    "audit_nodes",
    metadata,
    Column("level", Integer, primary_key=True, autoincrement=False),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("hash", LargeBinary(32), nullable=False),
)
Table(
    "audit_checkpoints",
    metadata,
    Column("size", Integer, primary_key=True, autoincrement=False),
    Column("root", LargeBinary(32), nullable=False),
    Column("signed_s", Float, nullable=False),
    Column("note", Text, nullable=False),
    Column("cosignatures", Text, nullable=False),
)
Table(
    "approvals",
    metadata,
    Column("task", String(64), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("account", String(64), primary_key=True),
    Column("approved_s", Float, nullable=False),
)


def upgrade() -> None:
    """Add the tables."""
    metadata.create_all(op.get_bind())
