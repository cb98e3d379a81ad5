"""The device's session: what to do about each manifest, chunk, receipt and tick. A pure state machine.

`handle(event, now_s)` returns actions; it never sleeps, reads a clock, opens a file or touches a socket. Order of
checks on a manifest: signature and form, this study, not older than what was seen, this model graph, the wearer's
floors; only then is a coin tossed, once per round, and only then is the model downloaded and checked against its
digest.
Every message from the broker is hostile until verified; a bad one is noted and changes nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec.structs import replace

from device_client.delivery import LONGEST_RETRY_S, Deliveries, uniform
from device_client.events import (
    Action,
    Evaluate,
    Event,
    Note,
    Participate,
    ParticipationEnded,
    PendingUpdate,
    Publish,
    Remember,
    SessionState,
    Subscribe,
    Unsubscribe,
    UpdateReady,
)
from device_client.noise import Entropy
from fl_protocol.chunking import Reassembler
from fl_protocol.errors import LocalMisuseError, ProtocolError, RefusedError
from fl_protocol.messages import ChunkMsg, NackMsg, PresenceMsg, ReceiptMsg, RoundManifestMsg, decode, encode
from fl_protocol.signing import verify
from fl_protocol.topics import down_filter, down_topic, model_filter, round_topic, state_topic
from fl_protocol.transport import Connected, Disconnected, Received

Role = Literal["train", "evaluate"]
STALLED_AFTER_S = 30.0
"""A model download without a chunk for this long is asked for again."""


@dataclass(frozen=True)
class Floors:
    """The least privacy the wearer accepts, whatever a manifest says.

    Args:
        minimum_noise_multiplier: least noise per step.
        minimum_cohort: fewest devices an update may be combined with.
    """

    minimum_noise_multiplier: float = 0.0
    minimum_cohort: int = 1


@dataclass(frozen=True)
class SessionConfig:
    """Who this device is and what it is pinned to.

    Args:
        role: ``train`` takes part in rounds; ``evaluate`` only measures each global model on its own records.
        graph_digest: SHA-256 of the trainable graph it loaded from a verified bundle.
        num_parameters: d of that graph.
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


class DeviceSession:
    """See the module docstring."""

    def __init__(
        self,
        config: SessionConfig,
        *,
        entropy: Entropy,
        state: SessionState | None = None,
        outbox: Iterable[PendingUpdate] = (),
    ) -> None:
        self._config = config
        self._entropy = entropy
        self._state = _state_for(f"{config.tenant}/{config.task}", state if state is not None else SessionState())
        self._deliveries = Deliveries(tenant=config.tenant, device=config.device, entropy=entropy, outbox=outbox)
        self._manifest: RoundManifestMsg | None = None
        self._download: Reassembler | None = None  # set while the current manifest's model is wanted
        self._stalled_s = math.inf  # when a download in silence is asked for again
        self._silences = 0

    def next_wake_s(self) -> float | None:
        """When a `Tick` is next needed."""
        wakes = [wake for wake in (self._deliveries.next_wake_s(), self._stalled_s) if wake is not None]
        return None if min(wakes) == math.inf else min(wakes)

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Take an event; the actions are to be executed in order."""
        match event:
            case Connected():
                try:
                    actions = self._connected(event)
                except LocalMisuseError as error:  # the server takes no packet that is large enough
                    actions = [Note("broker_unusable", {"reason": str(error)})]
            case Disconnected():
                self._deliveries.disconnected()
                self._stalled_s = math.inf
                actions = [Note("disconnected", {"reason": event.reason})]
            case Received():
                try:
                    actions = self._received(event, now_s)
                except ProtocolError as error:
                    actions = [Note("message_refused", {"topic": event.topic[:200], "reason": str(error)[:400]})]
            case UpdateReady():
                self._deliveries.add(event.pending)
                actions = []
            case ParticipationEnded():
                actions = [Note("participation_ended", {"round": event.round, "reason": event.reason})]
            case _:
                actions = []
        return actions + self._ask_again(now_s) + self._deliveries.due(now_s)

    def offline_presence(self) -> Publish:
        """The last will: what the broker says for this device when its connection dies."""
        return self._presence("offline")

    def _presence(self, state: Literal["online", "offline"]) -> Publish:
        """This device's retained presence."""
        message = PresenceMsg(state=state, software=self._config.software)
        return Publish(state_topic(self._config.tenant, self._config.device), encode(message), retain=True)

    def _connected(self, event: Connected) -> list[Action]:
        """Subscribe anew; a download begun on the old connection starts over."""
        config = self._config
        self._deliveries.connected(event.maximum_packet_bytes)
        if self._download is not None:
            self._manifest = self._download = None  # the retained manifest comes again and restarts it
            self._stalled_s = math.inf
        return [
            Subscribe(down_filter(config.tenant, config.device)),
            Subscribe(round_topic(config.tenant, config.task)),
            self._presence("online"),
            Note("connected"),
        ]

    def _received(self, message: Received, now_s: float) -> list[Action]:
        """Route one message by its topic."""
        config = self._config
        if message.topic == round_topic(config.tenant, config.task):
            return self._manifest_came(message.payload, now_s)
        if message.topic == down_topic(config.tenant, config.device, "receipt"):
            return self._deliveries.receipt(verify(message.payload, ReceiptMsg, config.aggregator_key))
        if message.topic == down_topic(config.tenant, config.device, "nack"):
            return self._deliveries.nack(verify(message.payload, NackMsg, config.aggregator_key), now_s)
        if self._download is not None and self._manifest is not None:
            prefix = model_filter(config.tenant, self._manifest.model_digest)[:-1]
            if message.topic.startswith(prefix):
                return self._model_chunk_came(decode(message.payload, ChunkMsg), self._download, self._manifest, now_s)
        return []

    def _manifest_came(self, payload: bytes, now_s: float) -> list[Action]:
        """Decide about a manifest, and fetch its model if it concerns this device."""
        manifest = verify(payload, RoundManifestMsg, self._config.aggregator_key)
        self._check_concerns_us(manifest)
        if self._manifest is not None and encode(manifest) == encode(self._manifest):
            return []
        actions = self._stop_download()
        self._manifest = manifest
        if manifest.round > self._state.highest_round:
            actions.append(self._remember(highest_round=manifest.round))
        if self._config.role == "train":
            decided = self._decide(manifest, now_s)
            actions += decided
            if manifest.status != "open" or self._state.willing_round != manifest.round:
                return actions
        self._download = Reassembler(max_bytes=4 * self._config.num_parameters, max_transfers=1)
        self._stalled_s, self._silences = now_s + STALLED_AFTER_S, 0
        actions.append(Subscribe(model_filter(self._config.tenant, manifest.model_digest)))
        return actions

    def _check_concerns_us(self, manifest: RoundManifestMsg) -> None:
        """Refuse a manifest that is not this study's, is old, is for another graph, or asks below the floors."""
        config, floors = self._config, self._config.floors
        if (manifest.tenant, manifest.task) != (config.tenant, config.task):
            raise ProtocolError(f"the manifest is for {manifest.tenant}/{manifest.task}")
        if manifest.round < self._state.highest_round:
            raise ProtocolError(f"round {manifest.round} is older than round {self._state.highest_round}: a replay")
        if manifest.graph_digest != config.graph_digest or manifest.num_parameters != config.num_parameters:
            raise ProtocolError("the manifest names another model graph than the installed bundle's")
        if manifest.status == "finished" or config.role == "evaluate":
            return
        if manifest.plan.noise_multiplier < floors.minimum_noise_multiplier:
            raise ProtocolError(
                f"noise_multiplier {manifest.plan.noise_multiplier:g} is below the wearer's floor "
                f"{floors.minimum_noise_multiplier:g}"
            )
        if manifest.minimum_cohort < floors.minimum_cohort:
            raise ProtocolError(
                f"minimum_cohort {manifest.minimum_cohort} is below the wearer's floor {floors.minimum_cohort}"
            )

    def _decide(self, manifest: RoundManifestMsg, now_s: float) -> list[Action]:
        """Toss this round's coin, once, and remember that it was tossed before anything follows from it."""
        state = self._state
        if manifest.status != "open" or manifest.round <= state.decided_round:
            return []
        willing = 0
        reason = ""
        if now_s >= manifest.deadline_s:
            reason = "its deadline has passed"
        elif state.participated_s and now_s < state.participated_s + manifest.minimum_separation_s:
            reason = "took part too recently"
        elif uniform(self._entropy) >= manifest.participation_probability:
            reason = "the coin said no"
        else:
            willing = manifest.round
        decided = self._remember(decided_round=manifest.round, willing_round=willing)
        return [decided] if willing else [decided, Note("round_skipped", {"round": manifest.round, "reason": reason})]

    def _remember(self, **changes: float) -> Remember:
        """Change the state and have it stored."""
        self._state = replace(self._state, **changes)
        return Remember(self._state)

    def _stop_download(self) -> list[Action]:
        """Give up a model that a newer manifest has overtaken."""
        if self._download is None or self._manifest is None:
            return []
        self._download, self._stalled_s = None, math.inf
        return [Unsubscribe(model_filter(self._config.tenant, self._manifest.model_digest))]

    def _ask_again(self, now_s: float) -> list[Action]:
        """Subscribe again when no chunk has come for a while: the broker then sends the retained ones once more."""
        if self._download is None or self._manifest is None or now_s < self._stalled_s:
            return []
        self._silences += 1
        self._stalled_s = now_s + min(LONGEST_RETRY_S, STALLED_AFTER_S * 2.0 ** min(self._silences, 10))
        return [Subscribe(model_filter(self._config.tenant, self._manifest.model_digest))]

    def _model_chunk_came(
        self, chunk: ChunkMsg, download: Reassembler, manifest: RoundManifestMsg, now_s: float
    ) -> list[Action]:
        """Collect the model; when it is whole and matches the signed digest, use it."""
        if chunk.digest != manifest.model_digest:
            raise ProtocolError("a model chunk names another digest than the signed manifest")
        self._stalled_s, self._silences = now_s + STALLED_AFTER_S, 0
        try:
            whole = download.accept(chunk, now_s)
        except RefusedError:
            download.forget(chunk.transfer_id)  # one forged chunk must not block the true ones that come again
            raise
        if whole is None:
            return []
        if hashlib.sha256(whole).digest() != manifest.model_digest or len(whole) != 4 * manifest.num_parameters:
            raise ProtocolError("the model does not match the signed manifest")
        params = np.frombuffer(whole, "<f4").astype(np.float32)
        if not np.isfinite(params).all():
            raise ProtocolError("the model holds numbers that are not finite")
        received = Note("model_received", {"round": manifest.round, "bytes": len(whole)})
        actions: list[Action] = [*self._stop_download(), received]
        if self._config.role == "evaluate":
            return [*actions, Evaluate(manifest, params)]
        if now_s >= manifest.deadline_s:
            return [*actions, Note("round_skipped", {"round": manifest.round, "reason": "the model came too late"})]
        return [*actions, self._remember(participated_s=now_s, willing_round=0), Participate(manifest, params)]


def _state_for(study: str, state: SessionState) -> SessionState:
    """The state of this study: round numbers of another one mean nothing here, but separation is the device's."""
    if state.study in {"", study}:
        return replace(state, study=study)
    return SessionState(study=study, participated_s=state.participated_s)
