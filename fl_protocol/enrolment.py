"""Enrolment of a device's pseudonyms: the request and the answer, what their signatures cover, and whose turn is when.

A pseudonym is a name on the wire for one task and one period, with a signing key and a TLS key of its own. Its name is
a hash of both keys, as in cryptographically generated addresses (RFC 3972): nobody can choose a name that says
something, take one that belongs to another's keys, or put another key behind one. Both keys' owners are proven: the TLS
key signs a certificate request (PKCS #10, RFC 2986) over the name, the signing key signs the whole entry.

Rows of short certificates issued in advance are how vehicles stay private (SCMS, Brecht et al. 2018, arXiv 1802.05323).
All pseudonyms of a study change at the same moments: a validity counted from each device's own enrolment would tell by
its dates which pseudonyms follow each other. Files hold JSON; this module reads and writes bytes, not files, and does
no I/O.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Meta

from fl_protocol.ed25519_keys import public_key_from_bytes
from fl_protocol.errors import LocalMisuseError, ProtocolError
from fl_protocol.messages import Name

DAY_S = 86_400
OVERLAP_S = DAY_S
"""A certificate is valid this much before and after its period: for updates still waiting for their receipt when the
period ends, and for clocks that are wrong by less."""
MAX_PSEUDONYMS = 64
MAX_FILE_BYTES = 512 * 1024
_ID_DIGITS = 32
_NAME, _ENTRY, _ANSWER = b"covey v1 pseudonym\0", b"covey v1 pseudonym entry\0", b"covey v1 pseudonym answer\0"

PseudonymId = Annotated[str, Meta(pattern=r"^p[0-9a-f]{32}\Z")]
HexKey = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
HexSignature = Annotated[str, Meta(pattern=r"^[0-9a-f]{128}\Z")]
Pem = Annotated[str, Meta(max_length=4096)]


class PseudonymEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One pseudonym that a device asks for.

    Args:
        id: `pseudonym_id` of its keys.
        signing_key: Ed25519 public key that its updates will be signed with, 64 hex digits.
        csr: PKCS #10 request of its P-256 TLS key, PEM; the subject is the id as common name and nothing else.
        signature: by the signing key, over tenant, task and the three above; 128 hex digits.
    """

    id: PseudonymId
    signing_key: HexKey
    csr: Pem
    signature: HexSignature


class PseudonymRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a device asks a study's operator for; it holds nothing else about the device or its wearer."""

    format: Literal["covey-pseudonym-request-1"]
    tenant: Name
    task: Name
    pseudonyms: Annotated[tuple[PseudonymEntry, ...], Meta(min_length=1, max_length=MAX_PSEUDONYMS)]


class IssuedCertificate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The certificate of one pseudonym, PEM."""

    id: PseudonymId
    certificate: Pem


class PseudonymAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the operator answers, signed by the aggregator whose key the device pins.

    Args:
        aggregator_key: Ed25519 public key of the aggregator, 64 hex digits.
        ca: certificate of the CA that issued the certificates and the broker's own, PEM.
        certificates: one for each pseudonym of the request.
        signature: by the aggregator, over everything else; 128 hex digits.
    """

    format: Literal["covey-pseudonym-answer-1"]
    tenant: Name
    task: Name
    aggregator_key: HexKey
    ca: Pem
    certificates: Annotated[tuple[IssuedCertificate, ...], Meta(min_length=1, max_length=MAX_PSEUDONYMS)]
    signature: HexSignature


F = TypeVar("F", PseudonymRequest, PseudonymAnswer)


@dataclass(frozen=True)
class Period:
    """The time in which a pseudonym is used, Unix seconds: `begins_s` up to, but without, `ends_s`."""

    begins_s: int
    ends_s: int

    @classmethod
    def of_validity(cls, not_before_s: float, not_after_s: float) -> Period:
        """The period that a certificate with this validity is for."""
        return cls(int(not_before_s) + OVERLAP_S, int(not_after_s) - OVERLAP_S)

    @property
    def not_before_s(self) -> int:
        """First second of the certificate."""
        return self.begins_s - OVERLAP_S

    @property
    def not_after_s(self) -> int:
        """Last second of the certificate."""
        return self.ends_s + OVERLAP_S

    def is_used_at(self, at_s: float) -> bool:
        """Whether new work is done under its pseudonym; of one device's pseudonyms that holds for one at a time."""
        return self.begins_s <= at_s < self.ends_s

    def is_valid_at(self, at_s: float) -> bool:
        """Whether its certificate holds; around a change that is so of two pseudonyms of a device."""
        return self.not_before_s <= at_s <= self.not_after_s

    def __str__(self) -> str:
        return f"{_minute(self.begins_s)} to {_minute(self.ends_s)}"


def periods_from(now_s: float, *, period_days: int, count: int) -> list[Period]:
    """The next `count` periods of a study, the one that holds `now_s` first; the same for every device.

    Args:
        now_s: Unix seconds.
        period_days: length of a period; at least 2, so that never more than two certificates of a row are valid.
        count: how many.

    Raises:
        LocalMisuseError: `period_days` is not in 2..366.
    """
    if not 2 <= period_days <= 366:
        raise LocalMisuseError(f"period_days: expected 2 to 366, got {period_days}")
    length_s = period_days * DAY_S
    first = int(now_s // length_s)
    return [Period(k * length_s, (k + 1) * length_s) for k in range(first, first + count)]


def pseudonym_id(*, tenant: str, task: str, signing_key: bytes, tls_key: bytes) -> str:
    """The name of a pseudonym: ``p`` and the first 128 bits of a SHA-256 over study and keys.

    Args:
        tenant: the study's.
        task: the study's.
        signing_key: raw Ed25519 public key.
        tls_key: the P-256 public key as DER SubjectPublicKeyInfo.
    """
    named = msgspec.msgpack.encode([tenant, task, signing_key, tls_key])
    return "p" + hashlib.sha256(_NAME + named).hexdigest()[:_ID_DIGITS]


def signed_entry(*, tenant: str, task: str, pseudonym: str, csr: str, key: Ed25519PrivateKey) -> PseudonymEntry:
    """An entry of a request, signed by its own signing key; runs at a device."""
    public = key.public_key().public_bytes_raw().hex()
    signature = key.sign(_entry_bytes(tenant, task, pseudonym, public, csr)).hex()
    return PseudonymEntry(id=pseudonym, signing_key=public, csr=csr, signature=signature)


def entry_signature_is_valid(entry: PseudonymEntry, *, tenant: str, task: str) -> bool:
    """Whether the holder of the entry's signing key asked for exactly this, in this study; runs at the aggregator."""
    try:
        key = public_key_from_bytes(bytes.fromhex(entry.signing_key))
        signed = _entry_bytes(tenant, task, entry.id, entry.signing_key, entry.csr)
        key.verify(bytes.fromhex(entry.signature), signed)
    except (InvalidSignature, ValueError):
        return False
    return True


def signed_answer(
    *, tenant: str, task: str, ca: str, certificates: Iterable[IssuedCertificate], key: Ed25519PrivateKey
) -> PseudonymAnswer:
    """An answer, signed by the aggregator."""
    issued, public = tuple(certificates), key.public_key().public_bytes_raw().hex()
    return PseudonymAnswer(
        format="covey-pseudonym-answer-1",
        tenant=tenant,
        task=task,
        aggregator_key=public,
        ca=ca,
        certificates=issued,
        signature=key.sign(_answer_bytes(tenant, task, public, ca, issued)).hex(),
    )


def answer_signature_is_valid(answer: PseudonymAnswer, key: Ed25519PublicKey) -> bool:
    """Whether the aggregator with this key signed the answer; runs at a device."""
    signed = _answer_bytes(answer.tenant, answer.task, answer.aggregator_key, answer.ca, answer.certificates)
    try:
        key.verify(bytes.fromhex(answer.signature), signed)
    except InvalidSignature:
        return False
    return True


def encode_file(content: PseudonymRequest | PseudonymAnswer) -> bytes:
    """The file's bytes: JSON that a person can read through before it is handed on."""
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


def decode_file(data: bytes, kind: type[F]) -> F:
    """Decode an untrusted request or answer file.

    Raises:
        ProtocolError: too long, not JSON, of another format, out of range, or with fields unknown or missing.
    """
    what = "request" if kind is PseudonymRequest else "answer"
    if len(data) > MAX_FILE_BYTES:
        raise ProtocolError(f"not a pseudonym {what}: expected at most {MAX_FILE_BYTES} bytes, got {len(data)}")
    try:
        return msgspec.json.decode(data, type=kind, strict=True)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a pseudonym {what}: {error}") from error


def _minute(at_s: float) -> str:
    """Unix seconds in UTC, such as 2026-11-22 00:00."""
    return datetime.datetime.fromtimestamp(at_s, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M")


def _entry_bytes(tenant: str, task: str, pseudonym: str, signing_key: str, csr: str) -> bytes:
    """What an entry's signature covers."""
    return _ENTRY + msgspec.msgpack.encode([tenant, task, pseudonym, signing_key, csr])


def _answer_bytes(tenant: str, task: str, key: str, ca: str, issued: tuple[IssuedCertificate, ...]) -> bytes:
    """What an answer's signature covers."""
    rows = [[one.id, one.certificate] for one in issued]
    return _ANSWER + msgspec.msgpack.encode([tenant, task, key, ca, rows])
