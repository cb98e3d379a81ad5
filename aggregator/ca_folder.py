"""The folder that holds a study's CA: ``ca.pem``, and ``ca.key`` for its owner only; and what the CA issues as files.

No file is ever replaced: a lost CA key means that every device must be admitted anew.
"""

from __future__ import annotations

from pathlib import Path

from aggregator.certificates import KeyPair, check_ca, issue, make_ca
from fl_protocol.adapters.config_files import read_file
from fl_protocol.adapters.files import write_atomic
from fl_protocol.errors import ConfigError

_CERTIFICATE, _KEY = "ca.pem", "ca.key"


def create_ca(folder: Path, *, name: str, now_s: float) -> None:
    """Make a CA in a folder that has none.

    Args:
        folder: created where missing.
        name: of the CA, for people; it is in every certificate, and so seen by the broker.
        now_s: Unix seconds.

    Raises:
        ConfigError: the name is none, there is a CA already, or the folder cannot be written.
    """
    if not 1 <= len(name) <= 64 or not name.isprintable():
        raise ConfigError(f"--name: expected 1 to 64 printable characters, got {name[:80]!r}")
    made = make_ca(name, now_s=now_s)
    write_new(folder, {_KEY: made.key, _CERTIFICATE: made.certificate}, option="--ca")


def load_ca(folder: Path) -> KeyPair:
    """The CA in a folder.

    Raises:
        ConfigError: there is none, or others can read its key.
        AggregatorError: its files do not belong together.
    """
    ca = KeyPair(read_file(folder / _CERTIFICATE, "--ca"), read_file(folder / _KEY, "--ca"))
    # Security: whoever reads this key can pose as any device, and as the broker.
    if (folder / _KEY).stat().st_mode & 0o077:
        raise ConfigError(f"--ca: the CA key {folder / _KEY} can be read by others; run chmod 600 on it")
    check_ca(ca)
    return ca


def issue_server(ca: KeyPair, folder: Path, *, hosts: tuple[str, ...], now_s: float) -> None:
    """Write ``broker.pem``, ``broker.key`` and ``ca.pem``: what mosquitto needs. Raises ConfigError."""
    made = issue(ca, "broker", now_s=now_s, server_hosts=hosts)
    files = {"broker.key": made.key, "broker.pem": made.certificate, _CERTIFICATE: ca.certificate}
    write_new(folder, files, option="--out")


def issue_client(ca: KeyPair, folder: Path, *, name: str, now_s: float) -> None:
    """Write a client's certificate, its key and ``ca.pem``, for the aggregator itself. Raises ConfigError."""
    made = issue(ca, name, now_s=now_s)
    files = {f"{name}.key": made.key, f"{name}.pem": made.certificate, _CERTIFICATE: ca.certificate}
    write_new(folder, files, option="--out")


def write_new(folder: Path, files: dict[str, bytes], *, option: str) -> None:
    """Write files that are not there yet, private ones for their owner only.

    Args:
        folder: created where missing.
        files: content by name; the same content under a name that exists is left as it is.
        option: that named the folder, for the error.

    Raises:
        ConfigError: a file of another content is there already, or one cannot be written.
    """
    try:
        there = {name for name in files if (folder / name).exists()}
        clash = [name for name in sorted(there) if (folder / name).read_bytes() != files[name]]
        if clash:
            raise ConfigError(f"{option}: {folder / clash[0]} exists and is not replaced; name another place")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, data in files.items():
            if name not in there:
                write_atomic(folder / name, data, mode=0o644 if name.endswith(".pem") else 0o600)
    except OSError as error:
        raise ConfigError(f"{option}: {folder} cannot be written ({error.strerror})") from error
