"""What an operator sees and decides: how devices are, what was told to webhooks, who agreed to a release."""

from __future__ import annotations

from alembic import op
from sqlalchemy import Column, Float, MetaData, String, Table

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


def upgrade() -> None:
    """Add the tables."""
    metadata.create_all(op.get_bind())
