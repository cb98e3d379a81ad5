"""The conversation with a study's enrolment desk, sans I/O: `handle(event, now_s) -> actions`.

Rules. The keys of a request, and its exact signed bytes, are durable before any of it is sent. The very same bytes are
sent again, sealed anew, ever more rarely, until an answer opens that the pinned aggregator has signed; what does not
open changes nothing, since anybody may send it. What was granted is durable before it is installed. `busy` and
`too_early` say when to ask again. Every other refusal ends the conversation and forgets nothing.

Whoever carries the actions out starts a session anew from what is durable when the disk refuses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from device_client.delivery import uniform
from device_client.events import Note, Publish, Subscribe, Tick, Unsubscribe
from device_client.joining.checks import NotTakenError, check_grant
from device_client.joining.records import (
    JoiningState,
    OpenRequest,
    Refusal,
    addressed,
    answer_key,
    with_grant_installed,
)
from fl_protocol.back_off import BackOff
from fl_protocol.errors import ProtocolError
from fl_protocol.integer_noise import Entropy
from fl_protocol.joining import EnrolmentAnswerMsg, opened_answer, sealed_request
from fl_protocol.recency import happened_within
from fl_protocol.renewal_proof import RenewalProofMsg
from fl_protocol.signing import public_key_from_hex
from fl_protocol.topics import enrolment_topic
from fl_protocol.transport import Received

SHORTEST_PAUSE_S = 4.0
LONGEST_PAUSE_S = 600.0
"""Between two sendings of a request that was not answered."""
LONGEST_WAIT_S = 86_400.0
"""However long the desk says to wait: a mistake of its clock must not send a device away for months."""
REQUEST_EXPIRES_S = 600


@dataclass(frozen=True)
class Online:
    """A connection to the desk is up, under this client id."""

    client: str


@dataclass(frozen=True)
class Offline:
    """It is gone."""


@dataclass(frozen=True)
class Prepared:
    """Names and their keys are durable.

    Args:
        names: the pseudonym request.
        proof: that a renewal of them comes from this device; None for a claim, and where no name is left to sign it.
    """

    names: bytes
    proof: RenewalProofMsg | None = None


@dataclass(frozen=True)
class Installed:
    """What was granted is installed, durably."""


@dataclass(frozen=True)
class NotInstalled:
    """It was not, and why."""

    reason: str


Event = Online | Offline | Prepared | Installed | NotInstalled | Received | Tick


@dataclass(frozen=True)
class Prepare:
    """Make names and their keys, forget those that nobody answered for, and say `Prepared`."""


@dataclass(frozen=True)
class Keep:
    """Durably replace what is kept."""

    state: JoiningState


@dataclass(frozen=True)
class Install:
    """Install a pseudonym answer, and say `Installed` or `NotInstalled`.

    Args:
        answer: a file's bytes.
        replaces: whether names of an enrolment that is over give way to the new ones.
    """

    answer: bytes = field(repr=False)
    replaces: bool


Action = Prepare | Keep | Install | Publish | Subscribe | Unsubscribe | Note


class JoiningSession:
    """See the module docstring.

    Args:
        state: what is durable.
        jitter: spreads what is sent again.
    """

    def __init__(self, state: JoiningState, *, jitter: Entropy) -> None:
        self.state = state
        self.dropped = ""
        """Why the last message that came in place of an answer was dropped; empty if none was."""
        self._jitter, self._back_off = jitter, BackOff(int(LONGEST_PAUSE_S / SHORTEST_PAUSE_S))
        self._client, self._asked_of_outside = "", False
        self._sent_s: float | None = None
        self._pause_s = 0.0
        self._handlers: dict[type, Callable[[Any, float], list[Action]]] = {
            Online: self._online,
            Offline: self._offline,
            Prepared: self._prepared,
            Installed: self._installed,
            NotInstalled: lambda event, now_s: self._stop("not_installed", event.reason, now_s),
            Received: self._received,
            Tick: lambda _event, now_s: self._go_on(now_s),
        }

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """What to do about an event, in this order.

        Args:
            event: what happened.
            now_s: Unix seconds, by a clock that may be set back or forward at any time.
        """
        return self._handlers[type(event)](event, now_s)

    @property
    def client(self) -> str:
        """The client id that it is online under; empty while it is not."""
        return self._client

    @property
    def is_asking(self) -> bool:
        """Whether a request is open that was not refused."""
        return self.state.request is not None and self.state.refusal is None

    def waits_s(self, now_s: float) -> float:
        """For how long there is nothing to send, in seconds; 0 if there is something now."""
        told = _left(self.state.wait_s, self.state.told_s, now_s)
        return max(told, _left(self._pause_s, self._sent_s, now_s))

    def is_told_to_wait(self, now_s: float) -> bool:
        """Whether the desk has said to come again later than now."""
        return _left(self.state.wait_s, self.state.told_s, now_s) > 0

    def takes(self, topic: str) -> bool:
        """Whether a message of this topic is for this session."""
        return bool(self._client) and topic == self._topic("answer")

    def _online(self, event: Online, now_s: float) -> list[Action]:
        """Subscribe, then ask: an answer must not come before somebody listens."""
        self._client, self._sent_s = event.client, None
        return [Subscribe(self._topic("answer")), *self._go_on(now_s)]

    def _offline(self, _event: Offline, _now_s: float) -> list[Action]:
        self._client = ""
        return []

    def _go_on(self, now_s: float) -> list[Action]:
        """The next thing that is due."""
        request = self.state.request
        if request is None or not self.is_asking or self._asked_of_outside:
            return []
        if request.granted:
            return self._install(request)
        if not request.names:
            self._asked_of_outside = True
            return [Keep(self.state), Prepare()]
        if not self._client or self.waits_s(now_s) > 0:
            return []
        return self._send(request, now_s)

    def _send(self, request: OpenRequest, now_s: float) -> list[Action]:
        """Send the request; what is sent is durable first."""
        actions: list[Action] = []
        if request.client != self._client or not request.signed:
            state = addressed(self.state, self._client)
            actions.append(self._keep(state))
            request = state.request or request
        claim, signed = self.state.claim, request.signed
        try:
            sealed = sealed_request(signed, claim.recipient, tenant=claim.tenant, task=claim.task, client=self._client)
        except ProtocolError as error:
            return [*actions, *self._stop("refused", str(error), now_s)]
        self._sent_s = now_s
        self._pause_s = SHORTEST_PAUSE_S * self._back_off.ended(now_s) * (0.5 + uniform(self._jitter))
        publish = Publish(self._topic("request"), sealed, expires_s=REQUEST_EXPIRES_S)
        return [*actions, publish, Note("enrolment_asked", {"request": hashlib.sha256(signed).hexdigest()[:16]})]

    def _prepared(self, event: Prepared, now_s: float) -> list[Action]:
        self._asked_of_outside = False
        request = self.state.request
        if request is None:
            return []
        prepared = replace(request, names=event.names, proof=event.proof, client="", signed=b"")
        return [self._keep(replace(self.state, request=prepared)), *self._go_on(now_s)]

    def _received(self, event: Received, now_s: float) -> list[Action]:
        """An answer, or what somebody passes off as one."""
        request = self.state.request
        if not self.takes(event.topic) or request is None or request.granted or request.client != self._client:
            return []
        claim = self.state.claim
        try:
            answer = opened_answer(
                event.payload,
                answer_key(claim, request),
                client=self._client,
                request_digest=hashlib.sha256(request.signed).digest(),
                aggregator=public_key_from_hex(claim.aggregator_key),
            )
        except ProtocolError as error:
            self.dropped = str(error)
            return [Note("enrolment_answer_dropped", {"reason": self.dropped})]
        return self._answered(request, answer, now_s)

    def _answered(self, request: OpenRequest, answer: EnrolmentAnswerMsg, now_s: float) -> list[Action]:
        """What the aggregator has signed."""
        if answer.outcome in {"busy", "too_early"}:
            wait_s = min(max(1.0, answer.retry_after_s), LONGEST_WAIT_S)
            self._back_off, self._pause_s = BackOff(int(LONGEST_PAUSE_S / SHORTEST_PAUSE_S)), 0.0
            keep = self._keep(replace(self.state, told_s=now_s, wait_s=wait_s))
            return [keep, Note("enrolment_later", {"outcome": answer.outcome, "wait_s": wait_s})]
        if not answer.is_granted or answer.pins is None:
            return self._stop(answer.outcome, answer.detail, now_s)
        try:
            check_grant(answer.names, self.state.claim, is_renewal=request.token is None)
        except NotTakenError as error:
            return self._stop(error.outcome, str(error), now_s)
        granted = replace(request, granted=answer.names, enrolled=answer.enrolment, pins=answer.pins)
        return [self._keep(replace(self.state, request=granted)), *self._install(granted)]

    def _install(self, request: OpenRequest) -> list[Action]:
        """Have a grant installed."""
        self._asked_of_outside = True
        return [Install(request.granted, replaces=request.replaces)]

    def _installed(self, _event: Installed, _now_s: float) -> list[Action]:
        self._asked_of_outside = False
        if self.state.request is None:
            return []
        topic = self._topic("answer") if self._client else ""
        outcome = "enrolled" if self.state.request.token is not None else "renewed"
        note = Note(f"enrolment_{outcome}", {"enrolment": self.state.request.enrolled})
        return [self._keep(with_grant_installed(self.state)), note, *([Unsubscribe(topic)] if topic else [])]

    def _stop(self, outcome: Any, detail: str, now_s: float) -> list[Action]:
        """Ask no more; everything is kept."""
        self._asked_of_outside = False
        keep = self._keep(replace(self.state, refusal=Refusal(outcome, detail, now_s)))
        return [keep, Note("enrolment_refused", {"outcome": outcome, "reason": detail})]

    def _keep(self, state: JoiningState) -> Keep:
        """Go on from another state, once it is durable."""
        self.state = state
        return Keep(state)

    def _topic(self, kind: Any) -> str:
        """Of this client."""
        return enrolment_topic(self.state.claim.tenant, self._client, kind)


def _left(duration_s: float, since_s: float | None, now_s: float) -> float:
    """What is left of a wait, in seconds; a clock that was set back ends it."""
    if since_s is None or not duration_s or not happened_within(duration_s, since_s, now_s):
        return 0.0
    return duration_s - (now_s - since_s)
