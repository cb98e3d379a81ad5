"""`aggregator.store.blobs.Blobs` in memory, which outlives the simulated processes that share it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from aggregator.errors import BlobError
from aggregator.store.blobs import StoredBlob, new_blob_name


class MemoryBlobs:
    """See the module docstring.

    Args:
        now_s: Unix seconds, for the age of blobs.
        entropy: for their names.

    Attributes:
        before: told the operation, such as ``put sum``, ``get`` or ``delete``; what it raises happens instead.
    """

    def __init__(self, now_s: Callable[[], float], entropy: Callable[[int], bytes]) -> None:
        self._now_s, self._entropy = now_s, entropy
        self._blobs: dict[str, tuple[bytes, float]] = {}
        self.before: Callable[[str], None] = lambda operation: None

    def put(self, data: bytes, *, kind: str) -> str:
        """Keep bytes under a new name."""
        self.before(f"put {kind}")
        name = new_blob_name(kind, self._entropy)
        self._blobs[name] = (bytes(data), self._now_s())
        return name

    def get(self, name: str) -> bytes:
        """The bytes of a name. Raises BlobError."""
        self.before("get")
        if name not in self._blobs:
            raise BlobError(f"there is no blob {name}")
        return self._blobs[name][0]

    def delete(self, names: Iterable[str]) -> None:
        """Forget them, if they are there."""
        self.before("delete")
        for name in names:
            self._blobs.pop(name, None)

    def stored(self) -> Iterator[StoredBlob]:
        """What there is, and since when."""
        return iter([StoredBlob(name, written_s, len(data)) for name, (data, written_s) in self._blobs.items()])

    def kept(self) -> dict[str, tuple[bytes, float]]:
        """Everything, for `restore`: content, and Unix seconds since which it is there, by name."""
        return dict(self._blobs)

    def restore(self, kept: dict[str, tuple[bytes, float]]) -> None:
        """Be as another one was."""
        self._blobs = dict(kept)
