"""The desk: from a request to its answer, and what the database has of it, in one transaction.

A request with a token makes an enrolment; one that is signed by an enrolment's renewal key, and by the TLS key of a
name that it was granted last, gives it further names. The same request again gets the same answer, so an answer that
was lost on the way costs nothing; so does a request for the same names that was sent again under another client id,
since a device whose name on the wire has changed meanwhile cannot send the old one. A request that is refused uses no
token up.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

from cryptography import x509
from msgspec import UNSET
from msgspec.structs import replace
from sqlalchemy import Connection

from aggregator.admission import Admitter, Certified, register
from aggregator.audit.log import AuditEvent, append
from aggregator.enrolment.register import (
    CertifiedName,
    EnrolmentRecord,
    TokenRecord,
    add_enrolment,
    add_names,
    count_enrolments,
    find_enrolment,
    find_token,
    quota_of,
    renew_enrolment,
    use_token,
)
from aggregator.errors import AggregatorError, DatabaseError
from fl_protocol.enrolment import DAY_S, PseudonymAnswer, PseudonymRequest, decode_file
from fl_protocol.errors import ProtocolError
from fl_protocol.joining import EnrolmentAnswerMsg, EnrolmentRequestMsg, Outcome, StudyPins, token_digest
from fl_protocol.messages import decode, encode
from fl_protocol.renewal_proof import check_proof

RENEWED_PERIODS = 2
"""A row of names is renewed when it has fewer whole periods left."""
_ENROLMENT = b"covey v1 enrolment\0"


class _NotGrantedError(Exception):
    """A request is not granted; what its answer says."""

    def __init__(self, outcome: Outcome, detail: str, retry_after_s: float = 0.0) -> None:
        super().__init__(outcome, detail)
        self.outcome, self.detail, self.retry_after_s = outcome, detail, retry_after_s


class _Place(NamedTuple):
    """Where a request belongs: its owner, from when on names are due (Unix seconds), and what it renews."""

    owner: str
    first_s: float
    known: EnrolmentRecord | None


def enrolment_id(renewal_key: bytes) -> str:
    """What an enrolment is called: ``e`` and 128 bits of a SHA-256 over its renewal key."""
    return "e" + hashlib.sha256(_ENROLMENT + renewal_key).hexdigest()[:32]


@dataclass(frozen=True)
class Desk:
    """See the module docstring.

    Args:
        admitter: checks pseudonyms and certifies them.
        pins: what devices of each task pin.
    """

    admitter: Admitter
    pins: dict[str, StudyPins]

    def answer(self, request: EnrolmentRequestMsg, digest: bytes, *, now_s: float) -> EnrolmentAnswerMsg:
        """Grant a request or refuse it.

        Args:
            request: whose signature by its renewal key was verified.
            digest: of the request, 32 bytes.
            now_s: Unix seconds.

        Raises:
            DatabaseError: the database fails; nothing has happened, and it should be asked again.
        """
        try:
            return self._granted(request, digest, now_s)
        except _NotGrantedError as refusal:
            outcome, detail, retry_after_s = refusal.outcome, refusal.detail, refusal.retry_after_s
        except DatabaseError:
            raise
        except (ProtocolError, AggregatorError) as error:
            outcome, detail, retry_after_s = "refused", str(error), 0.0
        return EnrolmentAnswerMsg(
            request_digest=digest, outcome=outcome, detail=detail[:600], retry_after_s=retry_after_s
        )

    def _granted(self, request: EnrolmentRequestMsg, digest: bytes, now_s: float) -> EnrolmentAnswerMsg:
        """What a request is granted. Raises _NotGrantedError, and as `Admitter.admit`."""
        database = self.admitter.store.database
        with database.reading() as connection:
            place = self._place(connection, request, digest, now_s=now_s, lock=False)
        if isinstance(place, EnrolmentAnswerMsg):
            return place
        # A dozen certificates take ten milliseconds, for which nobody else should have to wait.
        certified = self.admitter.certify(request.names, first_s=place.first_s)
        answer = EnrolmentAnswerMsg(
            request_digest=digest,
            outcome="enrolled" if place.known is None else "renewed",
            enrolment=enrolment_id(request.renewal_key),
            names=certified.answer,
            pins=self.pins[request.task],
        )
        with database.transaction() as connection:
            # Security: another may have come first meanwhile, with the same token or for the last place.
            again = self._place(connection, request, digest, now_s=now_s, lock=True)
            if isinstance(again, EnrolmentAnswerMsg):
                return again
            self._register(connection, request, again, certified, answer=answer, now_s=now_s)
        return answer

    def _place(
        self, connection: Connection, request: EnrolmentRequestMsg, digest: bytes, *, now_s: float, lock: bool
    ) -> _Place | EnrolmentAnswerMsg:
        """Where a request belongs, or the answer that it was given before. Raises _NotGrantedError, ProtocolError."""
        # The token first: whoever waits for it finds what was enrolled with it meanwhile.
        token = None if request.token is None else find_token(connection, token_digest(request.token), lock=lock)
        known = find_enrolment(connection, enrolment_id(request.renewal_key), lock=lock)
        if known is not None and known.state != "active":
            raise _NotGrantedError("revoked", f"this device is {known.state}: {known.reason or 'no reason was given'}")
        if known is not None:
            given = decode(known.answer, EnrolmentAnswerMsg)
            if known.request_digest == digest or (known.task == request.task and _is_for(given, request)):
                return replace(given, request_digest=digest)
        if request.token is not None:
            owner = _checked_token(token, request.task, now_s).owner
            _check_quota(connection, owner, now_s=now_s, lock=lock)
            return _Place(owner, now_s, None)
        if known is None or known.enrolment != request.enrolment or known.task != request.task:
            raise _NotGrantedError("not_enrolled", "no enrolment here has this renewal key; enrol with a token")
        _check_proof(request, known.enrolment, given)
        due_s = known.lasts_until_s - RENEWED_PERIODS * self.admitter.period_days * DAY_S
        if now_s < due_s:
            raise _NotGrantedError("too_early", "this device has names for long enough yet", due_s - now_s)
        return _Place(known.owner, max(now_s, known.lasts_until_s), known)

    def _register(
        self,
        connection: Connection,
        request: EnrolmentRequestMsg,
        place: _Place,
        certified: Certified,
        *,
        answer: EnrolmentAnswerMsg,
        now_s: float,
    ) -> None:
        """Take up certified names, and note what they were granted for."""
        register(connection, certified, now_s=now_s)
        add_names(connection, answer.enrolment, _names(certified))
        record = EnrolmentRecord(
            enrolment=answer.enrolment,
            task=request.task,
            owner=place.owner,
            renewal_key=request.renewal_key,
            state="active",
            reason="",
            enrolled_s=now_s,
            changed_s=now_s,
            lasts_until_s=certified.admission.period.ends_s,
            request_digest=answer.request_digest,
            answer=encode(answer),
        )
        if place.known is not None:
            renew_enrolment(connection, record)
        else:
            add_enrolment(connection, record)
        if request.token is not None:
            use_token(connection, token_digest(request.token), enrolment=answer.enrolment, now_s=now_s)
        detail: dict[str, str | int] = {"owner": place.owner, "task": request.task, "names": len(certified.candidates)}
        append(connection, AuditEvent(now_s, "desk", f"device.{answer.outcome}", answer.enrolment, {**detail}))


def _check_quota(connection: Connection, owner: str, *, now_s: float, lock: bool) -> None:
    """Whether an owner may have one device more. Raises _NotGrantedError."""
    quota = quota_of(connection, owner, lock=lock) or 0
    if count_enrolments(connection, owner, now_s=now_s) >= quota:
        raise _NotGrantedError(
            "quota_exhausted", f"{owner} has its {quota} device(s) already; the operator can raise the quota"
        )


def _check_proof(request: EnrolmentRequestMsg, enrolment: str, given: EnrolmentAnswerMsg) -> None:
    """Whether a renewal comes from who can use a TLS key of the names `given`. Raises ProtocolError."""
    # Security: the renewal key alone may be copied; TLS keys in a TPM are not.
    check_proof(
        None if request.proof is UNSET else request.proof,
        decode_file(given.names, PseudonymAnswer),
        tenant=request.tenant,
        task=request.task,
        enrolment=enrolment,
        names=request.names,
    )


def _is_for(answer: EnrolmentAnswerMsg, request: EnrolmentRequestMsg) -> bool:
    """Whether an answer has certificates for exactly the names of a request. Raises ProtocolError: not a request."""
    asked = {one.id for one in decode_file(request.names, PseudonymRequest).pseudonyms}
    return asked == {one.id for one in decode_file(answer.names, PseudonymAnswer).certificates}


def _names(certified: Certified) -> list[CertifiedName]:
    """Certified names as they are kept."""
    return [
        CertifiedName(one.id, serial_of(certificate), period.not_before_s, period.not_after_s)
        for one, certificate, period in zip(
            certified.candidates, certified.certificates, certified.periods, strict=True
        )
    ]


def serial_of(certificate: bytes) -> str:
    """A certificate's (PEM) serial number, hexadecimal without leading zeros."""
    return f"{x509.load_pem_x509_certificate(certificate).serial_number:x}"


def _checked_token(token: TokenRecord | None, task: str, now_s: float) -> TokenRecord:
    """A token that is good for this task now. Raises _NotGrantedError."""
    # One that is for another study is none here: what else it is good for is nobody's business.
    if token is None or token.task != task:
        raise _NotGrantedError("unknown_token", "no such token was given out for this study; copy all of it")
    if token.withdrawn_s is not None:
        raise _NotGrantedError("withdrawn_token", "this token was withdrawn; ask the study's operator for another one")
    if token.used_s is not None:
        raise _NotGrantedError(
            "used_token",
            "this token was used by another device; ask the study's operator for another one, and tell them if it was "
            "yours alone",
        )
    if now_s >= token.expires_s:
        raise _NotGrantedError("expired_token", "this token has expired; ask the study's operator for another one")
    return token
