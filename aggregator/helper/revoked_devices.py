"""Which devices a helper was told were thrown out, in its store: names are added, and stay for ever."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from sqlalchemy import Connection, insert, select

from aggregator.helper import schema
from aggregator.store.database import Database

_TABLE = schema.revoked_devices
_AT_ONCE = 5000  # names in one query; SQLite bounds them


class RevokedDevice(NamedTuple):
    """A name that is in no sum any more; `told_s` in Unix seconds."""

    tenant: str
    device: str
    told_s: float


class RevokedDevices:
    """See the module docstring. Every method is one transaction and raises DatabaseError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, tenant: str, devices: Iterable[str], *, now_s: float) -> int:
        """Keep names; durable on return. How many were new."""
        names = sorted(set(devices))
        with self._database.transaction() as connection:
            known = set(_among(connection, tenant, names))
            rows = [{"tenant": tenant, "device": name, "told_s": now_s} for name in names if name not in known]
            if rows:
                connection.execute(insert(_TABLE), rows)
        return len(rows)

    def among(self, tenant: str, names: Iterable[str]) -> list[str]:
        """Those of these names that were thrown out, sorted."""
        with self._database.reading() as connection:
            return sorted(_among(connection, tenant, list(names)))

    def all(self) -> list[RevokedDevice]:
        """All that are kept, by study and name."""
        query = select(_TABLE).order_by(_TABLE.c.tenant, _TABLE.c.device)
        with self._database.reading() as connection:
            return [RevokedDevice(*row) for row in connection.execute(query)]


def _among(connection: Connection, tenant: str, names: list[str]) -> list[str]:
    """Those of these names that are kept."""
    found: list[str] = []
    for start in range(0, len(names), _AT_ONCE):
        these = _TABLE.c.device.in_(names[start : start + _AT_ONCE])
        found += connection.execute(select(_TABLE.c.device).where(_TABLE.c.tenant == tenant, these)).scalars()
    return found
