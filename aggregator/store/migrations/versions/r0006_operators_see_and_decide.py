"""What an operator sees and decides: how devices are, what was told to webhooks, who agreed to a release."""

from __future__ import annotations

from alembic import op
from sqlalchemy import Column, Float, Integer, LargeBinary, MetaData, String, Table, Text

revision = "0006"
down_revision = "0005"

metadata = MetaData()
Table(
    "presence",
    metadata,
    Column("device", String(64), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("reason", String(16), nullable=False),
    Column("software", String(64), nullable=False),
    Column("since_s", Float, nullable=False),
    Column("seen_s", Float, nullable=False),
)
Table(
    "webhooks",
    metadata,
    Column("webhook", String(64), primary_key=True),
    Column("position", Integer, nullable=False),
    Column("delivered", Integer, nullable=False),
    Column("delivered_s", Float),
    Column("failures", Integer, nullable=False),
    Column("failing_s", Float),
    Column("due_s", Float, nullable=False),
    Column("problem", Text, nullable=False),
)
Table(
    "approvals",
    metadata,
    Column("task", String(64), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("account", String(64), primary_key=True),
    Column("approved_s", Float, nullable=False),
    Column("digest", LargeBinary(32), nullable=False),
)


def upgrade() -> None:
    """Add the tables. That of approvals had no user, so it is empty."""
    op.drop_table("approvals")
    metadata.create_all(op.get_bind())
    # The desk: a device is looked up by its key, and an owner's devices are counted without reading them.
    op.create_index("ix_devices_public_key", "devices", ["public_key"], if_not_exists=True)
    op.create_index("ix_enrolments_quota", "enrolments", ["owner", "state", "lasts_until_s"], if_not_exists=True)
