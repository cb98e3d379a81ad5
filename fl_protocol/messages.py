"""Every message on the wire, as frozen structs in MessagePack maps; versioned and decoded strictly.

`decode` raises `ProtocolError` and nothing else, whatever the bytes. Ranges stand in the types, relations between
fields in ``__post_init__``; a struct that was decoded is valid. A message has exactly one encoding: every field once,
in the order written here, integers in their shortest form, floats as float64. `decode` refuses any other, so that no
two readers can understand the same bytes differently (a field given twice, say). Signed messages travel as
`SignedMsg`, whose signature covers a context string and the exact payload bytes (see `fl_protocol.signing`).
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from fl_protocol.errors import LocalMisuseError, ProtocolError, RefusalReason
from fl_protocol.limits import MAX_CHUNKS, MAX_PACKET_BYTES, MAX_TRANSFER_BYTES, MIN_CHUNK_DATA_BYTES
from fl_protocol.message_base import (
    Count,
    Digest,
    KemName,
    Msg,
    Name,
    ParameterCount,
    RecipientKeyMsg,
    RoundNumber,
    Seconds,
    Signature,
    UpdateId,
)
from fl_protocol.plans import EvaluationPlanMsg, FeatureMsg, PlanMsg, StatisticsPlanMsg, TrainingPlanMsg
from fl_protocol.secagg.messages import MaskSumMsg, SecureBodyMsg, SecureTermsMsg

__all__ = [
    "ChunkMsg",
    "ChunkView",
    "DeltaMsg",
    "EncodingName",
    "EvaluationPlanMsg",
    "FeatureMsg",
    "KemName",
    "NackMsg",
    "Name",
    "PresenceMsg",
    "PresenceReason",
    "ReceiptMsg",
    "RecipientKeyMsg",
    "RoundManifestMsg",
    "SecureTermsMsg",
    "SignedMsg",
    "StatisticsPlanMsg",
    "TrainingPlanMsg",
    "UpdateBodyMsg",
    "UpdateBodyView",
    "UpdateEnvelopeMsg",
    "UpdateEnvelopeView",
    "UpdateHeaderMsg",
    "decode",
    "encode",
]

EncodingName = Literal["float32", "float16", "int8", "top_k"]
PresenceReason = Literal["", "battery", "charger", "idle", "network", "temperature", "hours"]
M = TypeVar("M", bound=Msg)


class SignedMsg(Msg, frozen=True):
    """A payload and the Ed25519 signature over its context and exact bytes."""

    payload: bytes
    signature: Signature


class DeltaMsg(Msg, frozen=True):
    """How to get from one model to another with less than all its bytes (see `fl_protocol.model_delta`).

    Args:
        from_digest: of the model that a device has.
        digest: SHA-256 of the delta's bytes, which are fetched like a model's.
        total_bytes: length of the delta.
    """

    from_digest: Digest
    digest: Digest
    total_bytes: Annotated[int, Meta(ge=1, le=MAX_TRANSFER_BYTES)]


class RoundManifestMsg(Msg, frozen=True):
    """All a device needs to know of a round; retained, signed by the aggregator.

    Args:
        status: ``open`` invites updates; ``paused`` says that no round is open now; ``finished`` only announces the
            task's last model; ``aborted`` ends the task.
        model_digest: SHA-256 of the global parameters (little-endian float32 [num_parameters]).
        graph_digest: SHA-256 of the trainable graph that the parameters belong to.
        recipient: key that updates are sealed to; none unless open.
        opened_s: Unix seconds.
        deadline_s: Unix seconds.
        goal: updates at which the round closes early.
        minimum_cohort: fewest updates that are ever combined.
        participation_probability: with which each device tosses its own coin.
        minimum_separation_s: seconds a device stays out after taking part.
        most_participations: rounds of the task that a device takes part in at most; None for any number.
        maximum_staleness: an update of this round counts as long as no round newer by more than this is open; 0 in
            synchronous rounds.
        required_tags: what a device must be able to do; one that lacks any stays out, and says nothing about it.
        encodings: of updates, in the order of the aggregator's preference; a device takes the first that it knows.
        top_k_fraction: share of the values that ``top_k`` sends.
        delta: how to get to the model from the one before, if that is offered.
        control_digest: SHA-256 of the server's control variate c (little-endian float32 [num_parameters]), fetched like
            a model; given exactly in open rounds whose plan has `control_variates`.
        secure: how updates are masked and added up; given exactly in open rounds of the engine ``secure``.
    """

    tenant: Name
    task: Name
    round: RoundNumber
    status: Literal["open", "paused", "finished", "aborted"]
    engine: Literal["open", "secure"]
    model_digest: Digest
    graph_digest: Digest
    num_parameters: ParameterCount
    recipient: RecipientKeyMsg | None
    plan: PlanMsg
    opened_s: Seconds
    deadline_s: Seconds
    goal: Count
    minimum_cohort: Count
    participation_probability: Annotated[float, Meta(ge=0, le=1)]
    minimum_separation_s: Seconds
    most_participations: Count | None = None
    maximum_staleness: Annotated[int, Meta(ge=0, le=1000)] = 0
    required_tags: Annotated[tuple[Name, ...], Meta(max_length=16)] = ()
    encodings: Annotated[tuple[EncodingName, ...], Meta(min_length=1, max_length=4)] = ("float32",)
    top_k_fraction: Annotated[float, Meta(gt=0, le=1)] = 1.0
    delta: DeltaMsg | None = None
    control_digest: Digest | None = None
    secure: SecureTermsMsg | None = None

    def __post_init__(self) -> None:
        if (self.recipient is not None) != (self.status == "open"):
            raise ValueError("an open round needs a recipient key, a task without one has none")
        if self.goal < self.minimum_cohort:
            raise ValueError(f"goal {self.goal} is below minimum_cohort {self.minimum_cohort}")
        if self.deadline_s < self.opened_s:
            raise ValueError(f"deadline_s {self.deadline_s} is before opened_s {self.opened_s}")
        if (self.control_digest is not None) != (self.plan.control_variates and self.status == "open"):
            raise ValueError("a control_digest belongs to open rounds with control_variates, and only to those")
        if len(set(self.required_tags)) < len(self.required_tags) or len(set(self.encodings)) < len(self.encodings):
            raise ValueError("a tag or an encoding is named twice")
        self._check_engine()

    def _check_engine(self) -> None:
        """Whether what the engine needs is there, and nothing that does not go with it. Raises ValueError."""
        if (self.secure is not None) != (self.engine == "secure" and self.status == "open"):
            raise ValueError("secure belongs to open rounds of the engine secure, and only to those")
        if self.secure is None:
            return
        if self.maximum_staleness or self.encodings != ("float32",) or self.plan.control_variates:
            raise ValueError(
                "the engine secure adds up updates of one round in an encoding of its own: expected maximum_staleness "
                "0, encodings float32 and no control_variates"
            )
        if self.secure.most_updates < self.minimum_cohort:
            raise ValueError(f"most_updates {self.secure.most_updates} is below minimum_cohort {self.minimum_cohort}")

    @property
    def update_length(self) -> int:
        """Numbers in an update."""
        return self.num_parameters if isinstance(self.plan, TrainingPlanMsg) else self.plan.length


class ChunkMsg(Msg, frozen=True):
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


class UpdateHeaderMsg(Msg, frozen=True):
    """What a device says in the clear about its sealed update, and signs."""

    tenant: Name
    task: Name
    round: RoundNumber
    model_digest: Digest
    device: Name
    update_id: UpdateId
    kem: KemName
    sealed_digest: Digest


class UpdateEnvelopeMsg(Msg, frozen=True):
    """A sealed update as it travels: encoded header, the device's signature over it, HPKE ``enc || ciphertext``."""

    header: Annotated[bytes, Meta(max_length=4096)]
    signature: Signature
    sealed: bytes


class UpdateBodyMsg(Msg, frozen=True):
    """What is inside the seal: the change of the parameters, or the numbers that the round's plan asks for.

    Args:
        num_parameters: numbers that `values` stand for.
        values: for ``float32``, little-endian float32 [num_parameters].
        encoding: of `values`; see `fl_protocol.update_encoding`.
    """

    num_parameters: ParameterCount
    values: bytes
    encoding: EncodingName = "float32"

    def __post_init__(self) -> None:
        if self.encoding == "float32" and len(self.values) != 4 * self.num_parameters:
            raise ValueError(f"expected {4 * self.num_parameters} bytes of values, got {len(self.values)}")


class ChunkView(ChunkMsg, frozen=True):
    """A chunk that borrows its data from the bytes that it was decoded from; for who takes many of them."""

    data: Annotated[memoryview, Meta(min_length=1, max_length=MAX_PACKET_BYTES)]  # type: ignore[assignment]


class UpdateEnvelopeView(UpdateEnvelopeMsg, frozen=True):
    """An envelope that borrows its sealed bytes, as `ChunkView` does."""

    sealed: memoryview  # type: ignore[assignment]


class UpdateBodyView(UpdateBodyMsg, frozen=True):
    """A body that borrows its values, as `ChunkView` does."""

    values: memoryview  # type: ignore[assignment]


class ReceiptMsg(Msg, frozen=True):
    """The only proof of delivery: the aggregator has committed exactly these sealed bytes to its database."""

    tenant: Name
    task: Name
    round: RoundNumber
    device: Name
    update_id: UpdateId
    sealed_digest: Digest
    accepted_s: Seconds


class NackMsg(Msg, frozen=True):
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


class PresenceMsg(Msg, frozen=True):
    """Retained presence of a device.

    Args:
        software: name and version.
        reason: the first of the board's conditions that keeps it from training; empty if none does, if the wearer does
            not want it told, and when it is offline. It follows from the board alone, never from what the device has
            recorded, spent or agreed to elsewhere.
    """

    state: Literal["online", "offline"]
    software: Annotated[str, Meta(max_length=64)]
    reason: PresenceReason = ""

    def __post_init__(self) -> None:
        if self.reason and self.state == "offline":
            raise ValueError(f"a device that is offline gives no reason, got {self.reason}")


def encode(message: Msg) -> bytes:
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


def decode(data: bytes | memoryview, kind: type[M]) -> M:
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
    if not _is_its_encoding(data, message):
        raise ProtocolError(
            f"not a valid {kind.__name__}: fields repeated, left out, reordered or not in shortest form"
        )
    return message


_BULK: dict[type[Msg], str] = {
    ChunkMsg: "data",
    ChunkView: "data",
    UpdateEnvelopeMsg: "sealed",
    UpdateEnvelopeView: "sealed",
    UpdateBodyMsg: "values",
    UpdateBodyView: "values",
    SecureBodyMsg: "masked",
    MaskSumMsg: "total",
}
"""Fields that are nearly all of their message; what comes after them are only texts and numbers, no bytes."""
_NO_BYTES = b"\xc4\x00"
_LARGE_BYTES = 64 * 1024
"""From about here on it is cheaper not to encode again."""


def _is_its_encoding(data: bytes | memoryview, message: Msg) -> bool:
    """Whether these bytes are the message's one encoding; what is bulk is not encoded again to find out."""
    field = _BULK.get(type(message))
    if field is None or len(data) < _LARGE_BYTES:
        return msgspec.msgpack.encode(message) == bytes(data)  # of bytes this is no copy, and views compare slowly
    # If all around the bulk is as it must be, the bulk is where it must be, and was decoded from there.
    fields = msgspec.structs.asdict(message)
    bulk = fields[field]
    empty = msgspec.msgpack.encode({**fields, field: b""})
    before = empty.rindex(_NO_BYTES)
    after = empty[before + len(_NO_BYTES) :]
    begins = empty[:before] + _bin_header(len(bulk))
    return (
        len(data) == len(begins) + len(bulk) + len(after)
        and data[: len(begins)] == begins
        and data[len(data) - len(after) :] == after
    )


def _bin_header(length: int) -> bytes:
    """How bytes of a length begin in MessagePack."""
    if length < 2**8:
        return b"\xc4" + length.to_bytes(1, "big")
    return b"\xc5" + length.to_bytes(2, "big") if length < 2**16 else b"\xc6" + length.to_bytes(4, "big")
