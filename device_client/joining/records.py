"""What a device keeps of its enrolment in one study, and how a request begins. Pure.

All of it is one record, replaced as a whole. A request's keys are in it before anything is sent, its exact signed bytes
too, and a grant before anything is installed; so whatever moment a process is killed at, the next one goes on from what
is here.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import UNSET
from msgspec.structs import replace

from device_client.errors import StoreError
from fl_protocol.enrolment import PseudonymAnswer, decode_file
from fl_protocol.errors import LocalMisuseError
from fl_protocol.integer_noise import Entropy
from fl_protocol.joining import Claim, EnrolmentRequestMsg, Outcome, StudyPins, Token, signed_request, token_digest
from fl_protocol.renewal_proof import RenewalProofMsg
from fl_protocol.sealing import RoundKey, round_key_bytes

RENEWED_PERIODS = 2
"""A row of names is renewed when it has fewer whole periods left; the desk goes by the same number."""
ClientOutcome = Literal["wrong_aggregator", "wrong_study", "wrong_issuer", "not_installed"]
"""Why a device does not take what it was granted."""
_KEY_MAY_STAY = frozenset(
    {"unknown_token", "expired_token", "used_token", "withdrawn_token", "quota_exhausted", "busy", "too_early"}
)
"""Refusals that say nothing against a request's keys and names: with another token they are asked for again."""


class Refusal(msgspec.Struct, frozen=True):
    """Why a request was not granted, or a grant not taken; `detail` is the desk's sentence, `at_s` Unix seconds."""

    outcome: Outcome | ClientOutcome
    detail: str
    at_s: float


class OpenRequest(msgspec.Struct, frozen=True):
    """A request that nothing has come of yet.

    Args:
        renewal_key: raw Ed25519 private key; the enrolment's for a renewal, a new one for a claim.
        answer_key: secret of the `RoundKey` that the answer is sealed to.
        token: secret of the token; None for a renewal.
        enrolment: what is renewed; None for a claim.
        names: the pseudonym request; empty until it is prepared.
        proof: that a renewal of these names comes from this device; None for a claim, and where no name is left to
            sign it.
        client: MQTT client id that `signed` is for; empty until it is known.
        signed: the exact bytes that are sealed and sent.
        granted: pseudonym answer that is to be installed; empty until then.
        enrolled: what the grant calls the enrolment.
        pins: that came with it.
        replaces: whether it takes the place of an enrolment that is over, with all its names.
    """

    renewal_key: bytes
    answer_key: bytes
    token: bytes | None
    enrolment: str | None
    names: bytes = b""
    client: str = ""
    signed: bytes = b""
    granted: bytes = b""
    enrolled: str = ""
    pins: StudyPins | None = None
    replaces: bool = False
    proof: RenewalProofMsg | None = None


class Membership(msgspec.Struct, frozen=True):
    """An enrolment: what it is called, its raw private renewal key, what is pinned, and the token's digest.

    `names` are the ids that were granted last; empty in what was stored before they were kept.
    """

    enrolment: str
    renewal_key: bytes
    pins: StudyPins
    token: bytes
    names: tuple[str, ...] = ()


class JoiningState(msgspec.Struct, frozen=True):
    """All that is kept for a study.

    Args:
        claim: whom the device asks.
        membership: None until it is enrolled.
        request: None where nothing is open.
        refusal: of the last request; None where it was not refused.
        told_s: when the desk last said to come again later, Unix seconds.
        wait_s: after how many seconds from then.
    """

    claim: Claim
    membership: Membership | None = None
    request: OpenRequest | None = None
    refusal: Refusal | None = None
    told_s: float | None = None
    wait_s: float = 0.0

    @property
    def study(self) -> str:
        """``tenant/task``."""
        return f"{self.claim.tenant}/{self.claim.task}"

    @property
    def is_out(self) -> bool:
        """Whether the study's operator has thrown this device out, for now or for good."""
        return self.refusal is not None and self.refusal.outcome == "revoked"


def encode_state(state: JoiningState) -> bytes:
    """As it is stored."""
    return msgspec.msgpack.encode(state)


def decode_state(raw: bytes, *, study: str) -> JoiningState:
    """The inverse. Raises StoreError."""
    try:
        return msgspec.msgpack.decode(raw, type=JoiningState)
    except msgspec.DecodeError as error:
        raise StoreError(f"the enrolment in {study} cannot be read ({error}); enrol with a new token") from error


def with_claim(
    state: JoiningState | None, claim: Claim, token: Token, *, entropy: Entropy, anew: bool = False
) -> JoiningState:
    """A claim is opened, or one that was not answered goes on.

    Args:
        state: of before; None where there was nothing.
        claim: that was held against the token (`device_client.joining.checks`).
        token: of the study.
        entropy: source of the keys.
        anew: forget a request that was not answered, with its keys.
    """
    before, refusal = (None, None) if state is None else (state.request, state.refusal)
    is_same_study = state is not None and state.claim.fingerprint == claim.fingerprint
    may_stay = is_same_study and (refusal is None or refusal.outcome in _KEY_MAY_STAY) and not anew
    if before is not None and before.token is not None and may_stay:
        # The desk may have granted it already: with the same key and names that is found out, with others never.
        if before.token != token.secret and not before.granted:
            before = replace(before, token=token.secret, signed=b"", client="")
        request = before
    else:
        made = _new_request(claim, entropy(32), token=token.secret, enrolment=None, entropy=entropy)
        request = replace(made, replaces=refusal is not None and _is_over(before, refusal))
    membership = state.membership if state is not None else None
    return JoiningState(claim=claim, membership=membership, request=request)


def with_renewal(state: JoiningState, *, entropy: Entropy) -> JoiningState:
    """A renewal is opened, in place of a token that was refused.

    Raises:
        LocalMisuseError: the device is not enrolled, or another request is open.
    """
    member, before = state.membership, state.request
    is_free = before is None or (before.token is not None and state.refusal is not None)
    if member is None or not is_free:
        raise LocalMisuseError(f"{state.study}: expected an enrolment without an open request")
    request = _new_request(state.claim, member.renewal_key, token=None, enrolment=member.enrolment, entropy=entropy)
    return JoiningState(claim=state.claim, membership=member, request=request)


def addressed(state: JoiningState, client: str) -> JoiningState:
    """The open request signed for a client id, with the same keys and names.

    Raises:
        LocalMisuseError: none is open, or its names are not prepared.
    """
    request = state.request
    if request is None or not request.names:
        raise LocalMisuseError(f"{state.study}: expected an open request with names")
    key = Ed25519PrivateKey.from_private_bytes(request.renewal_key)
    message = EnrolmentRequestMsg(
        tenant=state.claim.tenant,
        task=state.claim.task,
        client=client,
        token=request.token,
        enrolment=request.enrolment,
        renewal_key=key.public_key().public_bytes_raw(),
        answer_to=answer_key(state.claim, request).recipient(),
        names=request.names,
        proof=UNSET if request.proof is None else request.proof,
    )
    return replace(state, request=replace(request, client=client, signed=signed_request(message, key)))


def answer_key(claim: Claim, request: OpenRequest) -> RoundKey:
    """What opens the answer to a request."""
    return RoundKey(claim.kem, request.answer_key)


def with_grant_installed(state: JoiningState) -> JoiningState:
    """The grant was installed: the request and its keys are forgotten, all but the renewal key.

    Raises:
        LocalMisuseError: nothing was granted.
        ProtocolError: what was granted, and checked before, cannot be read.
    """
    request = state.request
    if request is None or request.pins is None:
        raise LocalMisuseError(f"{state.study}: expected a request that was granted")
    kept = state.membership.token if state.membership is not None else b""
    token = token_digest(request.token) if request.token is not None else kept
    names = tuple(one.id for one in decode_file(request.granted, PseudonymAnswer).certificates)
    member = Membership(request.enrolled, request.renewal_key, request.pins, token, names)
    return JoiningState(claim=state.claim, membership=member)


def _is_over(request: OpenRequest | None, refusal: Refusal) -> bool:
    """Whether nothing that is sent under the present names counts any more."""
    if refusal.outcome in {"revoked", "not_enrolled"}:
        return True
    # Names that the desk will not renew may be ones that it does not know: a database that was restored lacks them.
    return refusal.outcome == "refused" and request is not None and request.enrolment is not None


def _new_request(
    claim: Claim, renewal_key: bytes, *, token: bytes | None, enrolment: str | None, entropy: Entropy
) -> OpenRequest:
    """A request with keys, and no names yet."""
    return OpenRequest(renewal_key, entropy(round_key_bytes(claim.kem)), token, enrolment)
