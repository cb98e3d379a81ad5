"""Models that the devices of one process have in common, with ``wire = "off"``: digested and decoded once.

A device asks for the first chunk as ever; when that comes, it is handed what another device of its process has
verified, by the code that verifies every device's downloads. What is not there as a whole is fetched chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from device_client.downloads import Download
from device_client.events import Action
from device_client.ports import Float32
from fl_protocol.errors import ProtocolError
from fl_protocol.topics import model_topic


@dataclass(frozen=True)
class SharedModel:
    """A verified download.

    Args:
        topic: one level above its chunks'.
        raw: all its bytes, whose digest is right.
        values: the same as float32 [d], read-only; None where they are no finite numbers.
    """

    topic: str
    raw: bytes
    values: Float32 | None


class SharedModels:
    """See the module docstring.

    Args:
        retained_below: payloads that are retained one level below a topic.
    """

    def __init__(self, retained_below: Callable[[str], Sequence[bytes]]) -> None:
        self._retained_below = retained_below
        self._known: dict[bytes, SharedModel] = {}

    def find(self, *, tenant: str, digest: bytes, total_bytes: int, key: Ed25519PublicKey) -> SharedModel | None:
        """A download by its digest, if all its chunks are retained; arguments are those of `Download`."""
        if digest not in self._known:
            topic = model_topic(tenant, digest, 0).rpartition("/")[0]
            payloads = self._retained_below(topic)
            if sum(map(len, payloads)) < total_bytes:
                return None
            download = Download(tenant=tenant, digest=digest, total_bytes=total_bytes, key=key, kept=payloads)
            found = _verified(download, topic)
            if found is None:
                return None
            self._known = {name: one for name, one in self._known.items() if self._retained_below(one.topic)}
            self._known[digest] = found
        return self._known[digest]

    def digest_of(self, values: Float32) -> bytes | None:
        """Of a vector that was handed out here, of that very array."""
        return next((digest for digest, one in self._known.items() if one.values is values), None)


class SharedDownload(Download):
    """A `Download` that takes what is in `SharedModels`.

    Args:
        models: of its process.
    """

    def __init__(
        self,
        models: SharedModels,
        *,
        tenant: str,
        digest: bytes,
        total_bytes: int,
        key: Ed25519PublicKey,
        kept: Iterable[bytes] = (),
    ) -> None:
        super().__init__(tenant=tenant, digest=digest, total_bytes=total_bytes, key=key, kept=kept)
        self._find = partial(models.find, tenant=tenant, digest=digest, total_bytes=total_bytes, key=key)
        self._shared: SharedModel | None = None

    @property
    def progress(self) -> tuple[int, int | None]:
        """As of one chunk, once it is here."""
        return (1, 1) if self._shared is not None else super().progress

    @property
    def is_whole(self) -> bool:
        """Whether it is here."""
        return self._shared is not None or super().is_whole

    def accept(self, topic: str, payload: bytes, now_s: float) -> list[Action]:
        """Take what is here as a whole, or one chunk. Raises ProtocolError."""
        self._shared = self._shared or self._find()
        return super().accept(topic, payload, now_s) if self._shared is None else self.stop()

    def whole(self) -> Float32:
        """The vector, float32 [d], read-only. Raises ProtocolError."""
        shared = self._shared
        return super().whole() if shared is None or shared.values is None else shared.values

    def raw(self) -> bytes:
        """The whole as bytes. Raises ProtocolError."""
        return super().raw() if self._shared is None else self._shared.raw

    def _begin_anew(self) -> None:
        """Forget what is here."""
        super()._begin_anew()
        self._shared = None


def _verified(download: Download, topic: str) -> SharedModel | None:
    """What chunks add up to; None where that is not what it should be."""
    try:
        raw = download.raw() if download.is_whole else None
    except ProtocolError:
        return None
    if raw is None:
        return None
    values = np.frombuffer(raw, "<f4") if len(raw) % 4 == 0 else None
    is_finite = values is not None and bool(np.isfinite(values).all())
    return SharedModel(topic, raw, values if is_finite else None)
