"""Rounds keep the manifest that their devices' contributions are bound to; tasks from before say that they are open.

The engine secure is the default of task files from here on; a task that was created without naming one stays what it
was.
"""

from __future__ import annotations

from alembic import op
from sqlalchemy import Column, Float, LargeBinary, column, select, table, update

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the columns, and name the engine in stored task files."""
    op.add_column("rounds", Column("manifest", LargeBinary))
    op.add_column("rounds", Column("asked_s", Float))
    tasks = table("tasks", column("task"), column("spec"))
    connection = op.get_bind()
    for task, spec in connection.execute(select(tasks.c.task, tasks.c.spec)).all():
        if spec:
            named = 'engine = "open"\n' + spec  # before the first table of the file
            connection.execute(update(tasks).where(tasks.c.task == task).values(spec=named))
