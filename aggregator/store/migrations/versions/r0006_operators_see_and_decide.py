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
    # The desk: a device is looked up by its key, and an owner's devices are counted without reading them.
    op.create_index("ix_devices_public_key", "devices", ["public_key"], if_not_exists=True)
    op.create_index("ix_enrolments_quota", "enrolments", ["owner", "state", "lasts_until_s"], if_not_exists=True)
