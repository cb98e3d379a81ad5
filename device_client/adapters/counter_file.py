"""The ledger's counter in a small file of its own, best on another medium than the store's.

Two slots of a preallocated file are overwritten in turns, in place: one write and one fsync, no other file and no
folder changes. A power cut tears at most the slot that was being written; the other one holds what was there before.
Each slot is AES-256-GCM (`cryptography`) of a sequence number and the data, under a key of its own derived from the
store's (HKDF-SHA256, RFC 5869); its place and what it is for are bound as associated data. Nonces are random, since a
slot that was torn is written again under the same sequence number.

It does not notice when it is itself put back to an older state; only together with the ledger's log does it say
something (`device_client.ledger.chain`).
"""

from __future__ import annotations

import os
from collections.abc import Callable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from device_client.errors import LedgerError, StoreError
from fl_protocol.durable import Disk, write_atomic
from fl_protocol.errors import LocalMisuseError

MAXIMUM_BYTES = 128
_PURPOSE = b"covey ledger counter, version 1"
_SLOTS = 2
_SLOT_BYTES = 4096  # a block of its own, so that tearing one leaves the other alone
_NONCE_BYTES, _TAG_BYTES, _NUMBER_BYTES, _LENGTH_BYTES = 12, 16, 8, 2
_SEALED_BYTES = _NONCE_BYTES + _NUMBER_BYTES + _LENGTH_BYTES + MAXIMUM_BYTES + _TAG_BYTES


class CounterFile:
    """`device_client.ledger.Counter` in a file; one process at a time, which the store's lock sees to.

    Args:
        disk: folder that the file is in.
        name: of the file; it may be renamed and moved.
        key: the store's 32 bytes.
        entropy: where nonces come from.
    """

    def __init__(self, disk: Disk, name: str, key: bytes, *, entropy: Callable[[int], bytes] = os.urandom) -> None:
        self._disk, self._name, self._entropy = disk, name, entropy
        self._aead = AESGCM(HKDF(SHA256(), 32, salt=None, info=_PURPOSE).derive(key))
        self._number: int | None = None  # of the newest slot, once that is known
        self._is_durable = False  # a killed process may have left a slot in the system's memory only

    def read(self) -> bytes | None:
        """What was last advanced to, None where there is no file.

        Raises:
            LedgerError: neither slot is whole.
            StoreError: the disk does not give it.
        """
        try:
            raw = self._disk.read(self._name)
        except OSError as error:
            raise StoreError(f"the ledger's counter {self._name} cannot be read ({error.strerror})") from error
        if raw is None:
            return None
        newest = max(filter(None, (self._open(slot, raw) for slot in range(_SLOTS))), default=None)
        if newest is None:
            raise LedgerError(f"the ledger's counter {self._name} is damaged, or belongs to a store with another key")
        self._number, data = newest
        return data

    def advance(self, data: bytes) -> None:
        """Durably replace it.

        Raises:
            StoreError: the disk did not take it; it is then the old one or the new.
        """
        if len(data) > MAXIMUM_BYTES:
            raise LocalMisuseError(f"data: expected at most {MAXIMUM_BYTES} bytes, got {len(data)}")
        try:
            newest = self._newest_number()
            self._number = self._create(data) if newest is None else self._overwrite(newest + 1, data)
        except OSError as error:
            # The next attempt takes the same slot again: what a failed fsync left of it is not to be relied on.
            raise StoreError(f"the ledger's counter {self._name} cannot be written ({error.strerror})") from error

    def _newest_number(self) -> int | None:
        """The newest slot's sequence number; None where there is no file, or nothing whole in it."""
        if self._number is None:
            try:
                self.read()
            except LedgerError:
                return None  # a person accepted that: `PrivacyLedger.reanchor`
        return self._number

    def _create(self, data: bytes) -> int:
        """A new file, its first slot written."""
        write_atomic(self._disk, self._name, self._seal(0, data).ljust(_SLOTS * _SLOT_BYTES, b"\0"))
        return 0

    def _overwrite(self, number: int, data: bytes) -> int:
        """The slot that is not the newest."""
        if not self._is_durable:
            self._disk.sync(self._name)
            self._disk.sync_folder(self._name.rpartition("/")[0])
            self._is_durable = True
        self._disk.write_at(self._name, (number % _SLOTS) * _SLOT_BYTES, self._seal(number, data))
        self._disk.sync(self._name)
        return number

    def _seal(self, number: int, data: bytes) -> bytes:
        """A slot's bytes."""
        plain = number.to_bytes(_NUMBER_BYTES, "big") + len(data).to_bytes(_LENGTH_BYTES, "big")
        nonce = self._entropy(_NONCE_BYTES)
        return nonce + self._aead.encrypt(nonce, plain + data.ljust(MAXIMUM_BYTES, b"\0"), _label(number % _SLOTS))

    def _open(self, slot: int, raw: bytes) -> tuple[int, bytes] | None:
        """Sequence number and data of a slot, None if it is torn or was never written."""
        sealed = raw[slot * _SLOT_BYTES :][:_SEALED_BYTES]
        if len(sealed) < _SEALED_BYTES:
            return None
        try:
            plain = self._aead.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], _label(slot))
        except InvalidTag:
            return None
        number = int.from_bytes(plain[:_NUMBER_BYTES], "big")
        length = int.from_bytes(plain[_NUMBER_BYTES:][:_LENGTH_BYTES], "big")
        return number, plain[_NUMBER_BYTES + _LENGTH_BYTES :][:length]


def _label(slot: int) -> bytes:
    """Associated data: what this is, and its place."""
    return _PURPOSE + bytes([slot])
