"""Admitting a device's pseudonyms: every claim in its request is checked, then all are registered and certified, or
none.

The device is unknown and may be hostile. Of its certificate request only the key is used, and only after the request
turned out to be exactly a name and a key: a wish for an extension (to be a CA, say), a second name or an attribute is
refused, not ignored, so that no device can believe that it was granted and nothing else about it comes along.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from sqlalchemy import Connection, insert, or_, select

from aggregator.audit.entries import Detail
from aggregator.audit.log import AuditEvent, append
from aggregator.certificates import KeyPair, certify
from aggregator.errors import AggregatorError
from aggregator.store import schema
from aggregator.store.aggregator_store import AggregatorStore
from fl_protocol.client_certificates import is_only_name, key_info
from fl_protocol.enrolment import (
    IssuedCertificate,
    Period,
    PseudonymEntry,
    PseudonymRequest,
    decode_file,
    encode_file,
    entry_signature_is_valid,
    periods_from,
    pseudonym_id,
    signed_answer,
)
from fl_protocol.errors import ProtocolError


@dataclass(frozen=True)
class Candidate:
    """A pseudonym whose keys were shown to be held by whoever asks for it."""

    id: str
    signing_key: bytes
    tls_key: ec.EllipticCurvePublicKey


@dataclass(frozen=True)
class Admission:
    """What was admitted: the pseudonyms' ids, and the whole time they are for."""

    ids: tuple[str, ...]
    period: Period


@dataclass(frozen=True)
class Certified:
    """Pseudonyms with their certificates, before they are registered.

    Args:
        task: of the study.
        candidates: whose keys were shown to be held.
        periods: of each.
        certificates: of each, PEM.
        answer: the answer file.
    """

    task: str
    candidates: tuple[Candidate, ...]
    periods: tuple[Period, ...]
    certificates: tuple[bytes, ...]
    answer: bytes

    @property
    def admission(self) -> Admission:
        """What is admitted by it."""
        whole = Period(self.periods[0].begins_s, self.periods[-1].ends_s)
        return Admission(tuple(one.id for one in self.candidates), whole)


@dataclass(frozen=True)
class Admitter:
    """A tenant's admission office, for all studies whose task is in the database.

    Args:
        store: where devices are registered.
        tenant: name on the wire.
        ca: issues the certificates.
        signing_key: the aggregator's, which devices pin.
        period_days: how long each pseudonym is used, 2 to 366.
        actor: who admits, as the audit log names them.
    """

    store: AggregatorStore
    tenant: str
    ca: KeyPair
    signing_key: Ed25519PrivateKey
    period_days: int = 30
    actor: str = "desk"

    def admit(
        self, request: bytes, *, now_s: float, deliver: Callable[[bytes], None], told_s: float | None = None
    ) -> Admission:
        """Check a request, register and certify all its pseudonyms, and deliver the answer.

        Args:
            request: the request file.
            now_s: Unix seconds; the first pseudonym is for the period that holds it.
            deliver: takes the answer file and keeps it; if it raises, nothing was registered.
            told_s: what the audit log says when it was; None for `now_s`.

        Raises:
            ProtocolError: the request is malformed or claims something that is not so.
            AggregatorError: it was admitted before, or the CA ends too early.
            DatabaseError: the database does not take it.
        """
        certified = self.certify(request, first_s=now_s)
        with self.store.database.transaction() as connection:
            register(connection, certified, now_s=now_s)
            # Security: the names of one device do not stand together in the log.
            digest = hashlib.sha256(request).hexdigest()
            detail: dict[str, Detail] = {"count": len(certified.candidates), "request_sha256": digest}
            at_s = now_s if told_s is None else told_s
            append(connection, AuditEvent(at_s, self.actor, "device.admitted", certified.task, detail))
            # Before the commit: a registered pseudonym whose certificate was lost could never be used.
            deliver(certified.answer)
        return certified.admission

    def certify(self, request: bytes, *, first_s: float) -> Certified:
        """Check a request and certify its pseudonyms; nothing is registered yet. Raises as `admit`.

        Args:
            request: the request file.
            first_s: Unix seconds; the first pseudonym is for the period that holds it.
        """
        task, candidates = self.examine(request)
        periods = periods_from(first_s, period_days=self.period_days, count=len(candidates))
        issued = [
            certify(self.ca, one.id, one.tls_key, not_before_s=period.not_before_s, not_after_s=period.not_after_s)
            for one, period in zip(candidates, periods, strict=True)
        ]
        return Certified(task, candidates, tuple(periods), tuple(issued), self._answer(task, candidates, issued))

    def examine(self, request: bytes) -> tuple[str, tuple[Candidate, ...]]:
        """The task and the pseudonyms of a request, every proof checked. Raises ProtocolError or DatabaseError."""
        decoded = decode_file(request, PseudonymRequest)
        study = f"{decoded.tenant}/{decoded.task}"
        if decoded.tenant != self.tenant:
            raise ProtocolError(f"the request: expected one for a study of {self.tenant}, got one for {study}")
        if decoded.task not in self.store.tasks.specs():
            raise ProtocolError(
                f"the request: expected one for a task that there is here, got one for {study}; see covey-aggregator "
                "task list"
            )
        found = tuple(self._candidate(decoded.task, entry) for entry in decoded.pseudonyms)
        # Security: two pseudonyms with a key in common are no pseudonyms.
        for what, keys in (
            ("signing key", {one.signing_key for one in found}),
            ("TLS key", {key_info(one.tls_key) for one in found}),
        ):
            if len(keys) < len(found):
                raise ProtocolError(f"the request: expected a {what} of its own for each pseudonym, got one twice")
        return decoded.task, found

    def _candidate(self, task: str, entry: PseudonymEntry) -> Candidate:
        """One entry, its proofs checked."""
        if not entry_signature_is_valid(entry, tenant=self.tenant, task=task):
            raise ProtocolError(f"pseudonym {entry.id}: the entry is not signed by its own signing key")
        signing_key, tls_key = bytes.fromhex(entry.signing_key), _requested_key(entry)
        expected = pseudonym_id(tenant=self.tenant, task=task, signing_key=signing_key, tls_key=key_info(tls_key))
        if entry.id != expected:
            raise ProtocolError(f"pseudonym {entry.id}: expected the name that follows from its keys, {expected}")
        return Candidate(entry.id, signing_key, tls_key)

    def _answer(self, task: str, candidates: tuple[Candidate, ...], issued: Sequence[bytes]) -> bytes:
        """The answer file."""
        return encode_file(
            signed_answer(
                tenant=self.tenant,
                task=task,
                ca=self.ca.certificate.decode(),
                certificates=[
                    IssuedCertificate(id=one.id, certificate=certificate.decode())
                    for one, certificate in zip(candidates, issued, strict=True)
                ],
                key=self.signing_key,
            )
        )


def register(connection: Connection, certified: Certified, *, now_s: float) -> None:
    """Let pseudonyms send updates, each in its time; part of a transaction.

    Raises:
        AggregatorError: one of them is registered already.
    """
    _refuse_known(connection, certified.candidates)
    named = list(zip(certified.candidates, certified.periods, strict=True))
    rows = [{"device": one.id, "public_key": one.signing_key, "added_s": now_s} for one, _ in named]
    connection.execute(insert(schema.devices), rows)
    valid = [
        {"device": one.id, "not_before_s": period.not_before_s, "not_after_s": period.not_after_s}
        for one, period in named
    ]
    connection.execute(insert(schema.device_periods), valid)


def _requested_key(entry: PseudonymEntry) -> ec.EllipticCurvePublicKey:
    """The P-256 key of a certificate request that is exactly the entry's name and this key, signed by it."""
    where = f"pseudonym {entry.id}: its certificate request"
    try:
        csr = x509.load_pem_x509_csr(entry.csr.encode())
        key, attributes, is_named = csr.public_key(), list(csr.attributes), is_only_name(csr.subject, entry.id)
        is_proven = csr.is_signature_valid
    # TypeError: `cryptography` has no type for what stands in a name, such as a BIT STRING.
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise ProtocolError(f"{where}: expected PKCS #10 in PEM; {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ProtocolError(f"{where}: expected a P-256 key, got another kind")
    if not is_proven:
        raise ProtocolError(f"{where} is not signed by the key in it")
    if not is_named:
        raise ProtocolError(f"{where}: expected the pseudonym as its only name, got {csr.subject.rfc4514_string()!r}")
    # A wish for extensions is an attribute too (PKCS #9, extensionRequest).
    if attributes:
        raise ProtocolError(f"{where}: expected a name and a key, got {len(attributes)} attribute(s) besides")
    if csr.public_bytes(Encoding.PEM).decode() != entry.csr:
        raise ProtocolError(f"{where}: expected PEM and nothing around it")
    return key


def _refuse_known(connection: Connection, candidates: tuple[Candidate, ...]) -> None:
    """Refuse ids and signing keys that are registered already."""
    table = schema.devices.c
    known = or_(
        table.device.in_([one.id for one in candidates]), table.public_key.in_([one.signing_key for one in candidates])
    )
    first = connection.execute(select(table.device).where(known).order_by(table.device)).scalars().first()
    if first is not None:
        raise AggregatorError(
            f"this request was admitted before ({first} is registered): use the answer that was written then, or let "
            "the device make another request with covey-device pseudonyms request --anew"
        )
