"""Large values beside the database: models, sums, sealed updates. Written before the row that names them.

A blob has a fresh name, is written once and never changed. One that no row names after an hour belongs to a
transaction that never came (`aggregator.store.sweep`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

from aggregator.errors import BlobError

_NAME = re.compile(r"[a-z]{1,32}/(?:[0-9a-f]{32}|\.[0-9a-f]{32}\.tmp)")
"""Kind and name; the second form is what an interrupted write leaves."""


class StoredBlob(NamedTuple):
    """A blob's name, when it was written (Unix seconds by the store's clock), and its length."""

    name: str
    written_s: float
    num_bytes: int


class Blobs(Protocol):
    """Where blobs are kept. Every method raises BlobError when the store fails."""

    def put(self, data: bytes, *, kind: str) -> str:
        """Store bytes durably under a new name that begins with `kind`; the name."""

    def get(self, name: str) -> bytes:
        """The bytes of a blob."""

    def delete(self, names: Iterable[str]) -> None:
        """Remove blobs; one that is gone already is no error."""

    def stored(self) -> Iterator[StoredBlob]:
        """All blobs there are."""


def new_blob_name(kind: str, entropy: Callable[[int], bytes]) -> str:
    """A name that nobody can have given before.

    Raises:
        BlobError: the kind is not one lower-case word.
    """
    return checked_blob_name(f"{kind}/{entropy(16).hex()}")


def checked_blob_name(name: str) -> str:
    """The name itself, if it is one.

    Raises:
        BlobError: it is not, and may lead out of the place where blobs are kept.
    """
    if not _NAME.fullmatch(name):
        raise BlobError(f"expected a blob's name such as params/{'0' * 32}, got {name[:80]!r}")
    return name
