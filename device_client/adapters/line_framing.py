"""Messages on a stream socket: lines of JSON, or MessagePack after its length.

Framing, told by a message's first byte: ``{`` begins a line of JSON; 0 begins the four-byte big-endian length of a
MessagePack message (below 16 MiB, so its first byte is always 0). A reply comes in the framing of its request.

Invariant: of a message no more is held than the limit and one read; what cannot be a message is refused by its first
bytes.
"""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass, field

from device_client.recordings.recording_msg import Encoding

MAX_FRAMED_BYTES = (1 << 24) - 1
"""Largest message that the framing carries."""

_LENGTH = struct.Struct(">I")
_CHUNK_BYTES = 64 * 1024
_BLANK = b" \t\r\n"


class GarbageError(Exception):
    """What a peer sent cannot be a message; the text is to be told to it in `encoding`, and it disconnected."""

    def __init__(self, sentence: str, encoding: Encoding = "json") -> None:
        super().__init__(sentence)
        self.encoding = encoding


@dataclass(eq=False)
class MessageReader:
    """Messages out of a stream socket; keeps what was read beyond one for the next.

    Args:
        connection: where they come from.
        limit_bytes: largest message without its framing.
        timeout_s: how long a message may take to begin, and again to end.
        held: bytes that were read already.
    """

    connection: socket.socket
    limit_bytes: int
    timeout_s: float
    held: bytearray = field(default_factory=bytearray)

    def next(self) -> tuple[bytes, Encoding] | None:
        """The next message without its framing; None when the peer is done, also in the middle of one.

        Raises:
            GarbageError: it cannot be a message, or is larger than the limit.
            OSError: the peer went away; TimeoutError, one of them, if it took too long.
        """
        deadline_s = time.monotonic() + self.timeout_s
        while not (begun := self.held.lstrip(_BLANK)):
            self.held.clear()
            if not self._more(deadline_s):
                return None
        self.held = begun
        deadline_s = time.monotonic() + self.timeout_s
        if begun[0] == ord("{"):
            return self._line(deadline_s)
        if begun[0] == 0:
            return self._prefixed(deadline_s)
        raise GarbageError("message: expected a line of JSON that begins with {, or a MessagePack message's length")

    def _line(self, deadline_s: float) -> tuple[bytes, Encoding] | None:
        """Up to the newline."""
        searched = 0
        while (end := self.held.find(b"\n", searched)) < 0:
            searched = len(self.held)
            if searched > self.limit_bytes:
                raise GarbageError(f"message: expected a line of at most {self.limit_bytes:,} bytes, got more")
            if not self._more(deadline_s):
                return None
        if end > self.limit_bytes:
            raise GarbageError(f"message: expected a line of at most {self.limit_bytes:,} bytes, got more")
        line = bytes(self.held[:end])
        del self.held[: end + 1]
        return line, "json"

    def _prefixed(self, deadline_s: float) -> tuple[bytes, Encoding] | None:
        """As many bytes as the prefix says."""
        length: int | None = None
        while length is None or len(self.held) < _LENGTH.size + length:
            if length is None and len(self.held) >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self.held)
                if not 0 < length <= self.limit_bytes:
                    raise GarbageError(
                        f"message: expected a length from 1 to {self.limit_bytes:,} bytes, got {length:,}", "msgpack"
                    )
            elif not self._more(deadline_s):
                return None
        message = bytes(self.held[_LENGTH.size : _LENGTH.size + length])
        del self.held[: _LENGTH.size + length]
        return message, "msgpack"

    def _more(self, deadline_s: float) -> bool:
        """Read some more; False at the end."""
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self.connection.settimeout(left_s)
        chunk = self.connection.recv(_CHUNK_BYTES)
        self.held += chunk
        return bool(chunk)


def framed(payload: bytes, encoding: Encoding) -> bytes:
    """A message as it goes over the socket.

    Args:
        payload: below 16 MiB; JSON without newlines.
        encoding: how it is encoded.
    """
    return payload + b"\n" if encoding == "json" else _LENGTH.pack(len(payload)) + payload
