"""Configuration files: TOML decoded into structs, with the offending key named; paths relative to the file."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fl_protocol.errors import ConfigError, LocalMisuseError
from fl_protocol.publishers import PublisherPins, Publishers
from fl_protocol.signing import public_key_from_hex

T = TypeVar("T")


def load_toml(path: Path, kind: type[T]) -> T:
    """Decode a TOML file strictly as `kind`.

    Raises:
        ConfigError: the file is missing or unreadable, is not TOML, or has a key that is wrong, missing or unknown.
    """
    try:
        return msgspec.toml.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise ConfigError(f"configuration {path}: expected a readable TOML file ({error.strerror})") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {path}: {error}") from error


def relative_to_config(config: Path, name: str) -> Path:
    """A path named in a configuration file: relative ones start at the file's folder."""
    return config.parent / Path(name).expanduser()


def pinned_key(config: Path | str, name: str, text: str) -> Ed25519PublicKey:
    """A public key that a configuration file pins as hex digits.

    Args:
        config: the file, for the error.
        name: the key's name in it, such as ``study.aggregator_key``.
        text: its value.

    Raises:
        ConfigError: it is not a public key.
    """
    try:
        return public_key_from_hex(text)
    except LocalMisuseError as error:
        raise ConfigError(f"configuration {config}: {name}: {error}") from error


def pinned_publishers(config: Path | str, pins: PublisherPins, *, section: str = "") -> Publishers:
    """The publishers that a configuration file pins.

    Args:
        config: the file, for the error.
        pins: what it says.
        section: where in it they are, such as ``study``.

    Raises:
        ConfigError: one of them is not a public key.
    """
    name = ".".join([*([section] if section else []), "publisher_key" if len(pins.keys) == 1 else "publishers"])
    try:
        return Publishers(tuple(pinned_key(config, name, key) for key in pins.keys), pins.threshold)
    except LocalMisuseError as error:
        raise ConfigError(f"configuration {config}: {name}: {error}") from error


def read_file(path: Path, what: str) -> bytes:
    """The bytes of a file that a configuration names.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{what}: expected a readable file at {path} ({error.strerror})") from error
