"""Admitting one update: from the bytes that came to values that may be added up, or one typed refusal. Pure.

Order of checks: form, sender, signature, update id, content digest; then whether it was accepted before; then task,
round and model; only then is it opened, and its content checked. Nothing is believed before the signature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec.structs import replace
from numpy.typing import NDArray

from aggregator.exact_sum import LARGEST_NORM, norm_of
from aggregator.robust_rules import bounded
from fl_protocol.errors import ProtocolError, RefusalReason, RefusedError
from fl_protocol.messages import EncodingName, UpdateBodyMsg, UpdateEnvelopeView, UpdateHeaderMsg, decode, encode
from fl_protocol.sealing import RoundKey, open_masked_update, open_update
from fl_protocol.secagg.masks import Words
from fl_protocol.secagg.parties import SecureRound, masked_vector
from fl_protocol.signing import header_signature_is_valid
from fl_protocol.update_encoding import open_values, rotation_seed


class Opener(NamedTuple):
    """What verifies headers and opens seals; there is one outside of simulations, the default.

    Args:
        is_signed: whether a signature over an encoded header is of a key.
        open_body: what is inside a seal. Raises ProtocolError.
    """

    is_signed: Callable[[bytes, bytes, Ed25519PublicKey], bool] = header_signature_is_valid
    open_body: Callable[[UpdateHeaderMsg, bytes | memoryview, RoundKey], UpdateBodyMsg] = open_update


OPENER = Opener()


class Whole(NamedTuple):
    """An update whose header was verified; still sealed.

    Args:
        bytes_up: as it came, header and all.
        device_key: that its header was verified with.
    """

    header: UpdateHeaderMsg
    sealed: bytes | memoryview
    bytes_up: int
    device_key: Ed25519PublicKey | None = None


@dataclass(frozen=True)
class RoundInForce:
    """A round whose updates may still count.

    Args:
        number: of the round.
        model_digest: SHA-256 of the parameters that updates must start from.
        key: that updates are sealed to.
        sums_secret: under which its sums are stored; None once it is closed.
        is_closing: whether it is being combined: it takes updates again if whoever combines it dies.
        secure: how its updates are masked; None where they are not.
    """

    number: int
    model_digest: bytes
    key: RoundKey
    sums_secret: bytes | None = None
    is_closing: bool = False
    secure: SecureRound | None = None

    @cached_property
    def rotation_seed(self) -> bytes:
        """Of rotated updates made for this round."""
        return rotation_seed(self.model_digest, self.number)


@dataclass(frozen=True)
class TaskInForce:
    """A task as ingest needs it.

    Args:
        name: of the task.
        update_length: numbers in an update.
        open_round: number of the round that updates are counted in now; None when none is open.
        rounds: by number, the open one and, when asynchronous, those shortly before it.
        takes_stale: whether updates of closed rounds count: then one that comes while no round is open may count soon.
        encodings: that the manifest allows.
        norm_bound: longer updates are scaled down to it; None for none.
        keeps_updates: whether single updates are kept until the round closes, or only their sum.
        is_masked: whether updates are masked: then what helpers are told of each is kept beside the sum.
        is_readable: whether this process understands the task's file; if not, it says nothing about updates, for
            another version may.
    """

    name: str
    update_length: int
    open_round: int | None = None
    rounds: dict[int, RoundInForce] = field(default_factory=dict)
    takes_stale: bool = False
    encodings: tuple[EncodingName, ...] = ("float32",)
    norm_bound: float | None = None
    keeps_updates: bool = False
    is_masked: bool = False
    is_readable: bool = True


class Placed(NamedTuple):
    """An update that counts: made for one round, counted in the same one or a later."""

    task: TaskInForce
    round: RoundInForce
    counted_in: int


def verify_header(
    whole: bytes | memoryview,
    *,
    tenant: str,
    device: str,
    device_key: Ed25519PublicKey,
    update_id: bytes,
    opener: Opener = OPENER,
) -> Whole:
    """The signed header and the sealed bytes it vouches for.

    Args:
        whole: reassembled envelope, untrusted.
        tenant: what this aggregator serves.
        device: the sender by the topic it was allowed to publish to.
        device_key: that device's registered key.
        update_id: the update by the topic, which an answer will name.
        opener: verifies the signature.

    Raises:
        RefusedError: MALFORMED, BAD_SIGNATURE, or WRONG_TASK.
    """
    try:
        envelope = decode(whole, UpdateEnvelopeView)
        header = decode(envelope.header, UpdateHeaderMsg)
    except ProtocolError as error:
        raise RefusedError(RefusalReason.MALFORMED, str(error)[:200]) from error
    if header.device != device or not opener.is_signed(envelope.header, envelope.signature, device_key):
        raise RefusedError(RefusalReason.BAD_SIGNATURE, f"the header is not signed by {device}'s registered key")
    # Security: before any refusal that is final, or an old envelope under a new topic would have the new update
    # dropped.
    if header.update_id != update_id:
        raise RefusedError(RefusalReason.MALFORMED, "the header names another update than the topic")
    if header.tenant != tenant:
        raise RefusedError(RefusalReason.WRONG_TASK, f"expected tenant {tenant}, got {header.tenant}")
    if hashlib.sha256(envelope.sealed).digest() != header.sealed_digest:
        raise RefusedError(RefusalReason.MALFORMED, "the sealed bytes do not match the signed digest")
    return Whole(header, envelope.sealed, len(whole), device_key)


class NotNowError(Exception):
    """An update cannot count just now, and may a little later: its device is told nothing, and asks again."""


def place(header: UpdateHeaderMsg, tasks: Mapping[str, TaskInForce]) -> Placed:
    """Where an update counts.

    Args:
        header: verified.
        tasks: that are served, by name.

    Raises:
        RefusedError: WRONG_TASK, ROUND_CLOSED, WRONG_ROUND or WRONG_MODEL.
        NotNowError: it may count a little later.
    """
    task = tasks.get(header.task)
    if task is None:
        raise RefusedError(RefusalReason.WRONG_TASK, f"there is no task {header.task} here")
    if not task.is_readable:
        raise NotNowError
    if task.open_round is not None and header.round > task.open_round:
        raise RefusedError(
            RefusalReason.WRONG_ROUND, f"round {task.open_round} is open, the update is for {header.round}"
        )
    found = task.rounds.get(header.round)
    # A refusal is final: not while the round may be opened again, or the next one may count the update.
    if found is not None and (found.is_closing or (task.open_round is None and task.takes_stale)):
        raise NotNowError
    if found is not None and task.is_masked and found.secure is None:
        raise NotNowError
    if found is None or task.open_round is None:
        raise RefusedError(RefusalReason.ROUND_CLOSED, f"round {header.round} is closed")
    if header.model_digest != found.model_digest:
        raise RefusedError(RefusalReason.WRONG_MODEL, "the update starts from another model than the round's")
    return Placed(task, found, task.open_round)


class Masked(NamedTuple):
    """A masked update: its vector in words, [d], and what the round's helpers have to be told of it, encoded."""

    vector: Words
    entry: bytes


def open_masked(whole: Whole, placed: Placed) -> Masked:
    """The masked update inside the seal, of which nobody can see whether it is what it should be.

    Raises:
        RefusedError: UNSEALABLE, or MALFORMED: it is not this device's for this round, or does not fit together.
    """
    secure, header = placed.round.secure, whole.header
    if secure is None or whole.device_key is None:
        raise RefusedError(RefusalReason.WRONG_ENCODING, "the round takes no masked updates")
    try:
        body = open_masked_update(header, whole.sealed, placed.round.key)
    except ProtocolError as error:
        raise RefusedError(RefusalReason.UNSEALABLE, str(error)[:200]) from error
    try:
        vector = masked_vector(
            secure, body, device=header.device, update_id=header.update_id, device_key=whole.device_key
        )
    except ProtocolError as error:
        raise RefusedError(RefusalReason.MALFORMED, str(error)[:200]) from error
    return Masked(vector, encode(replace(body, masked=b"")))


def open_sealed(whole: Whole, placed: Placed, *, opener: Opener = OPENER) -> NDArray[np.float32]:
    """The values inside the seal, float32 [d], finite and no longer than may be added up.

    Raises:
        RefusedError: UNSEALABLE, WRONG_LENGTH, WRONG_ENCODING, NOT_FINITE or TOO_LONG.
    """
    task = placed.task
    try:
        body = opener.open_body(whole.header, whole.sealed, placed.round.key)
    except ProtocolError as error:
        raise RefusedError(RefusalReason.UNSEALABLE, str(error)[:200]) from error
    if body.num_parameters != task.update_length:
        raise RefusedError(
            RefusalReason.WRONG_LENGTH, f"expected {task.update_length} values, got {body.num_parameters}"
        )
    if body.encoding not in task.encodings:
        raise RefusedError(
            RefusalReason.WRONG_ENCODING, f"expected one of {', '.join(task.encodings)}, got {body.encoding}"
        )
    try:
        values = open_values(body, seed=placed.round.rotation_seed, checks_float32=False)  # their norm is below
    except RefusedError:
        raise
    except ProtocolError as error:
        raise RefusedError(RefusalReason.WRONG_ENCODING, str(error)[:200]) from error
    norm = norm_of(values)
    if not np.isfinite(norm):
        raise RefusedError(RefusalReason.NOT_FINITE, "the update holds NaN or infinity")
    if norm > LARGEST_NORM:
        raise RefusedError(
            RefusalReason.TOO_LONG, f"its L2 norm is {norm:.3g}, at most {LARGEST_NORM:g} can be added up"
        )
    return values if task.norm_bound is None or norm <= task.norm_bound else bounded(values, task.norm_bound)
