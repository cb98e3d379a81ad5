"""The device's session with one study: what to do about each manifest, chunk, receipt and tick. A pure state machine.

`handle(event, now_s)` returns actions; it never sleeps, reads a clock, opens a file or touches a socket. Order of
checks on a manifest: signature and form, this study, not older than what was seen, this model graph, the wearer's
floors; only then is a coin tossed, once per round. Then the device waits until it may train, fetches the model, checks
it against its digest, and takes part; when the round is over before that, it gives up what it has begun.
Every message from the broker is hostile until verified; a bad one is noted and changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec.structs import replace

from device_client.delivery import Deliveries, uniform
from device_client.downloads import Download
from device_client.events import (
    Abandon,
    Action,
    ConditionsRead,
    CountRecords,
    DropChunks,
    Evaluate,
    Event,
    Note,
    Participate,
    ParticipationEnded,
    PendingUpdate,
    Publish,
    RecordsCounted,
    Remember,
    SessionState,
    Subscribe,
    UpdateReady,
)
from device_client.floors import Floors, FloorsError
from device_client.noise import Entropy
from fl_protocol.errors import LocalMisuseError, ProtocolError
from fl_protocol.messages import NackMsg, PresenceMsg, ReceiptMsg, RoundManifestMsg, encode
from fl_protocol.signing import verify
from fl_protocol.topics import down_filter, down_topic, round_topic, state_topic
from fl_protocol.transport import Connected, Disconnected, Received

Role = Literal["train", "evaluate"]
CLOCK_MARGIN_S = 600.0
"""How far this device's clock may be behind the aggregator's."""


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


@dataclass
class _Round:
    """The round that the newest good manifest names."""

    manifest: RoundManifestMsg
    phase: Literal["undecided", "waiting", "counting", "fetching", "training", "idle"] = "undecided"
    why_idle: str = ""
    downloads: list[Download] = field(default_factory=list)


class DeviceSession:
    """See the module docstring.

    Args:
        config: who this device is.
        entropy: for the coin and for jitter.
        state: what was remembered.
        outbox: this study's updates that are not delivered.
        kept_chunks: by digest, what was kept of downloads.
        working_on: manifest of the round whose training was interrupted and goes on.
    """

    def __init__(
        self,
        config: SessionConfig,
        *,
        entropy: Entropy,
        state: SessionState | None = None,
        outbox: Iterable[PendingUpdate] = (),
        kept_chunks: Mapping[bytes, Iterable[bytes]] | None = None,
        working_on: RoundManifestMsg | None = None,
    ) -> None:
        self._config = config
        self._entropy = entropy
        self._state = _state_for(f"{config.tenant}/{config.task}", state if state is not None else SessionState())
        self._deliveries = Deliveries(tenant=config.tenant, entropy=entropy, outbox=outbox)
        self._kept = dict(kept_chunks) if kept_chunks is not None else {}
        self._working_on = working_on.round if working_on is not None else 0
        self._work_ends_s = working_on.deadline_s if working_on is not None else math.inf
        self._round: _Round | None = None
        self._connected = False
        self._blocked: tuple[str, ...] = ("the conditions have not been read yet",)
        self._refused = ""

    def next_wake_s(self) -> float:
        """When a `Tick` is next needed, Unix seconds; infinity if only an event can change anything."""
        wakes = [self._deliveries.next_wake_s(), self._work_ends_s]
        if self._round is not None:
            if self._connected:
                wakes += [download.next_wake_s() for download in self._round.downloads]
            if self._round.phase in {"undecided", "waiting", "fetching"}:
                wakes.append(self._round.manifest.deadline_s)
        return min(wakes)

    @property
    def wants_to_train(self) -> bool:
        """Whether it matters now if the device may train."""
        return self._working_on != 0 or (self._round is not None and self._round.phase in {"waiting", "fetching"})

    @property
    def is_settled(self) -> bool:
        """Whether nothing is pending under the present name on the wire, so that it may change."""
        return not len(self._deliveries) and self._working_on == 0

    def view(self) -> SessionView:
        """What a person is told."""
        number = self._state.highest_round
        return SessionView(self._connected, self._doing(), number, self._refused, len(self._deliveries))

    def handle(self, event: Event, now_s: float, *, backlog: int = 0) -> list[Action]:
        """Take an event; the actions are to be executed in order.

        Args:
            event: what happened.
            now_s: Unix seconds.
            backlog: messages handed to the transport that the broker has not acknowledged.
        """
        actions = self._take(event, now_s)
        actions += self._give_up_what_is_over(now_s)
        actions += self._go_on(now_s)
        if self._connected and self._round is not None:
            for download in self._round.downloads:
                actions += download.ask_again(now_s)
        return actions + self._deliveries.due(now_s, backlog=backlog)

    def offline_presence(self) -> Publish:
        """The last will: what the broker says for this device when its connection dies."""
        return self._presence("offline")

    def _take(self, event: Event, now_s: float) -> list[Action]:
        """What follows from the event itself."""
        match event:
            case Connected():
                return self._connection_made(event, now_s)
            case Disconnected():
                self._connected = False
                self._deliveries.disconnected()
                return [Note("disconnected", {"reason": event.reason})]
            case Received():
                try:
                    return self._received(event, now_s)
                except ProtocolError as error:
                    return [Note("message_refused", {"topic": event.topic[:200], "reason": str(error)[:400]})]
            case ConditionsRead():
                self._blocked = event.blocked
            case RecordsCounted():
                return self._records_counted(event)
            case UpdateReady():
                self._work_is_over()
                self._deliveries.add(event.pending)
            case ParticipationEnded():
                self._work_is_over(event.reason)
                return [Note("participation_ended", {"round": event.round, "reason": event.reason})]
        return []

    def _presence(self, state: Literal["online", "offline"]) -> Publish:
        """This device's retained presence."""
        message = PresenceMsg(state=state, software=self._config.software)
        return Publish(state_topic(self._config.tenant, self._config.device), encode(message), retain=True)

    def _connection_made(self, event: Connected, now_s: float) -> list[Action]:
        """Subscribe anew; a download goes on with what is missing."""
        config = self._config
        try:
            self._deliveries.connected(event.maximum_packet_bytes)
        except LocalMisuseError as error:  # the server takes no packet that is large enough
            return [Note("broker_unusable", {"reason": str(error)})]
        self._connected = True
        actions: list[Action] = [
            Subscribe(down_filter(config.tenant, config.device)),
            Subscribe(round_topic(config.tenant, config.task)),
            self._presence("online"),
            Note("connected"),
        ]
        for download in self._round.downloads if self._round is not None else ():
            actions += download.start(now_s)
        return actions

    def _received(self, message: Received, now_s: float) -> list[Action]:
        """Route one message by its topic."""
        config = self._config
        if message.topic == round_topic(config.tenant, config.task):
            return self._manifest_came(message.payload, now_s)
        if message.topic == down_topic(config.tenant, config.device, "receipt"):
            return self._deliveries.receipt(verify(message.payload, ReceiptMsg, config.aggregator_key))
        if message.topic == down_topic(config.tenant, config.device, "nack"):
            return self._deliveries.nack(verify(message.payload, NackMsg, config.aggregator_key), now_s)
        for download in self._round.downloads if self._round is not None else ():
            if download.is_for(message.topic):
                return [*download.accept(message.payload, now_s), *self._fetched(now_s)]
        return []

    def _manifest_came(self, payload: bytes, now_s: float) -> list[Action]:
        """Decide about a manifest; a refused one is remembered for the wearer, and ends nothing that runs."""
        manifest = verify(payload, RoundManifestMsg, self._config.aggregator_key)
        if self._round is not None and encode(manifest) == encode(self._round.manifest):
            return []
        try:
            self._check_concerns_us(manifest)
        except FloorsError as error:
            self._refused = f"round {manifest.round}: {error}"
            raise
        self._refused = ""
        actions = self._leave_round()
        self._round = _Round(manifest)
        if manifest.round > self._state.highest_round:
            actions.append(self._remember(highest_round=manifest.round))
        return actions + (self._judge_work(manifest) if self._working_on else [])

    def _check_concerns_us(self, manifest: RoundManifestMsg) -> None:
        """Refuse a manifest that is not this study's, is old, is for another graph, or asks below the floors."""
        config = self._config
        if (manifest.tenant, manifest.task) != (config.tenant, config.task):
            raise ProtocolError(f"the manifest is for {manifest.tenant}/{manifest.task}")
        if manifest.round < self._state.highest_round:
            raise ProtocolError(f"round {manifest.round} is older than round {self._state.highest_round}: a replay")
        if manifest.graph_digest != config.graph_digest or manifest.num_parameters != config.num_parameters:
            raise ProtocolError("the manifest names another model graph than the installed bundle's")
        if manifest.status == "open" and config.role == "train":
            config.floors.check(manifest)

    def _decide(self, here: _Round, now_s: float) -> list[Action]:
        """Whether to take part in a round: decided once, and never under a clock that is plainly wrong."""
        manifest = here.manifest
        if self._config.role == "evaluate":
            here.phase = "waiting"
            return []
        if self._working_on:
            here.phase = "training"
            return []
        if manifest.status == "finished":
            self._idle("the study is finished")
            return []
        if now_s < manifest.opened_s - CLOCK_MARGIN_S:
            return []
        actions = self._toss(manifest, now_s) if manifest.round > self._state.decided_round else []
        if self._state.willing_round == manifest.round:
            here.phase = "waiting"
        elif here.phase == "undecided":
            self._idle("it was decided before the last start")
        return actions

    def _toss(self, manifest: RoundManifestMsg, now_s: float) -> list[Action]:
        """Toss this round's coin, once, and remember that it was tossed before anything follows from it."""
        state = self._state
        separation_s = max(manifest.minimum_separation_s, self._config.minimum_separation_s)
        willing = 0
        reason = ""
        if now_s >= manifest.deadline_s:
            reason = "its deadline has passed"
        # A participation that lies ahead was noted under a clock that has been set back since.
        elif state.participated_s and abs(now_s - state.participated_s) < separation_s:
            reason = "took part too recently"
        elif uniform(self._entropy) >= manifest.participation_probability:
            reason = "the coin said no"
        else:
            willing = manifest.round
        decided = self._remember(decided_round=manifest.round, willing_round=willing)
        if willing:
            return [decided]
        self._idle(reason)
        return [decided, Note("round_skipped", {"round": manifest.round, "reason": reason})]

    def _go_on(self, now_s: float) -> list[Action]:
        """Begin what was waited for, once the device may train."""
        if self._round is None:
            return []
        actions = self._decide(self._round, now_s) if self._round.phase == "undecided" else []
        if self._round.phase != "waiting" or self._blocked:
            return actions
        return actions + self._begin(now_s)

    def _begin(self, now_s: float) -> list[Action]:
        """Count the records first if the wearer wants that, then fetch the model."""
        if self._round is None:
            return []
        counts = self._config.counts_records and self._config.role == "train"
        if counts and self._state.counted_round < self._round.manifest.round:
            self._round.phase = "counting"
            return [self._remember(counted_round=self._round.manifest.round), CountRecords(self._round.manifest)]
        return self._fetch(now_s)

    def _records_counted(self, event: RecordsCounted) -> list[Action]:
        """Take part, or leave this round out."""
        if self._round is None or self._round.phase != "counting" or self._round.manifest.round != event.round:
            return []
        if not event.reason:
            self._round.phase = "waiting"
            return []
        self._idle(event.reason)
        skipped = Note("round_skipped", {"round": event.round, "reason": event.reason})
        return [self._remember(willing_round=0), skipped]

    def _fetch(self, now_s: float) -> list[Action]:
        """Begin to download the model, and the control variate if the plan wants one."""
        if self._round is None:
            return []
        manifest, config = self._round.manifest, self._config
        digests = [manifest.model_digest]
        if manifest.control_digest is not None and config.role == "train":
            digests.append(manifest.control_digest)
        # The first control variate and a first model of zeros are one and the same vector.
        self._round.phase = "fetching"
        self._round.downloads = [
            Download(
                tenant=config.tenant,
                digest=digest,
                num_parameters=config.num_parameters,
                key=config.aggregator_key,
                kept=self._kept.pop(digest, ()),
            )
            for digest in dict.fromkeys(digests)
        ]
        actions: list[Action] = [DropChunks(tuple(self._kept))] if self._kept else []  # of a model nobody wants now
        self._kept.clear()
        for download in self._round.downloads if self._connected else ():
            actions += download.start(now_s)
        return actions + self._fetched(now_s)

    def _fetched(self, now_s: float) -> list[Action]:
        """When everything is here, use it."""
        here = self._round
        if here is None or here.phase != "fetching" or not all(download.is_whole for download in here.downloads):
            return []
        try:
            vectors = [download.whole() for download in here.downloads]
        except ProtocolError as error:
            return [Note("model_refused", {"round": here.manifest.round, "reason": str(error)})]
        manifest, params = here.manifest, vectors[0]
        actions: list[Action] = [*self._stop_downloads(), Note("model_received", {"round": manifest.round})]
        if self._config.role == "evaluate":
            self._idle("it measures models and trains none")
            return [*actions, Evaluate(manifest, params)]
        if now_s >= manifest.deadline_s:
            self._idle("the model came too late")
            return [*actions, Note("round_skipped", {"round": manifest.round, "reason": "the model came too late"})]
        here.phase, self._working_on, self._work_ends_s = "training", manifest.round, manifest.deadline_s
        control = vectors[-1] if manifest.control_digest is not None else None
        return [
            *actions,
            self._remember(participated_s=now_s, willing_round=0),
            Participate(manifest, params, control),
        ]

    def _give_up_what_is_over(self, now_s: float) -> list[Action]:
        """A round whose deadline has passed is not waited or trained for any more."""
        actions: list[Action] = []
        if self._working_on and now_s >= self._work_ends_s:
            actions += self._abandon("the round's deadline has passed")
        here = self._round
        if here is not None and here.phase in {"waiting", "fetching"} and now_s >= here.manifest.deadline_s:
            if self._config.role == "train":
                reason = "its deadline passed while waiting: " + (", ".join(self._blocked) or "the model did not come")
                actions += [*self._leave_round(), self._remember(willing_round=0)]
                actions.append(Note("round_skipped", {"round": here.manifest.round, "reason": reason}))
                self._idle(reason)
        return actions

    def _judge_work(self, manifest: RoundManifestMsg) -> list[Action]:
        """What a new manifest means for what is being trained: it may have moved the deadline, or ended the round."""
        if manifest.round == self._working_on and manifest.status == "open":
            self._work_ends_s = manifest.deadline_s
            return []
        return self._abandon("the round was closed without this device")

    def _abandon(self, reason: str) -> list[Action]:
        """Give up what is being trained."""
        given_up = Abandon(self._working_on, reason)
        self._work_is_over(reason)
        return [given_up, Note("participation_ended", {"round": given_up.round, "reason": reason})]

    def _work_is_over(self, reason: str = "this device took part") -> None:
        """Nothing is being trained any more."""
        self._working_on, self._work_ends_s = 0, math.inf
        if self._round is not None and self._round.phase == "training":
            self._idle(reason)

    def _leave_round(self) -> list[Action]:
        """Stop fetching for a round that is over."""
        return self._stop_downloads() if self._round is not None and self._round.downloads else []

    def _stop_downloads(self) -> list[Action]:
        """Ask for no chunk any more, and keep none."""
        if self._round is None:
            return []
        actions = [action for download in self._round.downloads for action in download.stop()]
        digests = tuple(download.digest for download in self._round.downloads)
        self._round.downloads = []
        return [*actions, DropChunks(digests)]

    def _idle(self, reason: str) -> None:
        """Nothing is left to do in this round."""
        if self._round is not None:
            self._round.phase, self._round.why_idle = "idle", reason

    def _remember(self, **changes: float) -> Remember:
        """Change the state and have it stored."""
        self._state = replace(self._state, **changes)
        return Remember(self._state)

    def _doing(self) -> str:
        """What the session is about, in words."""
        here = self._round
        if here is None:
            return "waiting for the study's next round" if self._connected else "no connection to the broker"
        number = here.manifest.round
        if self._working_on:
            paused = f" (paused: {'; '.join(self._blocked)})" if self._blocked else ""
            return f"training for round {self._working_on}{paused}"
        if here.phase == "undecided":
            return f"this device's clock is behind the study's: round {number} was opened in its future"
        if here.phase == "waiting":
            return f"waiting to train for round {number}: {'; '.join(self._blocked) or 'ready'}"
        if here.phase in {"fetching", "counting"}:
            parts = [download.progress for download in here.downloads]
            have, count = sum(part[0] for part in parts), sum(part[1] or 1 for part in parts)
            return f"fetching the model of round {number}: {have} of {count} pieces"
        if here.manifest.status == "finished":
            return f"the study is finished, after round {number}"
        return f"not in round {number}: {here.why_idle}"


def _state_for(study: str, state: SessionState) -> SessionState:
    """The state of this study; round numbers of another one mean nothing here."""
    if state.study in {"", study}:
        return replace(state, study=study)
    return SessionState(study=study, participated_s=state.participated_s)
