"""Encrypted frames one after another in a file that only grows. Pure; `WindowFiles` is where the files are.

A frame is ``header[16] | nonce[12] | AES-256-GCM ciphertext and tag``; the header is four little-endian 32-bit words:
a mark, the frame's number in its file from 0, the bytes that follow, and the CRC-32 of these three. File name and
header are associated data, so a frame cannot be changed, exchanged, repeated, moved, or taken out of the middle unseen.

A frame that a power cut tore is the last one, and its append had not returned: a file ends where its valid frames end,
unless a later frame's header follows, which only damage explains. What no file can show by itself is that frames are
missing at its end; `WindowStore` counts records across files for that.
"""

from __future__ import annotations

import struct
import zlib
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from device_client.errors import StoreError
from device_client.ports import Store
from fl_protocol.integer_noise import Entropy

_MARK = 0x43_56_59_01
_MARK_BYTES = struct.pack("<I", _MARK)
_HEADER = struct.Struct("<IIII")
NONCE_BYTES, TAG_BYTES = 12, 16
FRAME_OVERHEAD_BYTES = _HEADER.size + NONCE_BYTES + TAG_BYTES


class DamagedFramesError(StoreError):
    """A file of frames was changed or damaged; the other files are not touched by it."""


class WindowFiles(Store, Protocol):
    """A store that has files of encrypted frames too; `device_client.adapters.encrypted_files` is one."""

    @property
    def entropy(self) -> Entropy:
        """A cryptographic source."""

    def frames(self, name: str) -> list[bytes]:
        """Every frame of a file in order, decrypted. Raises DamagedFramesError, or StoreError for other trouble."""

    def append_frame(self, name: str, number: int, data: bytes) -> None:
        """Durably append frame `number`, 0 making the file. Raises StoreError, the file's frames as they were."""

    def set_aside(self, name: str, new: str) -> None:
        """Durably give a file another name, under which nothing opens it. Raises StoreError."""


def seal_frame(aead: AESGCM, name: str, number: int, data: bytes, *, nonce: bytes) -> bytes:
    """One frame as it is stored.

    Args:
        aead: under the key of the file.
        name: of the file.
        number: of the frame in it, from 0.
        data: what it holds.
        nonce: 12 bytes never used with this key before.
    """
    header = _header(number, NONCE_BYTES + len(data) + TAG_BYTES)
    return header + nonce + aead.encrypt(nonce, data, _bound(name, header))


def open_frames(aead: AESGCM, name: str, raw: bytes) -> tuple[list[bytes], int]:
    """The frames of a file, and the offset where they end; a torn end is left out.

    Args:
        aead: under the key of the file.
        name: of the file.
        raw: its bytes.

    Raises:
        DamagedFramesError: a frame does not open, and it is not the torn last one.
    """
    frames: list[bytes] = []
    start = 0
    while (frame := _frame_at(aead, name, raw, start=start, number=len(frames))) is not None:
        data, start = frame
        frames.append(data)
    if _later_header(raw, start, len(frames)):
        raise DamagedFramesError(f"{name} was changed or damaged at byte {start}")
    return frames, start


def _header(number: int, length: int) -> bytes:
    """The header of a frame."""
    words = struct.pack("<III", _MARK, number, length)
    return words + struct.pack("<I", zlib.crc32(words))


def _bound(name: str, header: bytes) -> bytes:
    """Associated data of a frame; a name holds no NUL, so no blob's is the same."""
    return name.encode() + b"\0" + header


def _frame_at(aead: AESGCM, name: str, raw: bytes, *, start: int, number: int) -> tuple[bytes, int] | None:
    """The frame that begins at `start` and the offset after it, or None if it is not whole or not genuine."""
    header = raw[start : start + _HEADER.size]
    if len(header) < _HEADER.size:
        return None
    length = _HEADER.unpack(header)[2]
    body = start + _HEADER.size
    if header != _header(number, length) or length < NONCE_BYTES + TAG_BYTES or len(raw) < body + length:
        return None
    try:
        sealed = memoryview(raw)[body + NONCE_BYTES : body + length]
        return aead.decrypt(raw[body : body + NONCE_BYTES], sealed, _bound(name, header)), body + length
    except InvalidTag:
        return None


def _later_header(raw: bytes, start: int, number: int) -> bool:
    """Whether the header of a frame after frame `number` stands anywhere beyond `start`."""
    at = raw.find(_MARK_BYTES, start)
    while at >= 0:
        header = raw[at : at + _HEADER.size]
        if len(header) == _HEADER.size:
            _, found, length, _ = _HEADER.unpack(header)
            if found > number and header == _header(found, length):
                return True
        at = raw.find(_MARK_BYTES, at + 1)
    return False
