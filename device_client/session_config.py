"""Who a session is and what it tells people: its configuration and its view. Frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from device_client.floors import Floors
from fl_protocol.enrolment import Period
from fl_protocol.secagg.terms import HelperIdentity

Role = Literal["train", "evaluate"]


@dataclass(frozen=True)
class SessionConfig:
    """Who this device is and what it is pinned to.

    Args:
        device: the name on the wire.
        role: ``train`` takes part in rounds; ``evaluate`` only measures each global model on its own records.
        graph_digest: SHA-256 of the trainable graph it loaded from a verified bundle.
        num_parameters: d of that graph.
        floors: the least privacy the wearer accepts.
        minimum_separation_s: least time between participations, whatever the study asks for.
        counts_records: whether the wearer's new records are counted before taking part.
        tags: what this device can do; a round that asks for others is left out.
        input_shape: of one recorded window, channels last, for what statistics may ask about; None if not known.
        maximum_participations: how often the wearer lets it take part in the study; None for any number.
        helpers: of secure aggregation that this device is pinned to, by name; a round with any other is refused.
        period: of the pseudonym that `device` is; None for a fixed id.
        tells_why_every_s: how often at most its presence says why it is not training; 0 for never.
    """

    tenant: str
    task: str
    device: str
    role: Role
    aggregator_key: Ed25519PublicKey
    graph_digest: bytes
    num_parameters: int
    floors: Floors
    software: str
    minimum_separation_s: float = 0.0
    counts_records: bool = False
    tags: frozenset[str] = frozenset()
    input_shape: tuple[int, ...] | None = None
    maximum_participations: int | None = None
    helpers: Mapping[str, HelperIdentity] = field(default_factory=dict)
    period: Period | None = None
    tells_why_every_s: float = 0.0


@dataclass(frozen=True)
class SessionView:
    """What a person is told about a session.

    Args:
        connected: whether the broker is there.
        doing: what it is doing or waiting for, in words.
        round: newest round seen, 0 if none.
        refused: why the newest manifest was refused, in words; empty if it was not.
        pending: updates that wait for their receipts.
    """

    connected: bool
    doing: str
    round: int
    refused: str
    pending: int
