"""What a helper keeps, in one SQLite file: its keys, what it answered, refused and co-signed, and devices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import ColumnElement, delete, func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from aggregator.errors import DatabaseError
from aggregator.helper import schema
from aggregator.helper.answer_ledger import AnswerLedger
from aggregator.helper.cosigned_logs import CosignedLogs
from aggregator.helper.revoked_devices import RevokedDevices
from aggregator.store.blobs import Blobs
from aggregator.store.database import Database
from fl_protocol.message_base import KemName

_AT_ONCE = 5000  # names in one query; SQLite bounds them


class HelperDatabase(Database):
    """An SQLite file with a helper's tables: every commit synced, freed pages overwritten (see `Database`).

    Args:
        path: made where missing, for its owner only.

    Raises:
        DatabaseError: it cannot be opened, or is from a newer version of this software.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(f"sqlite:///{path}")

    def _migrate(self, blobs: Blobs | None, *, refuses_older: bool) -> None:
        """Make the tables that are missing: version 2 has one more than version 1, and no other difference."""
        del blobs, refuses_older
        with self.transaction() as connection:
            version = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
            if version > schema.VERSION:
                raise DatabaseError(f"the store is of version {version}, and this software knows {schema.VERSION}")
            schema.metadata.create_all(connection)
            connection.exec_driver_sql(f"PRAGMA user_version={schema.VERSION}")
        self.empty_log()  # a process that was killed may have erased a key, and not emptied it


@dataclass(frozen=True)
class StoredKey:
    """An HPKE key pair of this helper.

    Args:
        number: 1 for its first.
        secret: as `RoundKey` takes it; None once it was erased.
        made_s, not_after_s, erased_s: Unix seconds.
    """

    number: int
    kem: KemName
    secret: bytes | None
    made_s: float
    not_after_s: float
    erased_s: float | None


class Keys:
    """A helper's HPKE keys. Every method is one transaction and raises DatabaseError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, kem: KemName, secret: bytes, public_digest: bytes, *, made_s: float, not_after_s: float) -> None:
        """A new key; durable on return.

        Args:
            kem: of the key.
            secret: as `RoundKey` takes it.
            public_digest: SHA-256 of its public half.
            made_s: Unix seconds.
            not_after_s: Unix seconds.
        """
        row = {"kem": kem, "secret": secret, "public_digest": public_digest, "made_s": made_s}
        with self._database.transaction() as connection:
            connection.execute(insert(schema.keys).values(**row, not_after_s=not_after_s))

    def all(self) -> list[StoredKey]:
        """All keys, erased ones too, oldest first."""
        columns = [column for column in schema.keys.c if column.name != "public_digest"]
        with self._database.reading() as connection:
            return [StoredKey(*row) for row in connection.execute(select(*columns).order_by(schema.keys.c.number))]

    def newest(self) -> StoredKey | None:
        """The key made last, if it is not erased."""
        found = self.all()
        return found[-1] if found and found[-1].secret is not None else None

    def secret_of(self, public_digest: bytes) -> bytes | None:
        """The private half of a public key; None if this helper does not have it, or not any more."""
        query = select(schema.keys.c.secret).where(schema.keys.c.public_digest == public_digest)
        with self._database.reading() as connection:
            secret = connection.execute(query).scalar_one_or_none()
        return bytes(secret) if secret is not None else None

    def erase_ended(self, before_s: float, now_s: float) -> int:
        """Overwrite the secrets of keys that ended before a time; how many. `Database.empty_log` has to follow."""
        table = schema.keys
        over = update(table).where(table.c.not_after_s < before_s, table.c.secret.is_not(None))
        with self._database.transaction() as connection:
            return connection.execute(over.values(secret=None, erased_s=now_s)).rowcount


class DeviceRegister:
    """The devices whose contributions this helper believes, by study. Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add_all(self, tenant: str, devices: Iterable[tuple[str, bytes]]) -> None:
        """Register devices' Ed25519 keys (32 bytes), or replace them. Raises DatabaseError."""
        rows = [{"tenant": tenant, "device": device, "public_key": key} for device, key in devices]
        insertion = upsert(schema.devices)
        with self._database.transaction() as connection:
            if rows:
                replaced = insertion.on_conflict_do_update(set_={"public_key": insertion.excluded.public_key})
                connection.execute(replaced, rows)

    def remove(self, tenant: str, device: str) -> bool:
        """Forget a device; whether it was known. Raises DatabaseError."""
        with self._database.transaction() as connection:
            return connection.execute(delete(schema.devices).where(_is_device(tenant, device))).rowcount > 0

    def find(self, tenant: str, names: Iterable[str]) -> dict[str, Ed25519PublicKey]:
        """Keys of those of these devices that are known. Raises DatabaseError."""
        wanted, table, found = list(names), schema.devices, {}
        with self._database.reading() as connection:
            for start in range(0, len(wanted), _AT_ONCE):
                these = table.c.device.in_(wanted[start : start + _AT_ONCE])
                query = select(table.c.device, table.c.public_key).where(table.c.tenant == tenant, these)
                found.update({name: Ed25519PublicKey.from_public_bytes(key) for name, key in connection.execute(query)})
        return found

    def all(self) -> list[tuple[str, str, bytes]]:
        """Study, name and key of all, sorted. Raises DatabaseError."""
        table = schema.devices.c
        query = select(table.tenant, table.device, table.public_key).order_by(table.tenant, table.device)
        with self._database.reading() as connection:
            return [(tenant, device, key) for tenant, device, key in connection.execute(query)]

    def counts(self) -> dict[str, int]:
        """How many, by study. Raises DatabaseError."""
        table = schema.devices.c
        query = select(table.tenant, func.count()).group_by(table.tenant).order_by(table.tenant)
        with self._database.reading() as connection:
            return {row[0]: row[1] for row in connection.execute(query)}


@dataclass(frozen=True)
class Refused:
    """A refusal.

    Args:
        at_s: Unix seconds.
        tenant, task, round: as the request named them.
        reason: for programs.
        detail: for people.
    """

    at_s: float
    tenant: str
    task: str
    round: int
    reason: str
    detail: str


class RefusalLog:
    """The last refusals in full, and how many there ever were. Every method is one transaction.

    Args:
        database: the store.
        most: that are kept in full.
    """

    def __init__(self, database: Database, most: int) -> None:
        self._database, self._most = database, most

    def add(self, one: Refused) -> None:
        """Note a refusal; the oldest gives way. Raises DatabaseError."""
        table, counts = schema.refusals, schema.refusal_counts
        with self._database.transaction() as connection:
            number = connection.execute(insert(table).values(**vars(one))).inserted_primary_key
            connection.execute(delete(table).where(table.c.number <= int(number[0] if number else 0) - self._most))
            here = (counts.c.tenant == one.tenant) & (counts.c.reason == one.reason)
            if not connection.execute(update(counts).where(here).values(times=counts.c.times + 1)).rowcount:
                connection.execute(insert(counts).values(tenant=one.tenant, reason=one.reason, times=1))

    def all(self) -> list[Refused]:
        """Those that are kept, oldest first. Raises DatabaseError."""
        columns = [column for column in schema.refusals.c if column.name != "number"]
        with self._database.reading() as connection:
            return [Refused(*row) for row in connection.execute(select(*columns).order_by(schema.refusals.c.number))]

    def counts(self) -> dict[str, int]:
        """How many ever, by reason. Raises DatabaseError."""
        table = schema.refusal_counts.c
        query = select(table.reason, func.sum(table.times)).group_by(table.reason).order_by(table.reason)
        with self._database.reading() as connection:
            return {reason: int(times) for reason, times in connection.execute(query)}


class HelperStore:
    """All of it, in one hand.

    Args:
        database: the file.
        most_refusals: as `RefusalLog` takes it.
    """

    def __init__(self, database: Database, *, most_refusals: int = 10_000) -> None:
        self.database = database
        self.keys, self.devices = Keys(database), DeviceRegister(database)
        self.answers, self.refusals = AnswerLedger(database), RefusalLog(database, most_refusals)
        self.logs, self.revoked = CosignedLogs(database), RevokedDevices(database)

    def close(self) -> None:
        """Close all connections."""
        self.database.close()


def _is_device(tenant: str, device: str) -> ColumnElement[bool]:
    """The condition on a row."""
    return (schema.devices.c.tenant == tenant) & (schema.devices.c.device == device)
