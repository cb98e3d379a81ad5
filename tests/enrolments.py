"""A study that admits pseudonyms, for tests of either side; and copies of modules that were broken on purpose."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from aggregator.adapters.open_blobs import open_blobs
from aggregator.admission import Admitter
from aggregator.certificates import KeyPair, make_ca
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.database import Database
from fl_protocol.enrolment import DAY_S, periods_from

NOW_S = 1_800_000_000.0
PERIOD_S = 30 * DAY_S
BEGINS_S = periods_from(NOW_S, period_days=30, count=1)[0].begins_s
TENANT, TASK = "clinic", "watch"
CA = make_ca("covey test", now_s=NOW_S)
AGGREGATOR = Ed25519PrivateKey.from_private_bytes(b"\x05" * 32)


@dataclass
class Office:
    """The admission office of a tenant with one task, its database in memory; answers are kept."""

    task: str = TASK
    tenant: str = TENANT
    ca: KeyPair = CA
    key: Ed25519PrivateKey = AGGREGATOR
    period_days: int = 30
    kind: type[Admitter] = Admitter
    answers: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        blobs = open_blobs("memory://enrolments")
        self.store = AggregatorStore(Database("sqlite:///:memory:", blobs=blobs), blobs)
        self.add_task(self.task)
        self.admitter = self.kind(self.store, self.tenant, self.ca, self.key, self.period_days)

    def add_task(self, name: str) -> None:
        """One more study."""
        about: dict[str, Any] = {
            "spec": "",
            "bundle": "",
            "validation": None,
            "graph_digest": bytes(32),
            "probability": 1.0,
        }
        with self.store.database.transaction() as connection:
            self.store.tasks.create(connection, name, **about, now_s=NOW_S)

    def admit(self, request: bytes, *, now_s: float = NOW_S) -> bytes:
        """The answer to a request."""
        self.admitter.admit(request, now_s=now_s, deliver=self.answers.append)
        return self.answers[-1]

    def registered(self) -> dict[str, bytes]:
        return dict(self.store.devices.all())


def reissued(
    old: x509.Certificate, change: Callable[[x509.CertificateBuilder], x509.CertificateBuilder], *, ca: KeyPair
) -> x509.Certificate:
    """A certificate of the CA's with the same content, then changed."""
    builder = x509.CertificateBuilder(
        issuer_name=old.issuer,
        subject_name=old.subject,
        public_key=old.public_key(),
        serial_number=old.serial_number,
        not_valid_before=old.not_valid_before_utc,
        not_valid_after=old.not_valid_after_utc,
        extensions=list(old.extensions),
    )
    key = load_pem_private_key(ca.key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return change(builder).sign(key, hashes.SHA256())


_copies = count()


def broken_copy(module: str, *changes: tuple[str, str]) -> ModuleType:
    """A module whose source was changed on purpose; without changes it is as good as the original."""
    original = importlib.import_module(module)
    assert original.__file__ is not None
    source = Path(original.__file__).read_text()
    for right, wrong in changes:
        if right not in source:  # no AssertionError, which whoever expects the copy to be caught would take for that
            raise LookupError(f"{module} no longer has {right!r}")
        source = source.replace(right, wrong)
    copy = ModuleType(f"{module}_copy_{next(_copies)}")
    sys.modules[copy.__name__] = copy  # dataclasses and msgspec look their module up
    exec(compile(source, f"<{copy.__name__}>", "exec"), copy.__dict__)  # noqa: S102 - our own source
    return copy
