"""The publisher's key files: one line of 64 hex digits each, the private one readable by its owner only."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fl_protocol.bundle import ModelBundle, open_bundle
from fl_protocol.errors import BundleError, LocalMisuseError
from fl_protocol.signing import public_key_from_hex, public_key_hex

PUBLIC_KEY_FILE = "publisher.pub"


def create_key(path: Path) -> Ed25519PrivateKey:
    """A new private key, written to `path`.

    Raises:
        LocalMisuseError: the file exists; a publisher's key is never overwritten.
    """
    key = Ed25519PrivateKey.generate()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise LocalMisuseError(f"{path} exists; a publisher's key is never overwritten: name another file.") from None
    except OSError as error:
        raise LocalMisuseError(f"{path} cannot be written ({error.strerror}): name another file.") from error
    with os.fdopen(descriptor, "w", encoding="ascii") as stream:
        stream.write(key.private_bytes_raw().hex() + "\n")
    return key


def load_key(path: Path) -> Ed25519PrivateKey:
    """The private key in `path`.

    Raises:
        LocalMisuseError: the file is missing or is no key.
    """
    try:
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text(encoding="ascii").strip()))
    except OSError as error:
        raise LocalMisuseError(f"The key file {path} cannot be read ({error.strerror}); make one with key.") from error
    except ValueError:
        raise LocalMisuseError(f"{path} does not hold an Ed25519 private key as 64 hex digits.") from None


def check_public_key(folder: Path, key: Ed25519PrivateKey, *, force: bool) -> None:
    """Refuse to replace another publisher's ``publisher.pub``: devices and people pin it. Raises LocalMisuseError."""
    path = folder / PUBLIC_KEY_FILE
    own = public_key_hex(key.public_key())
    if path.exists() and not force and path.read_text(encoding="utf-8", errors="replace").strip() != own:
        raise LocalMisuseError(
            f"{path} is the key of another publisher: sign with that publisher's --key, write to another folder, or "
            "give --force to replace it."
        )


def write_public_key(key: Ed25519PrivateKey, folder: Path) -> Path:
    """Write ``publisher.pub``, which devices pin, to `folder`."""
    path = folder / PUBLIC_KEY_FILE
    path.write_text(public_key_hex(key.public_key()) + "\n", encoding="ascii")
    return path


def load_public_key(path: Path) -> Ed25519PublicKey:
    """The public key in `path`.

    Raises:
        BundleError: the file is missing.
        LocalMisuseError: the file is no key.
    """
    try:
        return public_key_from_hex(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise BundleError(
            f"The publisher's key {path} cannot be read ({error.strerror}): name the file with --verify or --publisher."
        ) from error


def opened(path: Path, key_file: Path | None) -> ModelBundle:
    """A bundle from a file, verified with the publisher's key: that in `key_file`, or ``publisher.pub`` beside it.

    Raises:
        BundleError: bundle or key cannot be read, or the publisher did not sign it.
    """
    trusted = load_public_key(key_file or path.parent / PUBLIC_KEY_FILE)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"The bundle {path} cannot be read ({error.strerror}).") from error
    return open_bundle(data, publisher=trusted)
