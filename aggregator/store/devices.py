"""The devices that may send updates, with the time that each of their names is for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, delete, func, insert, select

from aggregator.store import schema
from aggregator.store.database import Database


class RegisteredKey(NamedTuple):
    """A device's Ed25519 public key, and when its name may be used (Unix seconds)."""

    public_key: bytes
    not_before_s: float = -math.inf
    not_after_s: float = math.inf

    def holds_at(self, now_s: float) -> bool:
        """Whether it is this name's time; otherwise a device could use its whole row of pseudonyms in one round."""
        return self.not_before_s <= now_s <= self.not_after_s


_ADD = insert(schema.devices)
_FORGET = delete(schema.devices).where(schema.devices.c.device == bindparam("its_device"))
_DEVICES, _PERIODS = schema.devices.c, schema.device_periods.c
_FIND = (  # built once, for every commit asks it
    select(_DEVICES.device, _DEVICES.public_key, _PERIODS.not_before_s, _PERIODS.not_after_s)
    .select_from(schema.devices.outerjoin(schema.device_periods, _DEVICES.device == _PERIODS.device))
    .where(_DEVICES.device.in_(bindparam("names", expanding=True)))
)


class Devices:
    """The register of devices. Every method is one transaction and raises DatabaseError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, device: str, public_key: bytes, now_s: float) -> None:
        """Register a device's key, or replace it."""
        self.add_all([(device, public_key)], now_s)

    def add_all(self, devices: Iterable[tuple[str, bytes]], now_s: float) -> None:
        """Register several devices' keys, or replace them."""
        rows = [{"device": device, "public_key": key, "added_s": now_s} for device, key in devices]
        with self._database.transaction() as connection:
            if rows:
                connection.execute(_FORGET, [{"its_device": row["device"]} for row in rows])
                connection.execute(_ADD, rows)

    def remove(self, device: str) -> bool:
        """Forget a device; whether it was registered. What it has sent and was accepted stays counted."""
        with self._database.transaction() as connection:
            connection.execute(delete(schema.device_periods).where(schema.device_periods.c.device == device))
            return connection.execute(delete(schema.devices).where(schema.devices.c.device == device)).rowcount > 0

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


def find_devices(connection: Connection, names: Iterable[str]) -> dict[str, RegisteredKey]:
    """Those of these devices that are registered; part of a transaction."""
    found = {}
    for device, key, not_before_s, not_after_s in connection.execute(_FIND, {"names": list(names)}):
        limits = () if not_before_s is None else (not_before_s, not_after_s)
        found[device] = RegisteredKey(key, *limits)
    return found
