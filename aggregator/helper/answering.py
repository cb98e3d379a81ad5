"""From the bytes of a request to the sum of masks, or to why there is none. Pure; docs/protocol.md, section 16.

The order of checks is part of what a helper promises:

1. the request is signed by the study's pinned aggregator, and asks this helper (`read_question`; else nothing is said)
2. its manifest is signed by the same key, for an open secure round of this study
3. the manifest names this helper, with a key that this helper has signed
4. the round was not answered before: the same list gets the same bytes, any other none (`given_before`)
5. no device of the list was thrown out, as far as this helper was told (`revocations`)
6. every device of the list is known: listed here, or certified by a CA that is pinned here (`known_devices`)
7. the list itself, entry by entry (`fl_protocol.secagg.parties.sum_of_masks`)

Where the round asks for noise it is in the sum, which is then signed (`signed_sum`). What comes out must be durable
before it is sent: a second sum of another list would tell the difference of two lists, and the same list with other
noise would let the noise be averaged away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray

from fl_protocol.errors import ProtocolError
from fl_protocol.integer_noise import Entropy, discrete_gaussian
from fl_protocol.messages import RecipientKeyMsg, RoundManifestMsg, SignedMsg, decode
from fl_protocol.sealing import RoundKey
from fl_protocol.secagg.errors import UnmaskRefusal, UnmaskRefusedError
from fl_protocol.secagg.messages import (
    ContributionMsg,
    HelperKeyMsg,
    SecureTermsMsg,
    UnmaskEntryMsg,
    UnmaskRefusalMsg,
    UnmaskRequestMsg,
)
from fl_protocol.secagg.parties import SecureRound, included_digest, sum_of_masks
from fl_protocol.secagg.terms import manifest_digest, secure_round
from fl_protocol.signing import sign, verify

_LONGEST_DETAIL = 400


class IgnoredError(ProtocolError):
    """A request that is not answered at all: nobody who may ask has asked this helper."""


@dataclass(frozen=True)
class Study:
    """A study as its helper pins it.

    Args:
        tenant: its name on the wire.
        aggregator: who may ask, and signs manifests.
        cas: whose certificates make a pseudonym known; none by default.
        allow_listed: whether devices of this helper's own register are known.
    """

    tenant: str
    aggregator: Ed25519PublicKey
    cas: tuple[x509.Certificate, ...] = ()
    allow_listed: bool = True


@dataclass(frozen=True)
class Question:
    """What the aggregator asks of this helper: checks 1 to 3 are done, entries are not looked at.

    Args:
        terms: of the round.
        opened_s: when its manifest says that it opened, Unix seconds.
        noise_sigma: of the noise that the round asks of each helper, in grid steps; 0 for none.
        recipient: this helper's own key in the manifest.
        entries: of the list.
        devices: that the entries name, whoever has signed them.
        included_digest: of the list.
    """

    terms: SecureRound
    opened_s: float
    noise_sigma: float
    recipient: RecipientKeyMsg
    entries: tuple[UnmaskEntryMsg, ...]
    devices: tuple[str, ...]
    included_digest: bytes


@dataclass(frozen=True)
class PastAnswer:
    """That a round was answered.

    Args:
        manifest_digest: of the round.
        included_digest: of the list.
        answer: the signed bytes; None once they were dropped.
    """

    manifest_digest: bytes
    included_digest: bytes
    answer: bytes | None


def tenant_named_in(data: bytes) -> str:
    """The study that a request says it is for; nothing is verified. Raises IgnoredError: it cannot be read."""
    manifest = _manifest_named_in(data)
    if manifest is None:
        raise IgnoredError("the request cannot be read")
    return manifest.tenant


def read_question(data: bytes, study: Study, *, helper: str, identity: Ed25519PublicKey) -> Question:
    """Checks 1 to 3.

    Args:
        data: the signed `UnmaskRequestMsg`, untrusted.
        study: the one that it came for.
        helper: this helper's name.
        identity: this helper's own.

    Raises:
        IgnoredError: the pinned aggregator has not signed it, or asks another helper.
        UnmaskRefusedError: BAD_MANIFEST, UNKNOWN_KEY; UNSIGNED where an entry cannot be read.
    """
    try:
        request = verify(data, UnmaskRequestMsg, study.aggregator)
    except ProtocolError as error:
        raise IgnoredError(f"the request for {study.tenant}: {error}") from error
    # Security: the broker could bring what another helper was asked, and a refusal would be taken for an answer to it.
    if request.helper != helper:
        raise IgnoredError(f"the request for {study.tenant} asks {request.helper}")
    terms, secure, opened_s = _verified_round(request, study)
    recipient = _own_key(terms, secure, helper=helper, identity=identity)
    contributions = [_contribution(entry) for entry in request.entries]
    return Question(
        terms=terms,
        opened_s=opened_s,
        noise_sigma=secure.helper_noise_sigma,
        recipient=recipient,
        entries=request.entries,
        devices=tuple(one.device for one in contributions),
        included_digest=included_digest(one.update_id for one in contributions),
    )


def given_before(question: Question, past: PastAnswer | None) -> bytes | None:
    """Check 4: the very bytes that this list of this round was answered with; None if the round was not answered.

    Args:
        question: checked so far.
        past: the round's answer, if it has one.

    Raises:
        UnmaskRefusedError: SECOND_LIST.
    """
    if past is None:
        return None
    asked = (question.terms.manifest_digest, question.included_digest)
    if asked != (past.manifest_digest, past.included_digest):
        raise UnmaskRefusedError(UnmaskRefusal.SECOND_LIST, "the round was answered, for another manifest or list")
    # Never anew: with noise it would be another answer.
    if past.answer is None:
        raise UnmaskRefusedError(
            UnmaskRefusal.SECOND_LIST, "the round was answered so long ago that the answer is not kept any more"
        )
    return past.answer


def signed_sum(
    question: Question,
    key: RoundKey | None,
    *,
    helper: str,
    identity: Ed25519PrivateKey,
    device_keys: Mapping[str, Ed25519PublicKey],
    minimum_cohort: int,
    entropy: Entropy,
) -> bytes:
    """Check 7 and the answer, a signed `MaskSumMsg`. To be made durable before anybody sees it.

    Args:
        question: not answered before.
        key: private half of the question's recipient; None if this helper does not have it (any more).
        helper: this helper's name.
        identity: signs.
        device_keys: of the devices that it knows, from check 6.
        minimum_cohort: its own floor.
        entropy: cryptographic source, for noise.

    Raises:
        UnmaskRefusedError: with the reason; nothing was revealed.
    """
    if key is None:
        raise UnmaskRefusedError(UnmaskRefusal.UNKNOWN_KEY, "the private key was erased, or its store was lost")
    found = sum_of_masks(
        question.terms,
        question.entries,
        helper=helper,
        key=key,
        device_keys=device_keys,
        minimum_cohort=minimum_cohort,
        noise=_noise(question, entropy),
    )
    return sign(found, identity)


def refusal_of(data: bytes, error: UnmaskRefusedError, *, helper: str) -> UnmaskRefusalMsg | None:
    """What is told to who asked; None if the request names no round.

    Args:
        data: a request that the pinned aggregator has signed.
        error: why it is refused.
        helper: this helper's name.
    """
    manifest = _manifest_named_in(data)
    if manifest is None:
        return None
    return UnmaskRefusalMsg(
        helper=helper,
        tenant=manifest.tenant,
        task=manifest.task,
        round=manifest.round,
        manifest_digest=manifest_digest(manifest),
        reason=error.reason,
        detail=error.detail[:_LONGEST_DETAIL],
    )


def _manifest_named_in(data: bytes) -> RoundManifestMsg | None:
    """A request's manifest, no signature verified."""
    try:
        request = decode(decode(data, SignedMsg).payload, UnmaskRequestMsg)
        return decode(decode(request.manifest, SignedMsg).payload, RoundManifestMsg)
    except ProtocolError:
        return None


def _verified_round(request: UnmaskRequestMsg, study: Study) -> tuple[SecureRound, SecureTermsMsg, float]:
    """Check 2; the round, and when it opened."""
    try:
        manifest = verify(request.manifest, RoundManifestMsg, study.aggregator)
        if manifest.tenant != study.tenant:
            raise ProtocolError(f"expected study {study.tenant}, got {manifest.tenant}")
        if manifest.secure is None:
            raise ProtocolError("the manifest is of no open secure round")
        return secure_round(manifest), manifest.secure, manifest.opened_s
    except ProtocolError as error:
        raise UnmaskRefusedError(UnmaskRefusal.BAD_MANIFEST, str(error)) from error


def _own_key(terms: SecureRound, secure: SecureTermsMsg, *, helper: str, identity: Ed25519PublicKey) -> RecipientKeyMsg:
    """Check 3: the key that devices sealed to under this helper's name."""
    if helper not in terms.helpers:
        raise UnmaskRefusedError(UnmaskRefusal.UNKNOWN_KEY, f"the manifest names no {helper}")
    signed = secure.helpers[list(terms.helpers).index(helper)]
    try:
        return verify(signed, HelperKeyMsg, identity).recipient
    except ProtocolError as error:
        raise UnmaskRefusedError(UnmaskRefusal.UNKNOWN_KEY, f"the key under the name {helper}: {error}") from error


def _contribution(entry: UnmaskEntryMsg) -> ContributionMsg:
    """What an entry says of itself, its signature not verified."""
    try:
        return decode(entry.contribution.contribution, ContributionMsg)
    except ProtocolError as error:
        raise UnmaskRefusedError(UnmaskRefusal.UNSIGNED, str(error)) from error


def _noise(question: Question, entropy: Entropy) -> NDArray[np.int64] | None:
    """This helper's share of the round's noise, int64 [d] in grid steps."""
    if not question.noise_sigma:
        return None
    return discrete_gaussian(question.noise_sigma, question.terms.fixed_point.vector_length, entropy)
