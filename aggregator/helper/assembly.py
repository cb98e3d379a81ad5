"""From a ``helper.toml`` to a helper: identity, store, and a connection for each study."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.errors import DatabaseError
from aggregator.helper.answering import Study
from aggregator.helper.config import HelperConfig
from aggregator.helper.helper_store import HelperDatabase, HelperStore
from aggregator.helper.key_ring import Helper, KeyTerms
from aggregator.helper.service import HelperLimits, HelperService
from fl_protocol.adapters.config_files import load_toml, pinned_key, read_file, relative_to_config
from fl_protocol.adapters.connect import make_transport
from fl_protocol.adapters.files import write_atomic
from fl_protocol.adapters.journal import Journal
from fl_protocol.errors import ConfigError

_IDENTITY_BYTES = 32
_OTHERS = 0o077


@dataclass(frozen=True)
class HelperFiles:
    """A configuration file and what it names."""

    path: Path
    config: HelperConfig

    @classmethod
    def load(cls, path: Path) -> HelperFiles:
        """Read and check a ``helper.toml``. Raises ConfigError."""
        return cls(path, load_toml(path, HelperConfig))

    def create(self) -> Helper:
        """Make identity and store where there are none; who the helper is. Raises ConfigError, DatabaseError."""
        path = self._beside(self.config.helper.identity)
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, os.urandom(_IDENTITY_BYTES))
        except OSError as error:
            raise ConfigError(f"helper.identity: {path} cannot be written ({error.strerror})") from error
        helper = self.helper()
        HelperDatabase(self._beside(self.config.helper.store)).close()
        return helper

    def helper(self) -> Helper:
        """Who the helper is.

        Raises:
            ConfigError: its identity is missing, of the wrong size, or readable by others.
        """
        section = self.config.helper
        path = self._beside(section.identity)
        raw = read_file(path, "helper.identity (covey-helper init makes it)")
        # Security: whoever reads it can answer in this helper's name.
        if path.stat().st_mode & _OTHERS:
            raise ConfigError(f"helper.identity: others can read {path}; run chmod 600 on it")
        if len(raw) != _IDENTITY_BYTES:
            raise ConfigError(f"helper.identity: expected {_IDENTITY_BYTES} bytes in {path}, got {len(raw)}")
        return Helper(section.name, section.operator, Ed25519PrivateKey.from_private_bytes(raw))

    @contextmanager
    def store(self) -> Iterator[HelperStore]:
        """The store, closed in the end. Raises DatabaseError."""
        opened = self.open_store()
        try:
            yield opened
        finally:
            opened.close()

    def open_store(self) -> HelperStore:
        """The store. Raises DatabaseError: there is none, or it cannot be opened."""
        path = self._beside(self.config.helper.store)
        # A mistyped path must not look like a helper that has answered nothing.
        if not path.exists():
            raise DatabaseError(f"there is no store {path}; make it with covey-helper init, or correct helper.store")
        return HelperStore(HelperDatabase(path), most_refusals=self.config.helper.most_refusals)

    def studies(self) -> list[Study]:
        """The studies with their pinned keys and CAs. Raises ConfigError."""
        return [
            Study(
                one.tenant,
                pinned_key(self.path, f"study {one.tenant}: aggregator_key", one.aggregator_key),
                cas=() if one.ca is None else pinned_cas(self._beside(one.ca), f"study {one.tenant}: ca"),
                allow_listed=one.allow_listed,
            )
            for one in self.config.studies
        ]

    def check_tenant(self, tenant: str) -> str:
        """A study that is configured. Raises ConfigError: it is not."""
        known = [one.tenant for one in self.config.studies]
        if tenant not in known:
            raise ConfigError(f"--tenant: expected one of {', '.join(known)}, got {tenant!r}")
        return tenant

    def _beside(self, name: str) -> Path:
        """A path that the file names."""
        return relative_to_config(self.path, name)


def pinned_cas(path: Path, option: str) -> tuple[x509.Certificate, ...]:
    """The CAs whose certificates make devices known.

    Args:
        path: PEM file with one or more.
        option: that named it, for the error.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        found = tuple(x509.load_pem_x509_certificates(read_file(path, option)))
        are_cas = all(one.extensions.get_extension_for_class(x509.BasicConstraints).value.ca for one in found)
    except (ValueError, x509.InvalidVersion, x509.ExtensionNotFound) as error:
        raise ConfigError(f"{option}: expected certificates of CAs in PEM in {path}; {error}") from error
    if not are_cas:
        raise ConfigError(f"{option}: expected certificates of CAs in {path}, got one that may issue none")
    return found


def assemble(files: HelperFiles, *, journal: Journal) -> HelperService:
    """A helper ready to run.

    Args:
        files: its configuration.
        journal: where its events go.

    Raises:
        ConfigError, DatabaseError: something is missing or does not fit.
    """
    section, arrived = files.config.helper, threading.Event()
    transports = {
        one.tenant: make_transport(one.broker, config=files.path, client_id=section.name, wake=arrived.set)
        for one in files.config.studies
        if one.broker is not None
    }
    return HelperService(
        files.helper(),
        studies=files.studies(),
        transports=transports,
        store=files.open_store(),
        journal=journal,
        entropy=os.urandom,
        now_s=time.time,
        limits=HelperLimits(section.minimum_cohort, section.answers_kept_s, section.request_bytes),
        key_terms=KeyTerms.of(section),
        wait=_waiter(arrived),
    )


@contextmanager
def serving_https(files: HelperFiles, service: HelperService) -> Iterator[None]:
    """The helper over HTTPS too, if the configuration says so.

    Args:
        files: its configuration.
        service: what answers.

    Raises:
        ConfigError: what HTTPS needs is not installed, or its files cannot be used.
        AggregatorError: the address cannot be listened on.
    """
    section = files.config.https
    if section is None:
        yield
        return
    try:
        # Here, so that a helper on MQTT alone needs neither library.
        from aggregator.helper.https_api import make_api, serve_https  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(f"[https] needs what pip install covey[helper] installs ({error})") from error
    tenants = [study.tenant for study in files.config.studies]
    api = make_api(service.answerer, keys=service.keys, tenants=tenants, now_s=time.time)
    with serve_https(api, section, files.path):
        yield


def _waiter(arrived: threading.Event) -> Callable[[float], None]:
    """Waits until a transport has something, or not longer than told."""

    def wait(longest_s: float) -> None:
        arrived.wait(longest_s)
        arrived.clear()  # what came since is polled next

    return wait
