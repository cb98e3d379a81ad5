"""Downloading a model chunk by chunk: each is verified as it comes, kept, and asked for by itself. Pure.

The first chunk says how the whole was cut; then a few at a time are asked for, so that a slow or metered radio is never
flooded and a download goes on after a reboot where it stopped. A chunk is the aggregator's signed word: one that is
forged or damaged is refused alone and costs nothing that came before it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from numpy.typing import NDArray

from device_client.events import Action, DropChunks, KeepChunk, Note, Subscribe, Unsubscribe
from fl_protocol.errors import ProtocolError
from fl_protocol.messages import ChunkMsg
from fl_protocol.signing import verify
from fl_protocol.topics import model_topic

WINDOW = 8
"""Chunks asked for at a time."""
STALLED_AFTER_S = 30.0
"""A download without a chunk for this long is asked for again."""
LONGEST_SILENCE_S = 300.0
"""How long at most between asking again."""


class Download:
    """A vector of float32 [d], or a delta, by its digest.

    Args:
        tenant: on the wire.
        digest: SHA-256 of the whole (of a vector, its little-endian float32 bytes), from a verified manifest.
        total_bytes: length of the whole.
        key: the aggregator's, which signed every chunk.
        kept: chunks that were kept before a restart, as they came; verified again here.
    """

    def __init__(
        self,
        *,
        tenant: str,
        digest: bytes,
        total_bytes: int,
        key: Ed25519PublicKey,
        kept: Iterable[bytes] = (),
    ) -> None:
        self.digest = digest
        self._tenant, self.total_bytes, self._key = tenant, total_bytes, key
        self._prefix = model_topic(tenant, digest, 0)[:-1]
        self._cut: tuple[int, int] | None = None  # (count, bytes a chunk)
        self._parts: dict[int, bytes] = {}
        self._asked: set[int] = set()
        self._next = 0  # every chunk before it is here or asked for
        self._is_running = False
        self._asks_again_s, self._silences, self._refusals = math.inf, 0, 0
        for payload in sorted(kept):
            try:
                self._take(self._checked(payload))
            except ProtocolError:  # damaged on disk, or of another cut: it comes again
                continue

    @property
    def progress(self) -> tuple[int, int | None]:
        """How many chunks are here, and how many there are, if that is known yet."""
        return len(self._parts), self._cut[0] if self._cut is not None else None

    @property
    def is_whole(self) -> bool:
        """Whether every chunk is here."""
        return self._cut is not None and len(self._parts) == self._cut[0]

    @property
    def silences(self) -> int:
        """How often in a row it was asked for in vain."""
        return self._silences

    def next_wake_s(self) -> float:
        """When `ask_again` has something to do."""
        return math.inf if self.is_whole else self._asks_again_s

    def start(self, now_s: float) -> list[Action]:
        """Ask for the first chunks; also after a new connection, which knows of no subscription."""
        self._asked.clear()
        self._next, self._is_running = 0, True
        self._asks_again_s = now_s + self._patience_s()
        return self._ask()

    def stop(self) -> list[Action]:
        """Ask for nothing any more, until `start`."""
        self._is_running, self._asks_again_s = False, math.inf
        return self._withdraw(sorted(self._asked))

    def ask_again(self, now_s: float) -> list[Action]:
        """Subscribe again when nothing has come for a while: the broker then sends retained messages once more."""
        if not self._is_running or self.is_whole:
            return []
        self._asks_again_s = min(self._asks_again_s, now_s + LONGEST_SILENCE_S)  # the clock may have been set back
        if now_s < self._asks_again_s:
            return []
        self._silences += 1
        self._asks_again_s = now_s + self._patience_s()
        self._ask()
        self._asked.add(0)  # it is there in every cut; the others may not be, if the vector was cut anew
        return [Subscribe(self._topic(index)) for index in sorted(self._asked)]

    def is_for(self, topic: str) -> bool:
        """Whether a topic carries a chunk of this."""
        return topic.startswith(self._prefix)

    def accept(self, topic: str, payload: bytes, now_s: float) -> list[Action]:
        """Verify and take one chunk.

        Raises:
            ProtocolError: it is not the aggregator's, or not of this vector and topic; nothing changes.
        """
        chunk = self._checked(payload)
        if topic != self._topic(chunk.index):
            raise ProtocolError(f"chunk {chunk.index} of a model came under the topic of another")
        actions: list[Action] = []
        if self._cut not in {None, (chunk.count, chunk.cut_bytes)}:
            # The aggregator may have cut it anew, for a broker with another limit; or the broker replays an old cut,
            # to undo what came: what there is gives way only when it has come to a standstill.
            if not self._silences:
                return []
            actions += [*self._withdraw(sorted(self._asked)), DropChunks((self.digest,))]
            actions.append(Note("download_cut_anew", {"chunks": chunk.count}))
            self._begin_anew()
        actions += self._withdraw([chunk.index])
        if chunk.index in self._parts:
            return actions
        self._take(chunk)
        self._silences = 0
        if chunk.count > 1:
            actions.append(KeepChunk(self.digest, chunk.index, payload))
        if self._is_running:
            self._asks_again_s = now_s + self._patience_s()
            actions += self._ask()
        return actions

    def whole(self) -> NDArray[np.float32]:
        """The vector, float32 [d].

        Raises:
            ProtocolError: the chunks do not add up to the signed digest, or hold numbers that are not finite; the
                download begins anew.
        """
        values = np.frombuffer(self.raw(), "<f4").astype(np.float32)
        if np.isfinite(values).all():
            return values
        raise self._refused("the model holds numbers that are not finite")

    def raw(self) -> bytes:
        """The whole as bytes. Raises ProtocolError, as `whole` does, unless they have the signed digest."""
        data = b"".join(self._parts[index] for index in range(len(self._parts)))
        if hashlib.sha256(data).digest() != self.digest:
            raise self._refused("the model does not match the signed manifest")
        return data

    def _refused(self, reason: str) -> ProtocolError:
        """Begin anew, more slowly."""
        self._refusals += 1
        self._begin_anew()
        return ProtocolError(reason)

    def _checked(self, payload: bytes) -> ChunkMsg:
        """The chunk in a message, if it is the aggregator's and of this vector."""
        chunk = verify(payload, ChunkMsg, self._key)
        if chunk.digest != self.digest or chunk.total_bytes != self.total_bytes:
            raise ProtocolError("a model chunk names another digest or length than the signed manifest")
        return chunk

    def _take(self, chunk: ChunkMsg) -> None:
        """Keep a checked chunk; the first one says how the whole was cut."""
        cut = (chunk.count, chunk.cut_bytes)
        if self._cut is None:
            self._cut = cut
        if self._cut == cut:
            self._parts[chunk.index] = chunk.data

    def _ask(self) -> list[Action]:
        """Subscribe to the next missing chunks, as far as the window goes."""
        count = 1 if self._cut is None else self._cut[0]
        actions: list[Action] = []
        while self._next < count and len(self._asked) < WINDOW:
            if self._next not in self._parts and self._next not in self._asked:
                self._asked.add(self._next)
                actions.append(Subscribe(self._topic(self._next)))
            self._next += 1
        return actions

    def _withdraw(self, indices: list[int]) -> list[Action]:
        """Unsubscribe from those of these that were asked for."""
        asked = [index for index in indices if index in self._asked]
        self._asked.difference_update(asked)
        return [Unsubscribe(self._topic(index)) for index in asked]

    def _patience_s(self) -> float:
        """How long to wait for a chunk: ever longer in silence, and after vectors that were wrong as a whole."""
        return min(LONGEST_SILENCE_S, STALLED_AFTER_S * 2.0 ** min(self._silences + self._refusals, 10))

    def _begin_anew(self) -> None:
        """Forget what is here."""
        self._cut, self._parts, self._next = None, {}, 0

    def _topic(self, index: int) -> str:
        """Where one chunk is retained."""
        return f"{self._prefix}{index}"


class Downloads(Protocol):
    """Begins a `Download`, with its arguments. A device has one way, that class itself, and no setting and no message
    names another; in the simulator devices of one process may share what one of them has verified.
    """

    def __call__(
        self, *, tenant: str, digest: bytes, total_bytes: int, key: Ed25519PublicKey, kept: Iterable[bytes] = ()
    ) -> Download:
        """One that is not started."""
