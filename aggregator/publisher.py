"""What the aggregator publishes, retained: the chunks of models, then the signed manifest that names them. No I/O.

Each chunk is signed by itself, so that a device drops a forged one without losing the rest; see docs/protocol.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.config import TaskConfig
from aggregator.rounds import Phase, RoundState
from aggregator.store import StoredModel
from fl_protocol.chunking import split
from fl_protocol.limits import chunk_data_bytes
from fl_protocol.messages import RecipientKeyMsg, RoundManifestMsg
from fl_protocol.signing import sign
from fl_protocol.topics import model_topic, round_topic


class RetainedMessage(NamedTuple):
    """A message for the broker to keep; an empty payload makes it forget."""

    topic: str
    payload: bytes


class SignedChunks:
    """The chunks of models and control variates, each signed once however often it is published again.

    Args:
        tenant: name on the wire.
        signing_key: the aggregator's.
    """

    def __init__(self, tenant: str, signing_key: Ed25519PrivateKey) -> None:
        self._tenant = tenant
        self._signing_key = signing_key
        self._signed: dict[tuple[bytes, int], list[RetainedMessage]] = {}

    def of(self, whole: bytes, *, maximum_packet_bytes: int | None) -> list[RetainedMessage]:
        """The signed chunks of a model's or control variate's bytes, cut for a server's packet limit."""
        digest, data_bytes = hashlib.sha256(whole).digest(), chunk_data_bytes(maximum_packet_bytes)
        if (digest, data_bytes) not in self._signed:
            self._signed[digest, data_bytes] = [
                RetainedMessage(model_topic(self._tenant, digest, chunk.index), sign(chunk, self._signing_key))
                for chunk in split(digest[:16], whole, data_bytes=data_bytes)
            ]
        return self._signed[digest, data_bytes]

    def keep_only(self, digests: Collection[bytes]) -> None:
        """Let go of what is not published any more."""
        self._signed = {key: chunks for key, chunks in self._signed.items() if key[0] in digests}


def forget_messages(
    tenant: str, digest: bytes, *, num_parameters: int, maximum_packet_bytes: int | None
) -> Iterator[RetainedMessage]:
    """What makes the broker drop a model or control variate that no manifest names any more."""
    for index in range(-(-4 * num_parameters // chunk_data_bytes(maximum_packet_bytes))):
        yield RetainedMessage(model_topic(tenant, digest, index), b"")


def manifest_message(
    tenant: str,
    task: TaskConfig,
    *,
    state: RoundState,
    model: StoredModel,
    control_digest: bytes | None,
    graph_digest: bytes,
    recipient: RecipientKeyMsg | None,
    signing_key: Ed25519PrivateKey,
) -> RetainedMessage:
    """The signed manifest of the task as it stands.

    Args:
        tenant: name on the wire.
        task: its configuration.
        state: its round state, open or finished.
        model: the current global model.
        control_digest: SHA-256 of the server's control variate, for an open round with control variates; else None.
        graph_digest: SHA-256 of the bundle's trainable graph.
        recipient: public key of the open round; None when finished.
        signing_key: the aggregator's.
    """
    manifest = RoundManifestMsg(
        tenant=tenant,
        task=task.name,
        round=state.number,
        status="finished" if state.phase is Phase.FINISHED else "open",
        engine="open",
        model_digest=model.digest,
        graph_digest=graph_digest,
        num_parameters=len(model.model.params),
        recipient=recipient,
        plan=task.plan.message(),
        opened_s=state.opened_s,
        deadline_s=state.deadline_s,
        goal=task.goal,
        minimum_cohort=task.minimum_cohort,
        participation_probability=task.participation_probability,
        minimum_separation_s=task.minimum_separation_s,
        control_digest=control_digest,
    )
    return RetainedMessage(round_topic(tenant, task.name), sign(manifest, signing_key))
