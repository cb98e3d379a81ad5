"""What an operator sees and decides: how devices are, what was told to webhooks, who agreed to a release."""

from __future__ import annotations

from alembic import op
from sqlalchemy import MetaData

revision = "0006"
down_revision = "0005"

metadata = MetaData()


def upgrade() -> None:
    """Add the tables."""
    metadata.create_all(op.get_bind())
