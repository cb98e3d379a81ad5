"""What the session is told (events) and what it asks for (actions). Frozen; the daemon and the simulator share them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fl_protocol.messages import PresenceReason, RoundManifestMsg
from fl_protocol.transport import TransportEvent


class PendingUpdate(msgspec.Struct, frozen=True, tag="sealed"):
    """A sealed update in the outbox: exactly these bytes are sent, and resent, until the receipt.

    Args:
        study: ``tenant/task`` it is for.
        device: the name on the wire that it was sealed and signed under.
        envelope: encoded `UpdateEnvelopeMsg`.
        sealed_digest: SHA-256 of its sealed part, which the receipt must name.
        deadline_s: of its round, Unix seconds.
        recipient_key: what it was sealed to: the first 32 hex digits of the public key's SHA-256.
    """

    update_id: bytes
    study: str
    device: str
    round: int
    envelope: bytes
    sealed_digest: bytes
    deadline_s: float
    recipient_key: str


class SessionState(msgspec.Struct, frozen=True):
    """What a session must remember across restarts.

    Args:
        study: ``tenant/task`` that the round numbers belong to.
        highest_round: newest round seen; an older manifest is a replay.
        decided_round: newest round for which the coin was tossed; it is tossed once.
        willing_round: the round for which the coin said yes and nothing was charged yet, 0 if none; a device that is
            restarted between the two still takes part.
        counted_round: newest round for which the wearer's new records were counted; each count is charged.
        participated_s: when this device last took part, Unix seconds.
        participations: how often it took part.
        most_participations: the lowest number of times that the study ever asked devices to keep to; None if it never
            did. What it asked for once holds, whatever a later manifest says.
        separation_s: the longest time between participations that it ever asked for.
    """

    study: str = ""
    highest_round: int = 0
    decided_round: int = 0
    willing_round: int = 0
    counted_round: int = 0
    participated_s: float = 0.0
    participations: int = 0
    most_participations: int | None = None
    separation_s: float = 0.0


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class ConditionsRead:
    """Whether the device may train now.

    Args:
        blocked: why not, in words; empty when it may.
        holds_uploads: whether the network or the battery is among the reasons, so that no large update is sent either.
    """

    blocked: tuple[str, ...] = ()
    holds_uploads: bool = False


@dataclass(frozen=True)
class ReasonRead:
    """What the board says now about training, for presence alone; it decides nothing."""

    reason: PresenceReason


@dataclass(frozen=True)
class RecordsCounted:
    """The wearer's new records were counted, with noise, for a round.

    Args:
        round: which.
        reason: why they are not enough, in words; empty when they are.
    """

    round: int
    reason: str = ""


@dataclass(frozen=True)
class ModelRead:
    """The kept model was read.

    Args:
        digest: that was asked for.
        params: float32 [d]; None if it is not there any more, or cannot be read.
    """

    digest: bytes
    params: NDArray[np.float32] | None


@dataclass(frozen=True)
class UpdateReady:
    """A participation was charged, trained, sealed and stored in the outbox."""

    pending: PendingUpdate


@dataclass(frozen=True)
class ParticipationEnded:
    """A participation gave no update (budget spent, training failed, given up)."""

    round: int
    reason: str


Event = (
    TransportEvent | Tick | ConditionsRead | ReasonRead | RecordsCounted | ModelRead | UpdateReady | ParticipationEnded
)


@dataclass(frozen=True)
class Subscribe:
    """Ask the broker for a topic filter."""

    topic_filter: str


@dataclass(frozen=True)
class Unsubscribe:
    """Stop asking for it."""

    topic_filter: str


@dataclass(frozen=True)
class Publish:
    """Send a message."""

    topic: str
    payload: bytes
    retain: bool = False
    expires_s: int | None = None


@dataclass(frozen=True)
class KeepChunk:
    """Durably keep one verified piece of a download, as it came, so that a restart goes on from it."""

    digest: bytes
    index: int
    payload: bytes


@dataclass(frozen=True)
class DropChunks:
    """Forget what is kept of downloads: they are complete, or no longer wanted."""

    digests: tuple[bytes, ...]


@dataclass(frozen=True)
class KeepModel:
    """Durably keep this model instead of the one that was kept: the next one may come as a delta to it.

    Args:
        digest: SHA-256 of `params`, little-endian.
        params: float32 [d].
    """

    digest: bytes
    params: NDArray[np.float32]


@dataclass(frozen=True)
class ReadModel:
    """Read the kept model; answer with `ModelRead`."""

    digest: bytes


@dataclass(frozen=True)
class CountRecords:
    """Charge for, and make, a noisy count of the new records; answer with `RecordsCounted`."""

    manifest: RoundManifestMsg


@dataclass(frozen=True)
class Participate:
    """Charge the ledger, train, seal, store in the outbox; answer with `UpdateReady` or `ParticipationEnded`.

    Args:
        params: global parameters, float32 [d]; empty for statistics, which need none.
        control: SCAFFOLD's server control variate, float32 [d], if the plan wants it.
    """

    manifest: RoundManifestMsg
    params: NDArray[np.float32]
    control: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Abandon:
    """Give up what is being trained for a round that is over; the charge stands."""

    round: int
    reason: str


@dataclass(frozen=True)
class Evaluate:
    """Measure this global model on the device's own records; the result stays on the device."""

    manifest: RoundManifestMsg
    params: NDArray[np.float32]


@dataclass(frozen=True)
class Discard:
    """Remove an update from the outbox.

    Args:
        round: its round.
        outcome: ``delivered``, ``refused`` or ``expired``.
    """

    update_id: bytes
    round: int
    outcome: str


@dataclass(frozen=True)
class Remember:
    """Durably store the session's state."""

    state: SessionState


@dataclass(frozen=True)
class Note:
    """Tell the journal."""

    event: str
    fields: dict[str, Any] = field(default_factory=dict)


Action = (
    Subscribe
    | Unsubscribe
    | Publish
    | KeepChunk
    | DropChunks
    | KeepModel
    | ReadModel
    | CountRecords
    | Participate
    | Abandon
    | Evaluate
    | Discard
    | Remember
    | Note
)
