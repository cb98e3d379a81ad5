"""Every message on the wire, as frozen structs in MessagePack maps; versioned and decoded strictly.

`decode` raises `ProtocolError` and nothing else, whatever the bytes. Ranges stand in the types, relations between
fields in ``__post_init__``; a struct that was decoded is valid. A message has exactly one encoding: every field once,
in the order written here, integers in their shortest form, floats as float64. `decode` refuses any other, so that no
two readers can understand the same bytes differently (a field given twice, say). Signed messages travel as
`SignedMsg`, whose signature covers a context string and the exact payload bytes (see `fl_protocol.signing`).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from fl_protocol.errors import LocalMisuseError, ProtocolError, RefusalReason
from fl_protocol.limits import (
    MAX_CHUNKS,
    MAX_PACKET_BYTES,
    MAX_PARAMETERS,
    MAX_TRANSFER_BYTES,
    MIN_CHUNK_DATA_BYTES,
)
from fl_protocol.topics import NAME_PATTERN

Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
UpdateId = Annotated[bytes, Meta(min_length=16, max_length=16)]
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
RoundNumber = Annotated[int, Meta(ge=1, le=2**31 - 1)]
ParameterCount = Annotated[int, Meta(ge=1, le=MAX_PARAMETERS)]
Positive = Annotated[float, Meta(gt=0)]
Seconds = Annotated[float, Meta(ge=0, le=1e11)]
Version = Literal[1]
KemName = Literal["mlkem768-x25519", "x25519"]
M = TypeVar("M", bound="_Msg")


class _Msg(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every message has: the protocol version."""

    v: Version = 1


class SignedMsg(_Msg, frozen=True):
    """A payload and the Ed25519 signature over its context and exact bytes."""

    payload: bytes
    signature: Signature


class TrainingPlanMsg(_Msg, frozen=True):
    """What a device computes in a round.

    Args:
        sampling_rate: q of Poisson sampling, (0, 1]; 1 takes every record in every step.
        local_steps: noisy gradient steps per round.
        learning_rate: step size on the device.
        l2_norm_clip: bound C on each record's gradient norm.
        noise_multiplier: noise standard deviation over C, per step; 0 only where no privacy is claimed.
        expected_batch_size: public constant the clipped sum is divided by. Never the device's own number of records:
            under add-or-remove-one neighbours that number is itself private.
        momentum: of the local steps (heavy ball, B. T. Polyak 1964), [0, 1); 0 is plain SGD.
        proximal_mu: FedProx's mu (T. Li et al., arXiv 1812.06127), at least 0: mu (y - x) is added to each local
            gradient, where x are the round's parameters and y the device's.
        control_variates: SCAFFOLD with option II (S. P. Karimireddy et al., arXiv 1910.06378): c - c_i is added to each
            local gradient. Only with plain steps: the update of c_i is derived for them.
    """

    sampling_rate: Annotated[float, Meta(gt=0, le=1)]
    local_steps: Annotated[int, Meta(ge=1, le=100_000)]
    learning_rate: Positive
    l2_norm_clip: Positive
    noise_multiplier: Annotated[float, Meta(ge=0)]
    expected_batch_size: Positive
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    proximal_mu: Annotated[float, Meta(ge=0)] = 0.0
    control_variates: bool = False

    def __post_init__(self) -> None:
        _require_finite(
            learning_rate=self.learning_rate,
            l2_norm_clip=self.l2_norm_clip,
            noise_multiplier=self.noise_multiplier,
            expected_batch_size=self.expected_batch_size,
            proximal_mu=self.proximal_mu,
        )
        if self.control_variates and (self.momentum > 0 or self.proximal_mu > 0):
            raise ValueError(
                f"control_variates need plain steps, got momentum {self.momentum} and proximal_mu {self.proximal_mu}"
            )


class RecipientKeyMsg(_Msg, frozen=True):
    """The HPKE public key of one round: raw bytes in the KEM's own encoding (RFC 9180, section 4)."""

    kem: KemName
    public_key: Annotated[bytes, Meta(min_length=32, max_length=1216)]


class RoundManifestMsg(_Msg, frozen=True):
    """All a device needs to know of a round; retained, signed by the aggregator.

    Args:
        status: ``open`` invites updates; ``finished`` only announces the task's last model.
        model_digest: SHA-256 of the global parameters (little-endian float32 [num_parameters]).
        graph_digest: SHA-256 of the trainable graph that the parameters belong to.
        recipient: key that updates are sealed to; none when finished.
        opened_s: Unix seconds.
        deadline_s: Unix seconds.
        goal: updates at which the round closes early.
        minimum_cohort: fewest updates that are ever combined.
        participation_probability: with which each device tosses its own coin.
        minimum_separation_s: seconds a device stays out after taking part.
        control_digest: SHA-256 of the server's control variate c (little-endian float32 [num_parameters]), fetched like
            a model; given exactly in open rounds whose plan has `control_variates`.
    """

    tenant: Name
    task: Name
    round: RoundNumber
    status: Literal["open", "finished"]
    engine: Literal["open"]
    model_digest: Digest
    graph_digest: Digest
    num_parameters: ParameterCount
    recipient: RecipientKeyMsg | None
    plan: TrainingPlanMsg
    opened_s: Seconds
    deadline_s: Seconds
    goal: Count
    minimum_cohort: Count
    participation_probability: Annotated[float, Meta(ge=0, le=1)]
    minimum_separation_s: Seconds
    control_digest: Digest | None = None

    def __post_init__(self) -> None:
        if (self.recipient is None) != (self.status == "finished"):
            raise ValueError("an open round needs a recipient key, a finished task has none")
        if self.goal < self.minimum_cohort:
            raise ValueError(f"goal {self.goal} is below minimum_cohort {self.minimum_cohort}")
        if self.deadline_s < self.opened_s:
            raise ValueError(f"deadline_s {self.deadline_s} is before opened_s {self.opened_s}")
        if (self.control_digest is not None) != (self.plan.control_variates and self.status == "open"):
            raise ValueError("a control_digest belongs to open rounds with control_variates, and only to those")


class ChunkMsg(_Msg, frozen=True):
    """One piece of a transfer; idempotent on (transfer_id, index).

    All chunks of one cut hold `cut_bytes` of data, except the last, which holds the rest; so one chunk alone says how
    the whole was cut, and what a transfer can hold is known from its first chunk. Chunks of models and control variates
    travel as `SignedMsg`; those of updates as they are.

    Args:
        transfer_id: the update id, or the first 16 bytes of a model's (or control variate's) digest.
        count: number of chunks; ``index`` runs from 0 to count - 1.
        total_bytes: length of the whole.
        digest: SHA-256 of the whole.
    """

    transfer_id: UpdateId
    index: Annotated[int, Meta(ge=0, lt=MAX_CHUNKS)]
    count: Annotated[int, Meta(ge=1, le=MAX_CHUNKS)]
    total_bytes: Annotated[int, Meta(ge=1, le=MAX_TRANSFER_BYTES)]
    digest: Digest
    data: Annotated[bytes, Meta(min_length=1, max_length=MAX_PACKET_BYTES)]

    def __post_init__(self) -> None:
        if self.index >= self.count:
            raise ValueError(f"chunk index {self.index} is not below count {self.count}")
        is_last, before = self.index == self.count - 1, self.count - 1
        cut, left = self.cut_bytes, self.total_bytes - before * self.cut_bytes
        if not 1 <= left <= cut or len(self.data) != (left if is_last else cut):
            raise ValueError(f"{len(self.data)} bytes cannot be chunk {self.index} of {self.count}")
        if before and cut < MIN_CHUNK_DATA_BYTES:
            raise ValueError(f"{self.count} chunks for {self.total_bytes} bytes: needlessly small")

    @property
    def cut_bytes(self) -> int:
        """Bytes of data in every chunk of this cut but the last."""
        if self.index < self.count - 1 or self.count == 1:
            return len(self.data)
        return (self.total_bytes - len(self.data)) // (self.count - 1)


class UpdateHeaderMsg(_Msg, frozen=True):
    """What a device says in the clear about its sealed update, and signs."""

    tenant: Name
    task: Name
    round: RoundNumber
    model_digest: Digest
    device: Name
    update_id: UpdateId
    kem: KemName
    sealed_digest: Digest


class UpdateEnvelopeMsg(_Msg, frozen=True):
    """A sealed update as it travels: encoded header, the device's signature over it, HPKE ``enc || ciphertext``."""

    header: Annotated[bytes, Meta(max_length=4096)]
    signature: Signature
    sealed: bytes


class UpdateBodyMsg(_Msg, frozen=True):
    """What is inside the seal: the change of the parameters, little-endian float32 [num_parameters]."""

    num_parameters: ParameterCount
    values: bytes

    def __post_init__(self) -> None:
        if len(self.values) != 4 * self.num_parameters:
            raise ValueError(f"expected {4 * self.num_parameters} bytes of values, got {len(self.values)}")


class ReceiptMsg(_Msg, frozen=True):
    """The only proof of delivery: the aggregator has committed exactly these sealed bytes to its database."""

    tenant: Name
    task: Name
    round: RoundNumber
    device: Name
    update_id: UpdateId
    sealed_digest: Digest
    accepted_s: Seconds


class NackMsg(_Msg, frozen=True):
    """An update was not accepted.

    Args:
        reason: ``truncated`` asks for the chunks in `missing`; docs/protocol.md, section 7, says which are final.
        missing: bitmap, chunk i is bit i % 8 (least significant first) of byte i // 8; empty otherwise.
        detail: what was expected and what came, for the device's log.
    """

    tenant: Name
    device: Name
    update_id: UpdateId
    reason: RefusalReason
    missing: Annotated[bytes, Meta(max_length=MAX_CHUNKS // 8)] = b""
    detail: Annotated[str, Meta(max_length=400)] = ""


class PresenceMsg(_Msg, frozen=True):
    """Retained presence of a device."""

    state: Literal["online", "offline"]
    software: Annotated[str, Meta(max_length=64)]


def encode(message: _Msg) -> bytes:
    """MessagePack bytes of a message; equal messages give equal bytes.

    Raises:
        LocalMisuseError: a field is out of its range, so that every peer would refuse the message.
    """
    try:
        # Structs do not check their own types: read back, a wrong value is found here and an int becomes its float.
        checked = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type(message))
    except msgspec.ValidationError as error:
        raise LocalMisuseError(f"{type(message).__name__} cannot be sent: {error}") from error
    return msgspec.msgpack.encode(checked)


def decode(data: bytes, kind: type[M]) -> M:
    """Decode untrusted bytes as a message of this kind.

    Raises:
        ProtocolError: malformed, of another version, out of range, with fields unknown, missing or repeated, or not in
            the message's one encoding.
    """
    try:
        message = msgspec.msgpack.decode(data, type=kind, strict=True)
    # msgspec reports bad UTF-8 as UnicodeDecodeError and deep nesting as RecursionError.
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise ProtocolError(f"not a valid {kind.__name__}: {error}") from error
    if msgspec.msgpack.encode(message) != data:
        raise ProtocolError(
            f"not a valid {kind.__name__}: fields repeated, left out, reordered or not in shortest form"
        )
    return message


def _require_finite(**values: float) -> None:
    """Refuse infinities (a NaN already fails the range in the type)."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
