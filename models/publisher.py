"""The publisher's public key beside a bundle, ``publisher.pub``: one line of 64 hex digits."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fl_protocol.bundle import ModelBundle, open_bundle
from fl_protocol.errors import BundleError, LocalMisuseError
from fl_protocol.signing import public_key_from_hex, public_key_hex

PUBLIC_KEY_FILE = "publisher.pub"


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
