"""The devices that may send updates, with the time that each of their names is for."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, delete, func, insert, select

from aggregator.audit.entries import Detail
from aggregator.audit.log import AuditEvent, append
from aggregator.store import schema
from aggregator.store.database import Database


class RegisteredKey(NamedTuple):
    """A device's Ed25519 public key, when its name may be used (Unix seconds), and the state of its enrolment."""

    public_key: bytes
    not_before_s: float = -math.inf
    not_after_s: float = math.inf
    state: str = "active"

    def holds_at(self, now_s: float) -> bool:
        """Whether it is this name's time; otherwise a device could use its whole row of pseudonyms in one round.

        It is no time of a device's that was revoked.
        """
        return self.state != "revoked" and self.not_before_s <= now_s <= self.not_after_s

    @property
    def is_quarantined(self) -> bool:
        """Whether an operator has put the device aside."""
        return self.state == "quarantined"


_ADD = insert(schema.devices)
_FORGET = delete(schema.devices).where(schema.devices.c.device == bindparam("its_device"))
_DEVICES, _PERIODS = schema.devices.c, schema.device_periods.c
_NAMES, _ENROLMENTS = schema.enrolment_names.c, schema.enrolments.c
_FIND = (  # built once, for every commit asks it
    select(_DEVICES.device, _DEVICES.public_key, _PERIODS.not_before_s, _PERIODS.not_after_s, _ENROLMENTS.state)
    .select_from(
        schema.devices.outerjoin(schema.device_periods, _DEVICES.device == _PERIODS.device)
        .outerjoin(schema.enrolment_names, _DEVICES.device == _NAMES.device)
        .outerjoin(schema.enrolments, _NAMES.enrolment == _ENROLMENTS.enrolment)
    )
    .where(_DEVICES.device.in_(bindparam("names", expanding=True)))
)


class Devices:
    """The register of devices. Every method is one transaction and raises DatabaseError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, device: str, public_key: bytes, now_s: float, *, actor: str = "aggregator") -> None:
        """Register a device's key, or replace it; `actor` as the audit log names them."""
        self.add_all([(device, public_key)], now_s, actor=actor)

    def add_all(self, devices: Iterable[tuple[str, bytes]], now_s: float, *, actor: str = "aggregator") -> None:
        """Register several devices' keys, or replace them; `actor` as the audit log names them."""
        rows = [{"device": device, "public_key": key, "added_s": now_s} for device, key in devices]
        with self._database.transaction() as connection:
            if rows:
                connection.execute(_FORGET, [{"its_device": row["device"]} for row in rows])
                connection.execute(_ADD, rows)
                append(connection, AuditEvent(now_s, actor, *_added(rows)))

    def remove(self, device: str, now_s: float, *, actor: str = "aggregator") -> bool:
        """Forget a device; whether it was registered. What it has sent and was accepted stays counted."""
        with self._database.transaction() as connection:
            connection.execute(delete(schema.device_periods).where(schema.device_periods.c.device == device))
            known = connection.execute(delete(schema.devices).where(schema.devices.c.device == device)).rowcount > 0
            if known:
                append(connection, AuditEvent(now_s, actor, "device.removed", device, {}))
            return known

    def find(self, names: Iterable[str]) -> dict[str, RegisteredKey]:
        """Those of these devices that are registered."""
        with self._database.reading() as connection:
            return find_devices(connection, names)

    def count(self) -> int:
        """How many are registered."""
        with self._database.reading() as connection:
            return int(connection.execute(select(func.count()).select_from(schema.devices)).scalar_one())

    def all(self) -> list[tuple[str, bytes]]:
        """All registered devices with their keys, sorted."""
        with self._database.reading() as connection:
            query = select(schema.devices.c.device, schema.devices.c.public_key).order_by(schema.devices.c.device)
            return [(row.device, row.public_key) for row in connection.execute(query)]


def _added(rows: list[dict[str, Any]]) -> tuple[str, str, dict[str, Detail]]:
    """What the audit log holds of it: one device, or how many and a digest of the list, never all names."""
    if len(rows) == 1:
        key = hashlib.sha256(rows[0]["public_key"]).hexdigest()
        return "device.added", rows[0]["device"], {"key_sha256": key}
    lines = sorted(f"{row['device']},{row['public_key'].hex()}\n" for row in rows)
    return (
        "device.imported",
        "",
        {"count": len(rows), "list_sha256": hashlib.sha256("".join(lines).encode()).hexdigest()},
    )


def find_devices(connection: Connection, names: Iterable[str]) -> dict[str, RegisteredKey]:
    """Those of these devices that are registered; part of a transaction."""
    found = {}
    for device, key, not_before_s, not_after_s, state in connection.execute(_FIND, {"names": list(names)}):
        begins_s, ends_s = (-math.inf, math.inf) if not_before_s is None else (not_before_s, not_after_s)
        found[device] = RegisteredKey(key, begins_s, ends_s, state or "active")
    return found
