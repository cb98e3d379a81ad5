"""Files of publishers' private keys: one line of 64 hex digits, readable by their owner only."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fl_protocol.errors import LocalMisuseError

_RAW_BYTES = 32
_OTHERS = 0o077


def create_key(path: Path) -> Ed25519PrivateKey:
    """A new private key, written to `path`.

    Raises:
        LocalMisuseError: the file exists; a publisher's key is never overwritten.
    """
    key = Ed25519PrivateKey.generate()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise LocalMisuseError(f"{path} exists; a publisher's key is never overwritten: name another file.") from None
    except OSError as error:
        raise LocalMisuseError(f"{path} cannot be written ({error.strerror}): name another file.") from error
    with os.fdopen(descriptor, "w", encoding="ascii") as stream:
        stream.write(key.private_bytes_raw().hex() + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    return key


def load_key(path: Path) -> Ed25519PrivateKey:
    """The private key in `path`: 64 hex digits, or 32 raw bytes as aggregators and helpers keep theirs.

    Raises:
        LocalMisuseError: the file is missing, readable by others, or is no key.
    """
    try:
        mode, raw = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise LocalMisuseError(
            f"The key file {path} cannot be read ({error.strerror}); make one with covey-model key or "
            "covey-aggregator publisher keygen."
        ) from error
    # Security: whoever reads it can sign models that devices run.
    if mode & _OTHERS:
        raise LocalMisuseError(f"The key file {path} can be read by others; run chmod 600 on it.")
    try:
        return Ed25519PrivateKey.from_private_bytes(
            raw if len(raw) == _RAW_BYTES else bytes.fromhex(raw.decode("ascii").strip())
        )
    except ValueError:
        raise LocalMisuseError(f"{path} does not hold an Ed25519 private key as 64 hex digits.") from None
