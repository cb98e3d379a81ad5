"""The device's session with one study: what to do about each manifest, chunk, receipt and tick. A pure state machine.

`handle(event, now_s)` returns actions; it never sleeps, reads a clock, opens a file or touches a socket. Order of
checks on a manifest: signature and form, this study, not older than what was seen, this model graph, whether it asks
for devices like this one, the wearer's floors, and whether it can be carried out; only then is a coin tossed, once per
round. Then the device waits until it may train, fetches the model, checks it against its digest, and takes part, if it
still may; when the round is over before that, it gives up what it has begun. Work goes on for an earlier round as long
as its update would still count. Every message from the broker is hostile until verified; a bad one is noted and changes
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import zip_longest

from msgspec.structs import replace

from device_client.current_round import (
    CurrentRound,
    WrongModelError,
    counts_still,
    work_ends_s,
)
from device_client.delivery import Deliveries, uniform
from device_client.downloads import Download, Downloads
from device_client.events import (
    Abandon,
    Action,
    ConditionsRead,
    CountRecords,
    DropChunks,
    Evaluate,
    Event,
    ModelRead,
    Note,
    Participate,
    ParticipationEnded,
    PendingUpdate,
    Publish,
    ReadModel,
    ReasonRead,
    RecordsCounted,
    Remember,
    SessionState,
    Subscribe,
    Tick,
    UpdateReady,
)
from device_client.manifest_checks import check_concerns_us, missing_tags, refuse_replay
from device_client.model_supply import ModelSupply
from device_client.presence import Presence
from device_client.refusals import Refusals, printable
from device_client.session_config import Role, SessionConfig, SessionView
from fl_protocol.errors import LocalMisuseError, ProtocolError
from fl_protocol.integer_noise import Entropy
from fl_protocol.messages import (
    NackMsg,
    ReceiptMsg,
    RoundManifestMsg,
    StatisticsPlanMsg,
)
from fl_protocol.signing import verify
from fl_protocol.topics import down_filter, down_topic, round_topic
from fl_protocol.transport import Connected, Disconnected, Received

MODELS_A_ROUND = 4
"""How often one round may turn to a model: each is fetched, and there is one coin and one charge for all of them."""

_NOT_READ = ("the conditions have not been read yet",)

__all__ = ["DeviceSession", "Role", "SessionConfig", "SessionView"]


class DeviceSession:
    """See the module docstring.

    Args:
        config: who this device is.
        entropy: for the coin and for jitter.
        state: what was remembered.
        outbox: this study's updates that are not delivered.
        kept_chunks: by digest, what was kept of downloads.
        kept_model: digest of the model that was kept; empty if none.
        working_on: manifest of the round whose training was interrupted and goes on.
        downloads: begins a download.
    """

    def __init__(
        self,
        config: SessionConfig,
        *,
        entropy: Entropy,
        state: SessionState | None = None,
        outbox: Iterable[PendingUpdate] = (),
        kept_chunks: Mapping[bytes, Iterable[bytes]] | None = None,
        kept_model: bytes = b"",
        working_on: RoundManifestMsg | None = None,
        downloads: Downloads = Download,
    ) -> None:
        self._config = config
        self._entropy = entropy
        self._state = _state_for(f"{config.tenant}/{config.task}", state if state is not None else SessionState())
        self._deliveries = Deliveries(tenant=config.tenant, entropy=entropy, outbox=outbox)
        self._supply = ModelSupply(config, kept_chunks=kept_chunks, kept_model=kept_model, downloads=downloads)
        self._working_on = working_on
        self._work_ends_s = work_ends_s(working_on) if working_on is not None else math.inf
        # The newest open round, and its latest deadline.
        self._latest = (working_on.round, working_on.deadline_s) if working_on is not None else (0, math.inf)
        self._round: CurrentRound | None = None
        self._connected = False
        self._refusals = Refusals()
        self._presence = Presence(config)
        self._new_rounds_until_s = math.inf
        self._models = 0  # that the newest round was announced with, one after the other
        self._blocked: tuple[str, ...] = _NOT_READ
        self._refused = ""

    def next_wake_s(self) -> float:
        """When a `Tick` is next needed, Unix seconds; infinity if only an event can change anything."""
        wakes = [self._deliveries.next_wake_s(), self._work_ends_s]
        if self._round is not None:
            wakes.append(self._round.next_wake_s())
            if self._round.is_before_training:
                wakes.append(self._new_rounds_until_s)
            if self._connected:
                wakes += [download.next_wake_s() for download in self._round.downloads]
        return min(wakes)

    @property
    def wants_to_train(self) -> bool:
        """Whether it matters now if the device may train."""
        return self._working_on is not None or (self._round is not None and self._round.is_before_training)

    def take_new_rounds_until(self, time_s: float) -> None:
        """From then on, Unix seconds, only finish and deliver: what is new belongs to the next name on the wire."""
        self._new_rounds_until_s = time_s

    @property
    def has_heard(self) -> bool:
        """Whether the study's manifest has come since the start: what there is to do is known."""
        return self._round is not None

    @property
    def is_settled(self) -> bool:
        """Whether nothing is pending under the present name on the wire, so that it may change."""
        return not len(self._deliveries) and self._working_on is None

    @property
    def has_large_updates(self) -> bool:
        """Whether updates wait that are sent only if network and battery allow it."""
        return self._connected and self._deliveries.has_large

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
        actions += self._leave_to_next_name(now_s)
        if self._round is not None and self._round.phase == "undecided":
            actions += self._decide(self._round, now_s)
        actions += self._give_up_waiting(now_s)
        actions += self._go_on(now_s)
        actions += self._ask_again(now_s)
        return _remembering_once(actions) + self._deliveries.due(now_s, backlog=backlog)

    def offline_presence(self) -> Publish:
        """The last will: what the broker says for this device when its connection dies."""
        return self._presence.offline()

    def wants_reason(self, now_s: float) -> bool:
        """Whether it is time to look why the device is not training, for its presence."""
        return self._presence.is_due(now_s)

    def next_reason_s(self) -> float:
        """When what is found then could be told, Unix seconds; infinity for never."""
        return self._presence.due_s if self._connected else math.inf

    def _take(self, event: Event, now_s: float) -> list[Action]:
        """What follows from the event itself."""
        match event:
            case Connected():
                return self._connection_made(event, now_s)
            case Disconnected():
                self._connection_lost()
                return [Note("disconnected", {"reason": printable(event.reason, length=400)})]
            case Received():
                return self._received(event, now_s)
            case Tick():
                return []
            case _:
                return self._told(event, now_s)

    def _told(
        self,
        event: ConditionsRead | ReasonRead | RecordsCounted | ModelRead | UpdateReady | ParticipationEnded,
        now_s: float,
    ) -> list[Action]:
        """What follows from what the device itself found out or did."""
        match event:
            case ConditionsRead():
                self._deliveries.hold_large(hold=event.holds_uploads)
                return self._conditions_read(event.blocked, now_s)
            case ReasonRead():
                told = self._presence.take(event.reason, now_s)
                return [*told] if self._connected else []
            case RecordsCounted():
                return self._records_counted(event)
            case ModelRead():
                return self._model_read(event, now_s)
            case UpdateReady():
                self._work_is_over()
                self._deliveries.add(event.pending)
                if self._round is not None:
                    self._count_deliveries(self._round.manifest)
                return []
            case ParticipationEnded():
                self._work_is_over(event.reason)
                return [Note("participation_ended", {"round": event.round, "reason": event.reason})]

    def _connection_made(self, event: Connected, now_s: float) -> list[Action]:
        """Subscribe anew; a download goes on with what is missing."""
        config = self._config
        try:
            self._deliveries.connected(event.maximum_packet_bytes, receive_maximum=event.receive_maximum)
        except LocalMisuseError as error:  # the server takes no packet that is large enough
            self._connection_lost()
            return [Note("broker_unusable", {"reason": str(error)})]
        self._connected = True
        actions: list[Action] = [
            Subscribe(down_filter(config.tenant, config.device)),
            Subscribe(round_topic(config.tenant, config.task)),
            self._presence.online(),
            Note("connected"),
        ]
        if self._round is not None and not self._blocked:
            actions += self._round.start_downloads(now_s)
        return actions

    def _connection_lost(self) -> None:
        """Hold everything until the next connection."""
        self._connected = False
        self._deliveries.disconnected()

    def _conditions_read(self, blocked: tuple[str, ...], now_s: float) -> list[Action]:
        """A download rests while the device may not train: the network may be a metered one now."""
        was_blocked, self._blocked = bool(self._blocked), blocked
        if self._round is None or was_blocked == bool(blocked):
            return []
        if blocked:
            return self._round.stop_downloads()
        return self._round.start_downloads(now_s) if self._connected else []

    def _received(self, message: Received, now_s: float) -> list[Action]:
        """Take one message; a bad one is noted and changes nothing."""
        try:
            return self._verified(message, now_s)
        except ProtocolError as error:
            return self._refusals.note(
                self._kind_of(message.topic), topic=message.topic, reason=str(error), now_s=now_s
            )

    def _kind_of(self, topic: str) -> str:
        """Which of the few kinds of message a topic carries."""
        config = self._config
        if topic == round_topic(config.tenant, config.task):
            return "round"
        return "answer" if topic.startswith(down_filter(config.tenant, config.device)[:-1]) else "model"

    def _verified(self, message: Received, now_s: float) -> list[Action]:
        """Route one message by its topic."""
        config = self._config
        if message.topic == round_topic(config.tenant, config.task):
            return self._manifest_came(message.payload)
        if message.topic == down_topic(config.tenant, config.device, "receipt"):
            return self._deliveries.receipt(verify(message.payload, ReceiptMsg, config.aggregator_key))
        if message.topic == down_topic(config.tenant, config.device, "nack"):
            return self._deliveries.nack(verify(message.payload, NackMsg, config.aggregator_key), now_s)
        for download in self._round.downloads if self._round is not None else ():
            if download.is_for(message.topic):
                return download.accept(message.topic, message.payload, now_s)
        return []

    def _manifest_came(self, payload: bytes) -> list[Action]:
        """Decide about a manifest; a refused one is remembered for the wearer, and ends nothing that runs."""
        manifest = verify(payload, RoundManifestMsg, self._config.aggregator_key)
        self._check_is_ours_and_new(manifest)
        try:
            check_concerns_us(manifest, self._config)
        except ProtocolError as error:
            self._refused = printable(f"round {manifest.round}: {error}", length=400)
            raise
        self._refused = ""
        actions: list[Action] = []
        if self._round is not None and self._round.is_same_as(manifest):
            self._round.manifest = manifest  # what was decided, counted and fetched stays
        else:
            actions += self._next_round(manifest)
        if manifest.status == "open":
            self._latest = (manifest.round, manifest.deadline_s)
        self._count_deliveries(manifest)
        actions += self._remember_round(manifest)
        return actions + (self._judge_work(manifest, self._working_on) if self._working_on is not None else [])

    def _count_deliveries(self, manifest: RoundManifestMsg) -> None:
        """Updates on their way are offered until the deadline of the newest round that counts them."""
        if manifest.status == "open":
            self._deliveries.count_until(manifest.deadline_s, since_round=manifest.round - manifest.maximum_staleness)

    def _remember_round(self, manifest: RoundManifestMsg) -> list[Action]:
        """How far the study has come, durably: no older manifest is taken up again, nor this round once it is over."""
        before, highest = self._state, max(manifest.round, self._state.highest_round)
        after = replace(before, highest_round=highest)
        if manifest.status != "open":
            after = replace(after, decided_round=max(before.decided_round, highest), willing_round=0)
        self._state = after
        return [Remember(after)] if after != before else []

    def _next_round(self, manifest: RoundManifestMsg) -> list[Action]:
        """Turn to a manifest of another round, or of another model for the same one; to a few of those only."""
        actions, before = self._round.end_downloads() if self._round is not None else [], self._round
        is_again = before is not None and before.manifest.round == manifest.round and manifest.status == "open"
        self._models = self._models + 1 if is_again else 1
        self._round = CurrentRound(manifest, trains=self._config.role == "train")
        if self._models > MODELS_A_ROUND and not self._works_on(manifest.round):
            self._idle(f"the study named a model for it more than {MODELS_A_ROUND} times")
        return actions

    def _check_is_ours_and_new(self, manifest: RoundManifestMsg) -> None:
        """Refuse a manifest that is another study's, or a replay."""
        refuse_replay(
            manifest,
            self._config,
            highest_round=self._state.highest_round,
            newest=self._round.manifest if self._round is not None else None,
            latest=self._latest,
        )

    def _decide(self, here: CurrentRound, now_s: float) -> list[Action]:
        """Whether to take part in a round: decided once, and never under a clock that is plainly wrong."""
        manifest = here.manifest
        if reason := self._why_nothing_to_do(manifest):
            self._idle(reason)
            return []
        if self._config.role == "evaluate":
            self._wait(here)
            return []
        if self._working_on is not None:
            here.phase = "training" if self._works_on(manifest.round) else "busy"
            return []
        if missing := missing_tags(manifest, self._config):
            return self._skip(here, f"it asks for devices with {', '.join(missing)}")
        if now_s < here.clock_is_plausible_from_s:
            return []
        actions = self._toss(here, now_s) if manifest.round > self._state.decided_round else []
        if self._state.willing_round == manifest.round:
            self._wait(here)
        elif here.phase == "undecided":
            self._idle("it was decided before the last start")
        return actions

    def _why_nothing_to_do(self, manifest: RoundManifestMsg) -> str:
        """What leaves nothing to do for a device of this role, in words; empty if there is something."""
        only_measures = self._config.role == "evaluate"
        if manifest.status in {"paused", "aborted"} or (manifest.status == "finished" and not only_measures):
            return f"the study is {manifest.status}"
        if only_measures and isinstance(manifest.plan, StatisticsPlanMsg):
            return "it asks for statistics, and this device only measures models"
        return ""

    def _skip(self, here: CurrentRound, reason: str) -> list[Action]:
        """Leave a round out, and say why to the wearer only."""
        self._idle(reason)
        return [Note("round_skipped", {"round": here.manifest.round, "reason": reason})]

    def _leave_to_next_name(self, now_s: float) -> list[Action]:
        """No coin and no training under a name whose time is over; what was decided and fetched stays for the next."""
        here = self._round
        if here is None or self._working_on is not None or now_s < self._new_rounds_until_s:
            return []
        if here.phase != "undecided" and not here.is_before_training:
            return []
        actions, here.downloads = here.stop_downloads(), []
        self._idle("it is left to this device's next name on the wire")
        return actions

    def _wait(self, here: CurrentRound) -> None:
        """Wait until the device may train: the last reading may be hours old, from when that last mattered."""
        here.phase, self._blocked = "waiting", _NOT_READ

    def _toss(self, here: CurrentRound, now_s: float) -> list[Action]:
        """Toss this round's coin, once, and remember that it was tossed before anything follows from it."""
        manifest = here.manifest
        # What was asked for once holds: an account is only as good as what its devices keep to.
        asked_s = max(manifest.minimum_separation_s, self._state.separation_s)
        asked = least_of(manifest.most_participations, self._state.most_participations)
        reason = here.why_not(
            now_s,
            participated_s=self._state.participated_s,
            separation_s=max(asked_s, self._config.minimum_separation_s),
            participations=self._state.participations,
            most=least_of(asked, self._config.maximum_participations),
        )
        if not reason and uniform(self._entropy) >= manifest.participation_probability:
            reason = "the coin said no"
        willing = 0 if reason else manifest.round
        decided = self._remember(
            decided_round=manifest.round, willing_round=willing, most_participations=asked, separation_s=asked_s
        )
        return [decided] if willing else [decided, *self._skip(here, reason)]

    def _go_on(self, now_s: float) -> list[Action]:
        """Begin what was waited for, once the device may train."""
        here, actions = self._round, list[Action]()
        if here is None or self._blocked:
            return actions
        if here.phase == "waiting":
            actions += self._begin(here, now_s)
        if here.is_fetched:
            actions += self._use(here, now_s)
        return actions

    def _begin(self, here: CurrentRound, now_s: float) -> list[Action]:
        """Count the records first if the wearer wants that, then fetch the model."""
        counts = self._config.counts_records and self._config.role == "train"
        if counts and self._state.counted_round < here.manifest.round:
            here.phase = "counting"
            # Each count is charged, so there is one a round; if its outcome is lost, the round is left out.
            remembered = self._remember(counted_round=here.manifest.round, willing_round=0)
            return [remembered, CountRecords(here.manifest)]
        return self._fetch(here, now_s)

    def _records_counted(self, event: RecordsCounted) -> list[Action]:
        """Take part, or leave this round out."""
        here = self._round
        if here is None or here.phase != "counting" or here.manifest.round != event.round:
            return []
        if not event.reason:
            here.phase = "waiting"
            return [self._remember(willing_round=event.round)]
        return self._skip(here, event.reason)

    def _fetch(self, here: CurrentRound, now_s: float) -> list[Action]:
        """Begin to download what the round needs."""
        actions = self._supply.begin(here)
        return actions + (here.start_downloads(now_s) if self._connected else [])

    def _ask_again(self, now_s: float) -> list[Action]:
        """Ask again for what does not come; if it is a delta, in the end for the model."""
        here = self._round
        if not self._connected or here is None:
            return []
        actions = [action for download in here.downloads for action in download.ask_again(now_s)]
        if self._supply.delta_fails_to_come(here):
            actions += self._fetch_whole(here, "the delta did not come", now_s)
        return actions

    def _fetch_whole(self, here: CurrentRound, reason: str, now_s: float) -> list[Action]:
        """What was kept does not lead to the model."""
        return self._supply.without_kept(here, reason, now_s, asks=self._connected and not self._blocked)

    def _model_read(self, event: ModelRead, now_s: float) -> list[Action]:
        """Go on from the kept model, or without it."""
        here = self._round
        if here is None or here.phase != "reading" or event.digest != here.route.base:
            return []
        try:
            here.take_kept(event.params)
        except WrongModelError as error:
            return self._fetch_whole(here, str(error), now_s)
        return []

    def _use(self, here: CurrentRound, now_s: float) -> list[Action]:
        """Everything is here, and the device may train: take part, or measure."""
        manifest = here.manifest
        if here.route.base and here.model is None:
            here.phase = "reading"
            return [ReadModel(here.route.base)]
        try:
            params, control = here.vectors()
        except WrongModelError as error:
            refused = Note("model_refused", {"round": manifest.round, "reason": str(error)})
            return [DropChunks((error.digest,)), refused]
        num_bytes = sum(download.total_bytes for download in here.downloads)
        received = Note("model_received", {"round": manifest.round, "bytes": num_bytes})
        actions: list[Action] = [*here.end_downloads(), received]
        if self._config.role == "evaluate":
            self._idle("it measures models and trains none")
            return [*actions, Evaluate(manifest, params), *self._supply.keep(here, params)]
        here.phase, self._working_on, self._work_ends_s = "training", manifest, work_ends_s(manifest)
        return [
            *actions,
            self._remember(participated_s=now_s, willing_round=0, participations=self._state.participations + 1),
            Participate(manifest, params, control),
            *self._supply.keep(here, params),
        ]

    def _give_up_what_is_over(self, now_s: float) -> list[Action]:
        """A round whose deadline has passed is not trained for any more."""
        if self._working_on is None or now_s < self._work_ends_s:
            return []
        return self._abandon(self._working_on, "the round's deadline has passed")

    def _give_up_waiting(self, now_s: float) -> list[Action]:
        """Nor waited for."""
        here = self._round
        if here is None or now_s < here.gives_up_at_s:
            return []
        reason = "its deadline passed while waiting: " + ("; ".join(self._blocked) or "the model did not come")
        return [*here.end_downloads(), self._remember(willing_round=0), *self._skip(here, reason)]

    def _judge_work(self, manifest: RoundManifestMsg, work: RoundManifestMsg) -> list[Action]:
        """What a new manifest means for what is being trained: it may have moved the deadline, or ended the round."""
        if not counts_still(work, manifest):
            return self._abandon(work, "the round was closed without this device")
        if manifest.status == "open" and manifest.round == work.round:
            self._work_ends_s = work_ends_s(manifest)
        return []

    def _abandon(self, work: RoundManifestMsg, reason: str) -> list[Action]:
        """Give up what is being trained."""
        self._work_is_over(reason)
        return [
            Abandon(work.round, reason),
            Note("participation_ended", {"round": work.round, "reason": reason}),
        ]

    def _works_on(self, number: int) -> bool:
        """Whether this very round is being trained."""
        return self._working_on is not None and self._working_on.round == number

    def _work_is_over(self, reason: str = "this device took part") -> None:
        """Nothing is being trained any more."""
        self._working_on, self._work_ends_s = None, math.inf
        if self._round is not None and self._round.phase == "training":
            self._idle(reason)
        elif self._round is not None and self._round.phase == "busy":
            self._round.phase = "undecided"  # its turn has come

    def _idle(self, reason: str) -> None:
        """Nothing is left to do in this round."""
        if self._round is not None:
            self._round.idle(reason)

    def _remember(self, **changes: float | None) -> Remember:
        """Change the state and have it stored."""
        self._state = replace(self._state, **changes)
        return Remember(self._state)

    def _doing(self) -> str:
        """What the session is about, in words."""
        here = self._round
        if here is None:
            return "waiting for the study's next round" if self._connected else "no connection to the broker"
        if self._working_on is not None and here.phase != "training":
            return f"training for round {self._working_on.round}"
        return here.in_words(self._blocked)


def _remembering_once(actions: list[Action]) -> list[Action]:
    """Of states that would be stored one directly after the other only the last: each write wears the flash."""
    if len(actions) < 2:
        return actions
    return [
        action
        for action, after in zip_longest(actions, actions[1:])
        if not (isinstance(action, Remember) and isinstance(after, Remember))
    ]


def least_of(*limits: int | None) -> int | None:
    """The smallest of those that are given."""
    return min((limit for limit in limits if limit is not None), default=None)


def _state_for(study: str, state: SessionState) -> SessionState:
    """The state of this study; round numbers of another one mean nothing here."""
    if state.study in {"", study}:
        return replace(state, study=study)
    return SessionState(study=study, participated_s=state.participated_s)
