"""Admitting one update: from the bytes that came to values that may be added up, or one typed refusal. Pure.

Order of checks: form, sender, signature, update id, task, content digest; then whether it was accepted before; then
round and model; only then is it opened, and its content checked. Nothing is believed before the signature.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from numpy.typing import NDArray

from fl_protocol.errors import ProtocolError, RefusalReason, RefusedError
from fl_protocol.messages import UpdateEnvelopeMsg, UpdateHeaderMsg, decode
from fl_protocol.sealing import RoundKey, open_update
from fl_protocol.signing import header_signature_is_valid


@dataclass(frozen=True)
class OpenRoundKeys:
    """The open round as ingest needs it.

    Args:
        number: round number.
        model_digest: SHA-256 of the global parameters that updates must start from.
        num_parameters: d.
        key: private key that updates are sealed to.
    """

    number: int
    model_digest: bytes
    num_parameters: int
    key: RoundKey


@dataclass(frozen=True)
class AcceptedUpdate:
    """An update that is committed: all that a receipt says.

    Args:
        round: the round it was committed to.
        sealed_digest: SHA-256 of its sealed bytes.
        accepted_s: when, Unix seconds.
    """

    update_id: bytes
    device: str
    round: int
    sealed_digest: bytes
    accepted_s: float


class AcceptedUpdates(Protocol):
    """What was accepted before."""

    def accepted(self, update_id: bytes) -> AcceptedUpdate | None:
        """The accepted update of this id, None if there is none."""

    def has_update_from(self, device: str, round_number: int) -> bool:
        """Whether this device already has an accepted update in the round."""


@dataclass(frozen=True)
class AdmittedUpdate:
    """An update that passed every check; ``values`` is float32 [d]."""

    header: UpdateHeaderMsg
    values: NDArray[np.float32]


@dataclass(frozen=True)
class AlreadyAccepted:
    """The very bytes of an accepted update, resent because its receipt was lost: it gets another receipt."""

    update: AcceptedUpdate


def verify_header(
    whole: bytes, *, tenant: str, task: str, device: str, device_key: Ed25519PublicKey, update_id: bytes
) -> tuple[UpdateHeaderMsg, bytes]:
    """The signed header and the sealed bytes it vouches for.

    Args:
        whole: reassembled envelope, untrusted.
        tenant: what this aggregator serves.
        task: what this aggregator serves.
        device: the sender by the topic it was allowed to publish to.
        device_key: that device's registered key.
        update_id: the update by the topic, which an answer will name.

    Raises:
        RefusedError: MALFORMED, BAD_SIGNATURE, or WRONG_TASK.
    """
    try:
        envelope = decode(whole, UpdateEnvelopeMsg)
        header = decode(envelope.header, UpdateHeaderMsg)
    except ProtocolError as error:
        raise RefusedError(RefusalReason.MALFORMED, str(error)[:200]) from error
    if header.device != device or not header_signature_is_valid(envelope.header, envelope.signature, device_key):
        raise RefusedError(RefusalReason.BAD_SIGNATURE, f"the header is not signed by {device}'s registered key")
    # Security: before any refusal that is final, or an old envelope under a new topic would have the new update
    # dropped.
    if header.update_id != update_id:
        raise RefusedError(RefusalReason.MALFORMED, "the header names another update than the topic")
    if (header.tenant, header.task) != (tenant, task):
        raise RefusedError(RefusalReason.WRONG_TASK, f"expected {tenant}/{task}, got {header.tenant}/{header.task}")
    if hashlib.sha256(envelope.sealed).digest() != header.sealed_digest:
        raise RefusedError(RefusalReason.MALFORMED, "the sealed bytes do not match the signed digest")
    return header, envelope.sealed


def admit(
    header: UpdateHeaderMsg, sealed: bytes, *, current: OpenRoundKeys | None, accepted: AcceptedUpdates
) -> AdmittedUpdate | AlreadyAccepted:
    """Decide about an update whose header was verified.

    Args:
        header: from `verify_header`.
        sealed: from `verify_header`.
        current: the open round; None when no round is open.
        accepted: what was accepted before.

    Raises:
        RefusedError: with the reason.
    """
    known = accepted.accepted(header.update_id)
    if known is not None:
        # Security: of this device too, or a copy of another's sealed bytes would get a receipt that is not true.
        if (known.device, known.sealed_digest) == (header.device, header.sealed_digest):
            return AlreadyAccepted(known)
        raise RefusedError(RefusalReason.REPLAYED, "this update id was accepted with other content")
    if current is None or header.round < current.number:
        raise RefusedError(RefusalReason.ROUND_CLOSED, f"round {header.round} is closed")
    if header.round != current.number:
        raise RefusedError(
            RefusalReason.WRONG_ROUND, f"round {current.number} is open, the update is for {header.round}"
        )
    if header.model_digest != current.model_digest:
        raise RefusedError(RefusalReason.WRONG_MODEL, "the update starts from another model than the round's")
    if accepted.has_update_from(header.device, header.round):
        raise RefusedError(
            RefusalReason.SECOND_UPDATE, f"{header.device} already has an update in round {header.round}"
        )
    return AdmittedUpdate(header, _open(header, sealed, current))


def _open(header: UpdateHeaderMsg, sealed: bytes, current: OpenRoundKeys) -> NDArray[np.float32]:
    """The values inside the seal, float32 [d], finite."""
    try:
        body = open_update(header, sealed, current.key)
    except ProtocolError as error:
        raise RefusedError(RefusalReason.UNSEALABLE, str(error)[:200]) from error
    if body.num_parameters != current.num_parameters:
        raise RefusedError(
            RefusalReason.WRONG_LENGTH, f"expected {current.num_parameters} values, got {body.num_parameters}"
        )
    values = np.frombuffer(body.values, "<f4").astype(np.float32)
    if not np.isfinite(values).all():
        raise RefusedError(RefusalReason.NOT_FINITE, "the update holds NaN or infinity")
    return values
