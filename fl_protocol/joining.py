"""Joining a study over the wire: tokens, the claim that everybody may read, and the sealed request and answer (ADR 15).

A token is a secret that is good for one device, and a fingerprint of the study that it is for, so that whoever was
given a token over a trusted way can tell the study, and the study can tell the token. The broker is trusted with
nothing: request and answer are sealed (HPKE, RFC 9180), since a token that it could read it could use, and since they
hold which pseudonyms are one device's. Pure: bytes in, bytes or a `ProtocolError` out.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import Annotated, Literal, NamedTuple

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import UNSET, Meta, UnsetType

from fl_protocol.ed25519_keys import public_key_from_bytes
from fl_protocol.enrolment import MAX_FILE_BYTES, HexKey, Pem
from fl_protocol.errors import LocalMisuseError, ProtocolError
from fl_protocol.helper_config import HelperPin
from fl_protocol.limits import MAX_PACKET_BYTES
from fl_protocol.message_base import Digest, KemName, Msg, Name, RecipientKeyMsg, Seconds
from fl_protocol.messages import SignedMsg, decode, encode
from fl_protocol.publishers import MOST_PUBLISHERS, PublisherPins, publisher_pins
from fl_protocol.renewal_proof import RenewalProofMsg
from fl_protocol.sealing import RoundKey, open_sealed, seal_to
from fl_protocol.signing import public_key_from_hex

SECRET_BYTES = 16
MAX_NAMES_BYTES = MAX_PACKET_BYTES - 8192
"""Longest row of names, or of certificates: each travels in one MQTT message, and 64 names take 60 kB of it."""
_FINGERPRINT_BYTES = 16
_PREFIX = "covey1-"
_TEXT_LENGTH = 52
_REQUEST, _ANSWER = b"covey v1 enrolment request\0", b"covey v1 enrolment answer\0"
_CLAIM, _TOKEN = b"covey v1 claim\0", b"covey v1 enrolment token\0"
Host = Annotated[str, Meta(min_length=1, max_length=253)]
Port = Annotated[int, Meta(ge=1, le=65_535)]
Outcome = Literal[
    "enrolled",
    "renewed",
    "unknown_token",
    "expired_token",
    "used_token",
    "withdrawn_token",
    "quota_exhausted",
    "not_enrolled",
    "revoked",
    "too_early",
    "refused",
    "busy",
]
"""What came of a request; all but the first two are refusals, and `busy` alone asks for another try."""


class Address(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a broker listens."""

    host: Host
    port: Port


class Claim(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a device needs to ask, the same for all devices of a study and no secret: a file beside the software.

    Args:
        tenant, task: the study.
        aggregator_key: Ed25519, 64 hex digits.
        kem, enrolment_key: HPKE public key that requests are sealed to, base64.
        ca: certificate of the CA that certified the broker, PEM.
        broker: where claims are made; its own process, beside the broker of the study.
        certificate, key: of the claim identity, PEM. Whoever has them can send requests, and nothing else.
    """

    format: Literal["covey-claim-1"]
    tenant: Name
    task: Name
    aggregator_key: HexKey
    kem: KemName
    enrolment_key: Annotated[str, Meta(max_length=2048)]
    ca: Pem
    broker: Address
    certificate: Pem
    key: Pem

    @property
    def recipient(self) -> RecipientKeyMsg:
        """Whom requests are sealed to. Raises ProtocolError."""
        try:
            raw = base64.b64decode(self.enrolment_key, validate=True)
            return msgspec.convert({"kem": self.kem, "public_key": raw}, RecipientKeyMsg)
        except (binascii.Error, msgspec.ValidationError) as error:
            raise ProtocolError(f"the claim: enrolment_key: expected an HPKE public key in base64; {error}") from error

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that stand for the study: what a device would otherwise have to be told over a trusted way."""
        named = [self.tenant, self.task, self.aggregator_key, self.kem, self.enrolment_key, self.ca]
        return hashlib.sha256(_CLAIM + msgspec.msgpack.encode(named)).digest()[:_FINGERPRINT_BYTES]


class Token(NamedTuple):
    """A token: 16 secret bytes, and the fingerprint of the claim that it is for."""

    secret: bytes
    fingerprint: bytes


class StudyPins(Msg, frozen=True):
    """What an enrolled device pins, beside the aggregator that its token vouched for.

    Args:
        publisher_key: Ed25519 key of the model's only publisher, 32 bytes; None where there are several.
        helpers: of secure rounds.
        broker: of the study.
        publishers: keys of several publishers, 32 bytes each, ascending; left out where there is one.
        publisher_threshold: how many of `publishers` must have signed a model; left out where there is one.
    """

    publisher_key: Digest | None
    helpers: Annotated[tuple[HelperPin, ...], Meta(max_length=8)]
    broker: Address
    # What is left out is not on the wire at all: a device that knows of one publisher only reads the answer of a study
    # with one, and refuses that of a study with several, rather than pin one of them alone.
    publishers: Annotated[tuple[Digest, ...], Meta(max_length=MOST_PUBLISHERS)] | UnsetType = UNSET
    publisher_threshold: Annotated[int, Meta(ge=1, le=MOST_PUBLISHERS)] | UnsetType = UNSET

    def __post_init__(self) -> None:
        _ = self.publisher_pins
        if self.publishers is not UNSET and list(self.publishers) != sorted(self.publishers):
            raise ValueError("publishers: expected them in ascending order")

    @property
    def publisher_pins(self) -> PublisherPins:
        """Whose signatures a model needs."""
        return publisher_pins(
            None if self.publisher_key is None else self.publisher_key.hex(),
            () if self.publishers is UNSET else tuple(key.hex() for key in self.publishers),
            None if self.publisher_threshold is UNSET else self.publisher_threshold,
        )


def study_pins(publishers: PublisherPins, *, helpers: tuple[HelperPin, ...], broker: Address) -> StudyPins:
    """What the devices of a study pin; runs at the desk.

    Args:
        publishers: that the study pins itself.
        helpers: of secure rounds.
        broker: of the study.

    Raises:
        LocalMisuseError: a publisher's key is none.
    """
    keys = tuple(public_key_from_hex(key).public_bytes_raw() for key in publishers.keys)
    if len(keys) == 1:
        return StudyPins(publisher_key=keys[0], helpers=helpers, broker=broker)
    return StudyPins(
        publisher_key=None,
        helpers=helpers,
        broker=broker,
        publishers=keys,
        publisher_threshold=publishers.threshold,
    )


class EnrolmentRequestMsg(Msg, frozen=True):
    """What a device asks, for the desk's eyes only.

    Args:
        tenant, task: the study.
        client: MQTT client id that it is sent under; the answer comes there.
        token: secret of a token; None for a renewal.
        enrolment: what is renewed; None for a claim.
        renewal_key: Ed25519 public key that signed this request, 32 bytes.
        answer_to: HPKE key that the answer is sealed to; made for this request.
        names: a pseudonym request (`fl_protocol.enrolment`), a file's bytes.
        proof: that a renewal comes from the device; left out with a token.
    """

    tenant: Name
    task: Name
    client: Name
    token: Annotated[bytes, Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)] | None
    enrolment: Name | None
    renewal_key: Digest
    answer_to: RecipientKeyMsg
    names: Annotated[bytes, Meta(min_length=1, max_length=MAX_NAMES_BYTES)]
    proof: RenewalProofMsg | UnsetType = UNSET

    def __post_init__(self) -> None:
        if (self.token is None) == (self.enrolment is None):
            raise ValueError("token and enrolment: expected one of them")
        if self.token is not None and self.proof is not UNSET:
            raise ValueError("proof: expected none with a token")


class EnrolmentAnswerMsg(Msg, frozen=True):
    """What came of a request, signed by the aggregator.

    Args:
        request_digest: SHA-256 of the request as it was signed.
        outcome: see `Outcome`.
        detail: one sentence, for people.
        retry_after_s: seconds, where the outcome is ``busy`` or ``too_early``.
        enrolment: what it is called from now on; empty if refused.
        names: a pseudonym answer (`fl_protocol.enrolment`), a file's bytes; empty if refused.
        pins: None if refused.
    """

    request_digest: Digest
    outcome: Outcome
    detail: Annotated[str, Meta(max_length=600)] = ""
    retry_after_s: Seconds = 0.0
    enrolment: Annotated[str, Meta(max_length=64)] = ""
    names: Annotated[bytes, Meta(max_length=MAX_NAMES_BYTES)] = b""
    pins: StudyPins | None = None

    def __post_init__(self) -> None:
        if self.is_granted != bool(self.enrolment and self.names and self.pins is not None):
            raise ValueError("expected an enrolment, names and pins with every grant, and with nothing else")

    @property
    def is_granted(self) -> bool:
        """Whether the device belongs to the study now."""
        return self.outcome in {"enrolled", "renewed"}


def token_text(secret: bytes, claim: Claim) -> str:
    """A token as it is handed on: ``covey1-`` and 52 characters of base32 (RFC 4648, section 6), in lower case.

    Args:
        secret: `SECRET_BYTES` from a CSPRNG.
        claim: of the study.
    """
    if len(secret) != SECRET_BYTES:
        raise LocalMisuseError(f"secret: expected {SECRET_BYTES} bytes, got {len(secret)}")
    return _PREFIX + base64.b32encode(secret + claim.fingerprint).decode().rstrip("=").lower()


def parse_token(text: str) -> Token:
    """The inverse of `token_text`; blanks around it and capitals do not matter.

    Raises:
        LocalMisuseError: it is no token; nothing of it is repeated, since it may be most of one.
    """
    stripped = text.strip().lower()
    body = stripped.removeprefix(_PREFIX)
    wrong = LocalMisuseError(
        f"--token: expected {_PREFIX} and {_TEXT_LENGTH} letters and digits, got {len(stripped)} characters; "
        "copy all of it"
    )
    if not stripped.startswith(_PREFIX) or len(body) != _TEXT_LENGTH or not body.isascii():
        raise wrong
    try:
        raw = base64.b32decode(body.upper() + "=" * (-len(body) % 8))
    except binascii.Error:
        raise wrong from None
    return Token(raw[:SECRET_BYTES], raw[SECRET_BYTES:])


def token_digest(secret: bytes) -> bytes:
    """What a register keeps of a token's secret, 32 bytes. Of 128 random bits a fast hash tells nothing."""
    return hashlib.sha256(_TOKEN + secret).digest()


def check_claim(claim: Claim, token: Token) -> None:
    """Whether a claim is the one that a token is for; runs at a device, before it sends anything.

    Raises:
        ProtocolError: it is another study's, or was changed.
    """
    # Security: the claim says whom the token's secret is sealed to, and whose answer is believed.
    if claim.fingerprint != token.fingerprint:
        raise ProtocolError(
            f"the claim of {claim.tenant}/{claim.task} is not the one that this token is for: take the claim.json that "
            "came with the token, or ask the study's operator for both again"
        )


def decode_claim(data: bytes) -> Claim:
    """An untrusted claim file. Raises ProtocolError."""
    if len(data) > MAX_FILE_BYTES:
        raise ProtocolError(f"not a claim: expected at most {MAX_FILE_BYTES} bytes, got {len(data)}")
    try:
        claim = msgspec.json.decode(data, type=Claim, strict=True)
        public_key_from_hex(claim.aggregator_key)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, LocalMisuseError) as error:
        raise ProtocolError(f"not a claim: {error}") from error
    return claim


def signed_request(request: EnrolmentRequestMsg, key: Ed25519PrivateKey) -> bytes:
    """A request as it is kept and sealed, signed by its renewal key; its digest is what the answer names."""
    if key.public_key().public_bytes_raw() != request.renewal_key:
        raise LocalMisuseError("key: expected the request's own renewal key")
    payload = encode(request)
    return encode(SignedMsg(payload=payload, signature=key.sign(_REQUEST + payload)))


def sealed_request(signed: bytes, recipient: RecipientKeyMsg, *, tenant: str, task: str, client: str) -> bytes:
    """Seal a signed request to the desk. Raises ProtocolError: its key is not usable."""
    return seal_to(recipient, signed, info=_request_info(tenant, task, client))


def opened_request(
    sealed: bytes, key: RoundKey, *, tenant: str, task: str, client: str
) -> tuple[EnrolmentRequestMsg, bytes]:
    """A request and its digest; runs at the desk.

    Args:
        sealed: untrusted.
        key: the desk's.
        tenant: the study's.
        task: the study's.
        client: that the broker says it is from.

    Raises:
        ProtocolError: it is not sealed to this desk for this client, is malformed, or is not signed by its own key.
    """
    signed = open_sealed(sealed, key, info=_request_info(tenant, task, client))
    outer = decode(signed, SignedMsg)
    request = decode(outer.payload, EnrolmentRequestMsg)
    try:
        public_key_from_bytes(request.renewal_key).verify(outer.signature, _REQUEST + outer.payload)
    except (InvalidSignature, ValueError):
        raise ProtocolError("the enrolment request is not signed by its own renewal key") from None
    if (request.tenant, request.task, request.client) != (tenant, task, client):
        raise ProtocolError("the enrolment request is for another study or from another client")
    return request, hashlib.sha256(signed).digest()


def sealed_answer(answer: EnrolmentAnswerMsg, *, to: RecipientKeyMsg, client: str, key: Ed25519PrivateKey) -> bytes:
    """Sign an answer with the aggregator's key and seal it to who asked. Raises ProtocolError: not a usable key."""
    payload = encode(answer)
    signed = encode(SignedMsg(payload=payload, signature=key.sign(_ANSWER + payload)))
    return seal_to(to, signed, info=_answer_info(client, answer.request_digest))


def opened_answer(
    sealed: bytes, key: RoundKey, *, client: str, request_digest: bytes, aggregator: Ed25519PublicKey
) -> EnrolmentAnswerMsg:
    """The answer to a request; runs at a device.

    Args:
        sealed: untrusted.
        key: made for the request.
        client: that the request was sent under.
        request_digest: of the request.
        aggregator: whose signature it has to have.

    Raises:
        ProtocolError: it is not the pinned aggregator's answer to this request.
    """
    outer = decode(open_sealed(sealed, key, info=_answer_info(client, request_digest)), SignedMsg)
    try:
        aggregator.verify(outer.signature, _ANSWER + outer.payload)
    except InvalidSignature:
        raise ProtocolError("the enrolment answer is not signed by the study's aggregator") from None
    answer = decode(outer.payload, EnrolmentAnswerMsg)
    # Security: an answer to an older request would bring back certificates for keys that are gone.
    if answer.request_digest != request_digest:
        raise ProtocolError("the enrolment answer is to another request")
    return answer


def _request_info(tenant: str, task: str, client: str) -> bytes:
    """HPKE ``info`` of a request."""
    return _REQUEST + msgspec.msgpack.encode([tenant, task, client])


def _answer_info(client: str, request_digest: bytes) -> bytes:
    """HPKE ``info`` of an answer."""
    return _ANSWER + msgspec.msgpack.encode([client, request_digest])
