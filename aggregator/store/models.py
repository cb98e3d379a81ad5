"""The model registry: every version of a task's model with where it came from, how it did, and its tags.

Versions count up from 0, the bundle's parameters. A round, the average that ends a task, and a rollback each add one;
none is ever changed. What a version was trained from is its `parent`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Row, func, insert, select, update

from aggregator.errors import DatabaseError, LostModelError
from aggregator.store import schema
from aggregator.store.blobs import Blobs
from aggregator.store.database import Database

Float32 = NDArray[np.float32]
Origin = Literal["initial", "round", "average", "rollback"]


@dataclass(frozen=True)
class NewModel:
    """A version that is about to be added.

    Args:
        version: one more than the newest.
        params: float32 [d].
        origin: what made it.
        parent: the version it came from; None for the first.
        round: the round that made it, if one did.
        optimiser: the server optimiser's state after it; empty for none.
        control: SCAFFOLD's c that goes with it, float32 [d]; None for zeros.
        population: N that c is a mean over.
        delta: bytes that take the parent's parameters to these; empty for none.
        metrics: for people: what is known about it.
    """

    version: int
    params: Float32
    origin: Origin
    parent: int | None = None
    round: int | None = None
    optimiser: bytes = b""
    control: Float32 | None = None
    population: int = 0
    delta: bytes = b""
    metrics: dict[str, Any] | None = None


class ModelRecord(NamedTuple):
    """A version as the registry lists it; the last five are blobs or digests."""

    version: int
    parent: int | None
    round: int | None
    origin: Origin
    digest: bytes
    created_s: float
    population: int
    metrics: dict[str, Any]
    tags: tuple[str, ...]
    params: str | None
    optimiser: str | None
    control: str | None
    delta: str | None
    delta_digest: bytes | None


class ModelOrigin(NamedTuple):
    """Where a version came from, without the rest."""

    version: int
    parent: int | None
    origin: Origin
    digest: bytes


class PreparedModel(NamedTuple):
    """A version whose blobs are written and whose row is not."""

    row: dict[str, Any]
    digest: bytes


class Models:
    """All versions of all tasks. Methods without a `Connection` are one transaction; all raise DatabaseError."""

    def __init__(self, database: Database, blobs: Blobs) -> None:
        self._database, self._blobs = database, blobs

    def prepare(self, model: NewModel) -> PreparedModel:
        """Write a version's blobs, before the transaction that adds it."""
        params = little_endian(model.params)
        digest = hashlib.sha256(params).digest()
        row = {
            "version": model.version,
            "parent": model.parent,
            "round": model.round,
            "origin": model.origin,
            "digest": digest,
            "params": self._blobs.put(params, kind="params"),
            "optimiser": self._put(model.optimiser, "optimiser"),
            "control": None if model.control is None else self._put(little_endian(model.control), "control"),
            "population": model.population,
            "delta": self._put(model.delta, "delta"),
            "delta_digest": hashlib.sha256(model.delta).digest() if model.delta else None,
            "metrics": msgspec.json.encode(model.metrics or {}).decode(),
        }
        return PreparedModel(row, digest)

    def add(self, connection: Connection, task: str, prepared: PreparedModel, *, now_s: float) -> None:
        """Add a version, as part of a transaction."""
        connection.execute(insert(schema.models).values(task=task, created_s=now_s, **prepared.row))

    def record(self, task: str, version: int) -> ModelRecord:
        """One version as it is listed. Raises DatabaseError also when there is none."""
        found = self._records(task, schema.models.c.version == version)
        if not found:
            raise DatabaseError(f"task {task} has no model version {version}; see covey-aggregator model list {task}")
        return found[0]

    def digest(self, connection: Connection, task: str, version: int) -> bytes:
        """The digest of a version's parameters; part of a transaction."""
        table = schema.models.c
        query = select(table.digest).where(table.task == task, table.version == version)
        digest: bytes = connection.execute(query).scalar_one()
        return digest

    def records(self, task: str) -> list[ModelRecord]:
        """Every version of a task, oldest first."""
        return self._records(task, schema.models.c.version >= 0)

    def origins(self, task: str) -> list[ModelOrigin]:
        """Where every version of a task came from, oldest first."""
        table = schema.models.c
        query = select(table.version, table.parent, table.origin, table.digest).where(table.task == task)
        with self._database.reading() as connection:
            return [ModelOrigin(*row) for row in connection.execute(query.order_by(table.version))]

    def page(self, task: str, *, before: int | None = None, limit: int) -> list[ModelRecord]:
        """Versions of a task, newest first; only those before one if given."""
        version = schema.models.c.version
        wanted = select(version).where(schema.models.c.task == task).order_by(version.desc()).limit(limit)
        if before is not None:
            wanted = wanted.where(version < before)
        return self._records(task, version.in_(wanted))[::-1]

    def newest(self, task: str) -> int:
        """The newest version of a task. Raises DatabaseError also when there is none."""
        with self._database.reading() as connection:
            query = select(func.max(schema.models.c.version)).where(schema.models.c.task == task)
            version = connection.execute(query).scalar()
        if version is None:
            raise DatabaseError(f"task {task} has no model; see covey-aggregator task list")
        return int(version)

    def params(self, record: ModelRecord) -> Float32:
        """A version's parameters, float32 [d], checked against its digest."""
        if record.params is None:
            raise LostModelError(f"the parameters of version {record.version} were pruned; choose another version")
        raw = self._blobs.get(record.params)
        if hashlib.sha256(raw).digest() != record.digest:
            raise LostModelError(f"the blob {record.params} of version {record.version} is damaged; restore a backup")
        return float32(raw)

    def optimiser(self, record: ModelRecord) -> bytes:
        """The server optimiser's state after a version; empty for none."""
        return b"" if record.optimiser is None else self._blobs.get(record.optimiser)

    def control(self, record: ModelRecord, length: int) -> Float32:
        """SCAFFOLD's c that goes with a version; zeros float32 [length] if none was stored."""
        return np.zeros(length, np.float32) if record.control is None else float32(self._blobs.get(record.control))

    def delta(self, record: ModelRecord) -> bytes:
        """What takes the parent's parameters to this version's; empty for none."""
        return b"" if record.delta is None else self._blobs.get(record.delta)

    def tagged(self, task: str, tag: str) -> int:
        """The version that has a tag. Raises DatabaseError also when none has."""
        table = schema.model_tags.c
        with self._database.reading() as connection:
            version = connection.execute(select(table.version).where(table.task == task, table.tag == tag)).scalar()
        if version is None:
            raise DatabaseError(f"no model of task {task} has the tag {tag}; see covey-aggregator model list {task}")
        return int(version)

    def prune(self, connection: Connection, task: str, *, keep_last: int) -> list[str]:
        """Forget the parameters of old versions without tags, as part of a transaction; the blobs that go with them.

        Their rows stay, so that the history is whole.
        """
        models, tags = schema.models, schema.model_tags.c
        newest = select(func.max(models.c.version)).where(models.c.task == task).scalar_subquery()
        tagged = select(tags.version).where(tags.task == task)
        here = (
            (models.c.task == task)
            & (models.c.version > 0)
            & (models.c.version <= newest - keep_last)
            & models.c.version.not_in(tagged)
            & models.c.params.is_not(None)
        )
        rows = connection.execute(
            select(models.c.params, models.c.optimiser, models.c.control, models.c.delta).where(here)
        ).all()
        blobs = [blob for row in rows for blob in row if blob is not None]
        connection.execute(update(models).where(here).values(params=None, optimiser=None, control=None, delta=None))
        return blobs

    def _put(self, data: bytes, kind: str) -> str | None:
        """Write a blob, unless there is nothing in it."""
        return self._blobs.put(data, kind=kind) if data else None

    def _records(self, task: str, which: Any) -> list[ModelRecord]:
        """The versions that a condition chooses, oldest first."""
        models, tags = schema.models, schema.model_tags
        with self._database.reading() as connection:
            rows = connection.execute(select(models).where(models.c.task == task, which).order_by(models.c.version))
            named: dict[int, list[str]] = {}
            for tag, version in connection.execute(
                select(tags.c.tag, tags.c.version).where(tags.c.task == task).order_by(tags.c.tag)
            ):
                named.setdefault(version, []).append(tag)
            return [_record(row, tuple(named.get(row.version, ()))) for row in rows]


def _record(row: Row[Any], tags: tuple[str, ...]) -> ModelRecord:
    """A row of the table."""
    return ModelRecord(
        row.version,
        row.parent,
        row.round,
        row.origin,
        row.digest,
        row.created_s,
        row.population,
        msgspec.json.decode(row.metrics),
        tags,
        row.params,
        row.optimiser,
        row.control,
        row.delta,
        row.delta_digest,
    )


def little_endian(values: Float32) -> bytes:
    """Little-endian float32 bytes, as parameters are stored, hashed and sent."""
    return np.ascontiguousarray(values, "<f4").tobytes()


def float32(raw: bytes) -> Float32:
    """The inverse of `little_endian`."""
    return np.frombuffer(raw, "<f4").astype(np.float32)
