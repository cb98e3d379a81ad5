"""SQLite without syncing, for simulations: what is killed there are processes, of which a file keeps all they wrote."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, event


def trust_the_disk(engine: Engine) -> None:
    """Have every connection that an engine makes from now on sync nothing."""
    event.listen(engine, "connect", _sync_nothing)


def _sync_nothing(connection: Any, _record: object) -> None:
    connection.execute("PRAGMA synchronous=OFF")
