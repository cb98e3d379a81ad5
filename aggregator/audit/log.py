"""A stand-in until the log is merged; dropped then."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import msgspec
from sqlalchemy import Connection, func, insert, select

from aggregator.store import schema


class AuditEvent(NamedTuple):
    """What somebody did."""

    at_s: float
    actor: str
    action: str
    subject: str
    detail: Mapping[str, str | int | float | bool]


def append(connection: Connection, entry: AuditEvent) -> int:
    """Add an entry; its number."""
    number: int = connection.execute(select(func.count()).select_from(schema.audit_entries)).scalar_one()
    raw = msgspec.json.encode(entry._asdict(), order="sorted")
    leaf = hashlib.sha256(raw).digest()
    connection.execute(insert(schema.audit_entries).values(number=number, entry=raw, leaf=leaf))
    return number
