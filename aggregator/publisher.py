"""What the aggregator publishes, retained: the model's chunks first, then the signed manifest that names it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.config import TaskConfig
from aggregator.rounds import Phase, RoundState
from aggregator.store import StoredModel, little_endian
from fl_protocol.chunking import split
from fl_protocol.limits import chunk_data_bytes
from fl_protocol.messages import RecipientKeyMsg, RoundManifestMsg, encode
from fl_protocol.signing import sign
from fl_protocol.topics import model_topic, round_topic


class RetainedMessage(NamedTuple):
    """A message for the broker to keep; an empty payload makes it forget."""

    topic: str
    payload: bytes


def model_messages(tenant: str, model: StoredModel, *, maximum_packet_bytes: int | None) -> Iterator[RetainedMessage]:
    """The chunks of a model version."""
    whole = little_endian(model.model.params)
    for chunk in split(model.digest[:16], whole, data_bytes=chunk_data_bytes(maximum_packet_bytes)):
        yield RetainedMessage(model_topic(tenant, model.digest, chunk.index), encode(chunk))


def forget_model_messages(
    tenant: str, model: StoredModel, *, maximum_packet_bytes: int | None
) -> Iterator[RetainedMessage]:
    """What makes the broker drop a model version that no manifest names any more."""
    for message in model_messages(tenant, model, maximum_packet_bytes=maximum_packet_bytes):
        yield RetainedMessage(message.topic, b"")


def manifest_message(
    tenant: str,
    task: TaskConfig,
    *,
    state: RoundState,
    model: StoredModel,
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
    )
    return RetainedMessage(round_topic(tenant, task.name), sign(manifest, signing_key))
