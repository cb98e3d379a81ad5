"""What the session is told (events) and what it asks for (actions). Frozen; the daemon and the simulator share them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fl_protocol.messages import RoundManifestMsg
from fl_protocol.transport import TransportEvent


class PendingUpdate(msgspec.Struct, frozen=True):
    """A sealed update in the outbox: exactly these bytes are sent, and resent, until the receipt.

    Args:
        envelope: encoded `UpdateEnvelopeMsg`.
        sealed_digest: SHA-256 of its sealed part, which the receipt must name.
        deadline_s: of its round, Unix seconds.
    """

    update_id: bytes
    task: str
    round: int
    envelope: bytes
    sealed_digest: bytes
    deadline_s: float


class SessionState(msgspec.Struct, frozen=True):
    """What a session must remember across restarts.

    Args:
        study: ``tenant/task`` that the round numbers belong to; another study starts over.
        highest_round: newest round seen; an older manifest is a replay.
        decided_round: newest round for which the coin was tossed; it is tossed once.
        willing_round: the round for which the coin said yes and nothing was charged yet, 0 if none; a device that is
            restarted between the two still takes part.
        participated_s: when this device last took part, Unix seconds.
    """

    study: str = ""
    highest_round: int = 0
    decided_round: int = 0
    willing_round: int = 0
    participated_s: float = 0.0


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class UpdateReady:
    """A participation was charged, trained, sealed and stored in the outbox."""

    pending: PendingUpdate


@dataclass(frozen=True)
class ParticipationEnded:
    """A participation gave no update (budget spent, training failed)."""

    round: int
    reason: str


Event = TransportEvent | Tick | UpdateReady | ParticipationEnded


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
class Participate:
    """Charge the ledger, train, seal, store in the outbox; answer with `UpdateReady` or `ParticipationEnded`."""

    manifest: RoundManifestMsg
    params: NDArray[np.float32]


@dataclass(frozen=True)
class Evaluate:
    """Measure this global model on the device's own records; the result stays on the device."""

    manifest: RoundManifestMsg
    params: NDArray[np.float32]


@dataclass(frozen=True)
class Discard:
    """Remove an update from the outbox: it was delivered, refused for good, or is too late."""

    update_id: bytes


@dataclass(frozen=True)
class Remember:
    """Durably store the session's state."""

    state: SessionState


@dataclass(frozen=True)
class Note:
    """Tell the journal."""

    event: str
    fields: dict[str, Any] = field(default_factory=dict)


Action = Subscribe | Unsubscribe | Publish | Participate | Evaluate | Discard | Remember | Note
