"""A round's sums get a secret of their own, erased when it is closed; its private key may be needed for longer.

The sums of a round that is open are stored under what was its private key alone, so that is their secret, too.
"""

from __future__ import annotations

from alembic import op
from sqlalchemy import Column, LargeBinary, column, table, update

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the column."""
    op.add_column("rounds", Column("sums_secret", LargeBinary))
    rounds = table("rounds", column("secret"), column("sums_secret"), column("outcome"))
    unfinished = rounds.c.outcome.in_(["open", "closing"])
    op.execute(update(rounds).where(unfinished).values(sums_secret=rounds.c.secret))
