"""Makes one file of everything the aggregator promised, while the service runs (`aggregator.backup_file`).

All rows are of one moment. They are spooled to disk first, so that the transaction which shows that moment is short and
holds nobody up; the large values that they name are copied afterwards, since those never change. What a task pruned
meanwhile is pruned in the backup too.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec
from sqlalchemy import Column, Connection, MetaData, Table, select

from aggregator.backup_file import (
    BLOBS,
    ERASED,
    ERASED_EARLIER,
    LEFT_OUT,
    MANIFEST,
    ROWS,
    TABLES,
    ManifestMsg,
    MemberMsg,
    digest_of,
    encode_row,
)
from aggregator.errors import BlobError, DatabaseError
from aggregator.store.blobs import Blobs
from aggregator.store.database import Database
from aggregator.store.migrations import newest_revision
from aggregator.store.sweep import BLOB_COLUMNS, blobs_named_in
from fl_protocol.adapters.files import fsync_folder
from fl_protocol.adapters.software import software_version
from fl_protocol.errors import ConfigError

Progress = Callable[[int, int], None]
"""Called with how many large values are done, and how many there are."""


class BackedUp(NamedTuple):
    """What a backup holds."""

    rows: int
    blobs: int
    num_bytes: int


class _Source(NamedTuple):
    """What is backed up: a view of the database, opened as often as it is wanted, its tables, and their revision."""

    reading: Callable[[], AbstractContextManager[Connection]]
    tables: Sequence[Table]
    revision: str

    def columns_of(self, table: Table) -> list[Column[str | None]]:
        """Those of a table that name large values."""
        known = {(column.table.name, column.name) for column in BLOB_COLUMNS}
        return [column for column in table.columns if (table.name, column.name) in known]

    def named(self) -> set[str]:
        """All large values that rows name now."""
        with self.reading() as connection:
            return blobs_named_in(connection, (one for table in self.tables for one in self.columns_of(table)))


def backup(
    database: Database, blobs: Blobs, path: Path, *, now_s: float, progress: Progress = lambda _done, _all: None
) -> BackedUp:
    """Write a backup to a new file, which only its owner can read and which appears when it is whole and durable.

    Args:
        database: with the present schema; the service may be running.
        blobs: where its large values are.
        path: of the file.
        now_s: Unix seconds.
        progress: for people.

    Raises:
        ConfigError: there is such a file already, or it cannot be written.
        DatabaseError: the database or the blob store fails, or lacks a large value that a row names.
    """
    source = _Source(database.reading, TABLES, newest_revision())
    return _write(source, blobs, path, now_s=now_s, progress=progress)


def backup_as_it_is(
    connection: Connection,
    blobs: Blobs,
    path: Path,
    *,
    revision: str,
    now_s: float,
    progress: Progress = lambda _done, _all: None,
) -> BackedUp:
    """Write a backup of a database of an earlier version, which software of that version restores; see `backup`.

    Args:
        connection: with a transaction, which nobody else's changes get into.
        blobs: as `backup`.
        path: as `backup`.
        revision: of the database.
        now_s: as `backup`.
        progress: as `backup`.
    """
    source = _Source(lambda: nullcontext(connection), tables_as_they_are(connection), revision)
    return _write(source, blobs, path, now_s=now_s, progress=progress)


def tables_as_they_are(connection: Connection) -> list[Table]:
    """What is backed up of a database of any version, as the database describes it."""
    found = MetaData()
    found.reflect(connection)
    left_out = {table.name for table in LEFT_OUT} | {"alembic_version"}
    return [table for table in found.sorted_tables if table.name not in left_out]


def named_by_rows(connection: Connection) -> set[str]:
    """The large values that rows of a database of any version name."""
    return _Source(lambda: nullcontext(connection), tables_as_they_are(connection), "").named()


def _write(source: _Source, blobs: Blobs, path: Path, *, now_s: float, progress: Progress) -> BackedUp:
    """See `backup`."""
    with _new_file(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        members: dict[str, MemberMsg] = {}
        num_rows, names = _add_rows(source, tar, members, path.parent)
        pruned = _add_blobs(source, blobs, tar, members, names=names, progress=progress)
        manifest = ManifestMsg(1, source.revision, software_version(), now_s, members, pruned)
        _add(tar, MANIFEST, msgspec.json.encode(manifest))
    return BackedUp(num_rows, len(names) - len(pruned), path.stat().st_size)


def _add_rows(
    source: _Source, tar: tarfile.TarFile, members: dict[str, MemberMsg], folder: Path
) -> tuple[int, list[str]]:
    """Every table as of one moment; how many rows, and the large values that they name."""
    count, names = 0, set[str]()
    with tempfile.TemporaryFile(dir=folder) as spool:
        ends = []
        with source.reading() as connection:
            for table in source.tables:
                columns = [column.name for column in source.columns_of(table)]
                for row in _rows(connection, table):
                    spool.write(encode_row(row))
                    # The first versions had the values themselves there.
                    names |= {row[name] for name in columns if row[name] and isinstance(row[name], str)}
                    count += 1
                ends.append(spool.tell())
        begin = 0
        for table, end in zip(source.tables, ends, strict=True):
            _add_part(tar, f"{ROWS}{table.name}.jsonl", spool, begin, end, members=members)
            begin = end
    return count, sorted(names)


def _rows(connection: Connection, table: Table) -> Iterator[dict[str, Any]]:
    """A table's rows in the order of their keys, a few at a time in memory."""
    query = select(table).order_by(*table.primary_key.columns).execution_options(yield_per=500)
    unwanted = ERASED.get(table.name, {}) | ERASED_EARLIER.get(table.name, {})
    erased = {name: None for name in unwanted if name in table.columns}
    for row in connection.execute(query).mappings():
        yield {**row, **erased}


def _add_part(
    tar: tarfile.TarFile, name: str, spool: BinaryIO, begin: int, end: int, *, members: dict[str, MemberMsg]
) -> None:
    """A part of the spooled rows as a file."""
    spool.seek(begin)
    digest, left = hashlib.sha256(), end - begin
    while left:
        block = spool.read(min(left, 2**20))
        digest.update(block)
        left -= len(block)
    members[name] = MemberMsg(end - begin, digest.hexdigest())
    spool.seek(begin)
    tar.addfile(_header(name, end - begin), spool)


def _add_blobs(
    source: _Source,
    blobs: Blobs,
    tar: tarfile.TarFile,
    members: dict[str, MemberMsg],
    *,
    names: list[str],
    progress: Progress,
) -> list[str]:
    """Every large value that a row names, one at a time in memory; those that were pruned meanwhile."""
    pruned = []
    for done, name in enumerate(names):
        progress(done, len(names))
        try:
            data = blobs.get(name)
        except BlobError as error:
            if name in source.named():
                raise DatabaseError(f"the backup would lack {name}, which is in use: {error}") from error
            pruned.append(name)
            continue
        _add(tar, f"{BLOBS}{name}", data)
        members[f"{BLOBS}{name}"] = digest_of(io.BytesIO(data))
    progress(len(names), len(names))
    return pruned


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Bytes as a file."""
    tar.addfile(_header(name, len(data)), io.BytesIO(data))


def _header(name: str, num_bytes: int) -> tarfile.TarInfo:
    """Says nothing about this machine."""
    header = tarfile.TarInfo(name)
    header.size, header.mode = num_bytes, 0o600
    return header


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when it is whole."""
    if os.path.exists(path):  # Path's own raises where the folder may not be searched
        raise ConfigError(f"the backup {path}: there is such a file already, and it is not replaced; name another")
    partial = path.with_name(f".{path.name}.partial")
    try:
        # Security: models, and the ids and keys of everybody who takes part.
        with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        fsync_folder(path.parent)
    except OSError as error:
        raise ConfigError(f"the backup {path} cannot be written ({error.strerror})") from error
    finally:
        with suppress(OSError):
            partial.unlink()
