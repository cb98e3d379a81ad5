"""`aggregator.store.blobs.Blobs` in an object store, through fsspec: ``s3://bucket/prefix``, ``memory://`` and others.

An object store keeps what it acknowledged, and shows an object whole or not at all; a network file system of fsspec's
does not, and is refused. Names are never used twice, so that nothing depends on which of two writes wins.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import fsspec
from fsspec.exceptions import FSTimeoutError

from aggregator.errors import BlobError, MissingBlobError
from aggregator.store.blobs import StoredBlob, checked_blob_name, new_blob_name

OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "abfs", "az", "oss", "memory")
_S3_LIMITS = {"connect_timeout": 3, "read_timeout": 10, "retries": {"max_attempts": 1}}
"""A store that says nothing is an error within half a minute; whoever asked keeps what it had and tries again."""

_TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")
"""What the stores call the time of writing."""


class FsspecBlobs:
    """See the module docstring.

    Args:
        url: of a bucket and prefix that exist.
        entropy: for names.
        options: of the store's fsspec implementation; others than credentials, which belong into the environment.
        answer_s: how long the store may take to accept a small blob; a large one may take a second for each MiB more.

    Raises:
        BlobError: from every method, when the store fails.
    """

    def __init__(
        self,
        url: str,
        *,
        entropy: Callable[[int], bytes] = os.urandom,
        options: dict[str, Any] | None = None,
        answer_s: float = 30.0,
    ) -> None:
        protocol = url.partition("://")[0]
        if protocol not in OBJECT_STORES:
            raise BlobError(f"blobs: expected a folder, or a URL of {', '.join(OBJECT_STORES)}, got {url}")
        limits = {"config_kwargs": _S3_LIMITS} if protocol in {"s3", "s3a"} else {}
        self._url, self._entropy, self._answer_s = url, entropy, answer_s
        with self._translated("cannot be opened"):
            # Listings are never answered from memory: what is collected depends on them.
            given = {"skip_instance_cache": True, "use_listings_cache": False, **limits, **(options or {})}
            self._store, root = fsspec.core.url_to_fs(url, **given)
            self._store.retries = 1  # s3fs would multiply the attempts of the layer below
        self._root = root.rstrip("/")

    def put(self, data: bytes, *, kind: str) -> str:
        """One request; when it returns, the store has it."""
        name = new_blob_name(kind, self._entropy)
        with self._translated(f"does not take a blob of {len(data)} bytes"):
            self._store.pipe_file(self._path(name), data, **self._limit(len(data)))
        return name

    def get(self, name: str) -> bytes:
        """The whole object."""
        path = self._path(name)
        with self._translated(f"cannot give the blob {name}"):
            try:
                return bytes(self._store.cat_file(path))
            except FileNotFoundError as error:
                # With nothing there, it is another bucket than ours, or none: what is missing may come back.
                if not self._store.exists(self._root):
                    raise
                raise MissingBlobError(f"the blob store {self._url} does not have the blob {name}") from error

    def delete(self, names: Iterable[str]) -> None:
        """One request each."""
        for name in names:
            path = self._path(name)
            with self._translated(f"cannot remove the blob {name}"):
                try:
                    self._store.rm_file(path)
                except FileNotFoundError:
                    continue

    def stored(self) -> Iterator[StoredBlob]:
        """Every object below the prefix that is named like a blob."""
        with self._translated("cannot be listed"):
            found = self._store.find(self._root, detail=True)
        for path, facts in found.items():
            name = path.removeprefix("/").removeprefix(self._root.removeprefix("/")).removeprefix("/")
            try:
                checked_blob_name(name)
            except BlobError:
                continue  # somebody else's
            yield StoredBlob(name, _written_s(facts), int(facts.get("size") or 0))

    def _limit(self, length: int) -> dict[str, float]:
        """The time limit of a write: aiohttp waits for ever for leave to send a body (RFC 9110, 10.1.1: Expect)."""
        return {"timeout": self._answer_s + length / 2**20} if self._store.async_impl else {}

    def _path(self, name: str) -> str:
        """Where a blob is in the store."""
        return f"{self._root}/{checked_blob_name(name)}"

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """The store's errors as ours; libraries below raise their own, without a common base."""
        try:
            yield
        except BlobError:
            raise
        except FileNotFoundError as error:
            raise BlobError(f"the blob store {self._url} {what}: there is no such object or bucket") from error
        except FSTimeoutError as error:
            raise BlobError(f"the blob store {self._url} {what}: no answer in time") from error
        except ImportError as error:
            raise BlobError(f"the blob store {self._url} {what}: its driver is not installed ({error})") from error
        except Exception as error:
            raise BlobError(f"the blob store {self._url} {what}: {error or type(error).__name__}") from error


def _written_s(facts: dict[str, Any]) -> float:
    """When an object was written, Unix seconds; BlobError if the store does not say."""
    for key in _TIMES:
        value = facts.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):
            return datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp()
    raise BlobError(
        f"the blob store does not say when {facts.get('name')} was written, so that nothing can be collected"
    )
