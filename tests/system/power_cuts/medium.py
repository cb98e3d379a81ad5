"""What is on a device's flash, read without any of the device's own code: AES-GCM, MessagePack, JSON."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_NONCE_BYTES = 12
_WEARERS_DATA = {"control", "counted", "download", "outbox", "personal"}


class UnreadableError(Exception):
    """Something on the medium does not open."""


class Medium:
    """A flash's content, whole as after a power cut.

    Args:
        files: by name, partition first.
        store_key: 32 bytes.
    """

    def __init__(self, files: dict[str, bytes], store_key: bytes) -> None:
        self.files, self._aead = files, AESGCM(store_key)

    def blob(self, name: str) -> bytes | None:
        """A decrypted blob, None where there is none or its key is destroyed. Raises UnreadableError."""
        raw = self.files.get(f"store/{name}")
        if raw is None:
            return None
        aead: AESGCM | None = self._aead
        if name.partition("/")[0] in _WEARERS_DATA:
            aead = self._data_key()
        return None if aead is None else _opened(aead, raw, name)

    def decoded(self, name: str) -> Any:
        """A blob's MessagePack, None where there is none."""
        raw = self.blob(name)
        return None if raw is None else msgspec.msgpack.decode(raw)

    def of_study(self, kind: str, study: str) -> Any:
        """A study's blob of a kind, decoded."""
        return self.decoded(study_blob(kind, study))

    def outbox(self) -> dict[str, dict[str, Any]]:
        """Entries by update id (hex)."""
        prefix = "store/outbox/"
        names = [name.removeprefix("store/") for name in self.files if name.startswith(prefix)]
        found = {name: self.decoded(name) for name in names if not name.endswith(".tmp")}
        return {name.removeprefix("outbox/"): entry for name, entry in found.items() if entry is not None}

    def ledger(self) -> list[dict[str, Any]]:
        """Lines up to the first that is not whole or does not follow from the one before."""
        lines: list[dict[str, Any]] = []
        previous = "0" * 64
        for raw in self.files.get("store/ledger.jsonl", b"").split(b"\n")[:-1]:
            try:
                line = json.loads(raw)
            except ValueError:
                break
            if not isinstance(line, dict) or line.get("previous") != previous:
                break
            previous = hashlib.sha256(raw).hexdigest()
            lines.append(line)
        return lines

    def _data_key(self) -> AESGCM | None:
        """The key of the wearer's data, None once it is destroyed."""
        raw = self.files.get("store/.data-key")
        return None if raw is None else AESGCM(_opened(self._aead, raw, "data key"))


def study_blob(kind: str, study: str) -> str:
    """Where a study's blob of a kind lies."""
    return f"{kind}/{hashlib.sha256(study.encode()).hexdigest()[:32]}"


def _opened(aead: AESGCM, raw: bytes, bound: str) -> bytes:
    """Decrypted bytes. Raises UnreadableError."""
    try:
        return aead.decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], bound.encode())
    except (InvalidTag, ValueError):
        raise UnreadableError(f"{bound} does not open") from None
