"""The helpers of secure rounds as the coordinator deals with them: the keys they publish, what they are asked, answers.

All comes over the broker, which is not trusted: a key, an answer or a refusal counts only if its helper's pinned
identity has signed it. What was asked is asked again until it is answered; helpers answer the same list with the same
bytes. Nothing here is durable: after a restart helpers are asked again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fl_protocol.chunking import Reassembler, split
from fl_protocol.errors import CoveyError, ProtocolError
from fl_protocol.limits import MAX_TRANSFER_BYTES, chunk_data_bytes
from fl_protocol.messages import ChunkMsg, RoundManifestMsg, decode, encode
from fl_protocol.recency import happened_within
from fl_protocol.secagg.messages import HelperKeyMsg, MaskSumMsg, UnmaskRefusalMsg, UnmaskRequestMsg
from fl_protocol.secagg.terms import HelperIdentity
from fl_protocol.signing import sign, verify
from fl_protocol.topics import (
    HelperTopic,
    helper_filters,
    helper_transfer_topic,
    is_helper_topic,
    parse_helper_topic,
)
from fl_protocol.transport import Received, Transport, TransportEvent

ASK_EVERY_S = 5.0
"""How long an answer is waited for before a helper is asked again."""

Note = Callable[..., None]
Listener = Callable[[HelperIdentity, bytes], bool]
"""Takes what a pinned helper is said to have said, untrusted, and tells whether it was meant for it."""


class HelperLink(Protocol):
    """A way to one helper that is not the broker."""

    @property
    def problem(self) -> str:
        """Why the helper cannot be reached, in words; empty if it can."""

    def ask(self, request: bytes) -> None:
        """Send a signed request for masks; returns at once."""

    def cosign(self, request: bytes) -> None:
        """Send a signed request to co-sign; returns at once."""

    def revoke(self, request: bytes) -> None:
        """Send who was thrown out; returns at once."""

    def poll(self) -> list[bytes]:
        """Signed keys, answers and refusals that have come."""


@dataclass(frozen=True)
class RoundAsked:
    """Which round's masks helpers are asked for."""

    task: str
    number: int
    manifest_digest: bytes


@dataclass
class _Call:
    """What one helper is asked, and what it has said.

    Args:
        request: signed.
        asked_s: when it was last asked, Unix seconds.
    """

    about: RoundAsked
    request: bytes
    asked_s: float = float("-inf")
    answer: MaskSumMsg | None = None
    refusal: str = ""


@dataclass
class _Helper:
    """One helper, as far as it is known."""

    identity: HelperIdentity
    key: HelperKeyMsg | None = None
    signed_key: bytes = b""
    transfers: Reassembler = field(default_factory=lambda: Reassembler(max_bytes=MAX_TRANSFER_BYTES, max_transfers=2))
    calls: dict[str, _Call] = field(default_factory=dict)


class HelperCalls:
    """See the module docstring.

    Args:
        tenant: name on the wire.
        helpers: that the configuration pins, by name.
        signing_key: the aggregator's.
        transport: the broker connection.
        note: tells the journal.
        now_s: Unix seconds.
        links: to helpers that are asked another way than over the broker, by name.

    Attributes:
        has_news: whether a key, an answer or a refusal has come since `look_after`.
    """

    def __init__(
        self,
        *,
        tenant: str,
        helpers: Mapping[str, HelperIdentity],
        signing_key: Ed25519PrivateKey,
        transport: Transport,
        note: Note,
        now_s: Callable[[], float],
        links: Mapping[str, HelperLink] | None = None,
    ) -> None:
        self._tenant, self._signing_key, self._transport = tenant, signing_key, transport
        self._note, self._now_s, self._links = note, now_s, dict(links or {})
        self._helpers = {name: _Helper(identity) for name, identity in helpers.items()}
        self._data_bytes = chunk_data_bytes(None)
        self._sought_s = float("-inf")
        self._listeners: list[Listener] = []
        self.has_news = False

    def listen(self, listener: Listener) -> None:
        """Have somebody else look at each answer and refusal first."""
        self._listeners.append(listener)

    def ask_to_cosign(self, helper: str, request: bytes) -> None:
        """Send a signed request to co-sign; returns at once, and is not asked again."""
        if helper in self._links:
            self._links[helper].cosign(request)
        else:
            self._publish(helper, request)

    def tell_of_revocations(self, helper: str, request: bytes) -> None:
        """Send who was thrown out; returns at once, and is not sent again."""
        if helper in self._links:
            self._links[helper].revoke(request)
        else:
            self._publish(helper, request)

    @property
    def names(self) -> tuple[str, ...]:
        """All helpers, in the order of the configuration."""
        return tuple(self._helpers)

    def connected(self, maximum_packet_bytes: int | None) -> None:
        """Subscribe, and ask again what is not answered. Raises LocalMisuseError: no chunk fits this server."""
        self._data_bytes = chunk_data_bytes(maximum_packet_bytes)
        if self._helpers:
            for topic_filter in helper_filters(self._tenant):
                self._transport.subscribe(topic_filter)
        self._sought_s = self._now_s()
        for helper in self._helpers.values():
            for call in helper.calls.values():
                call.asked_s = float("-inf")

    def take(self, events: Sequence[TransportEvent]) -> list[TransportEvent]:
        """Take what helpers say; the other events."""
        others: list[TransportEvent] = []
        for event in events:
            topic = self._topic_of(event)
            if topic is None or not isinstance(event, Received):
                others.append(event)
                continue
            try:
                self._hear(topic, event.payload)
            except CoveyError as error:
                self._note("helper_message_refused", helper=topic.helper, kind=topic.kind, reason=str(error))
            finally:
                self._transport.acknowledge(event)
        return others

    def keys(self, names: Sequence[str], *, until_s: float) -> tuple[tuple[bytes, ...], str]:
        """Signed keys of these helpers that hold until then; or none, and why.

        Args:
            names: of the helpers; empty for all.
            until_s: Unix seconds.
        """
        wanted = names or self.names
        if not wanted:
            return (), "the aggregator's configuration names no helper (helpers)"
        signed = []
        for name in wanted:
            helper = self._helpers.get(name)
            if helper is None:
                return (), f"the aggregator's configuration does not name helper {name}"
            if helper.key is None:
                return (), f"helper {name} has published no key; is covey-helper running?{self._problem(name)}"
            if helper.key.not_after_s < until_s:
                return (), f"the key of helper {name} ends before the round would; is covey-helper running?"
            signed.append(helper.signed_key)
        return tuple(signed), ""

    def signed(self, manifest: RoundManifestMsg) -> bytes:
        """A manifest as devices got it."""
        return sign(manifest, self._signing_key)

    def ask(self, about: RoundAsked, requests: Mapping[str, UnmaskRequestMsg]) -> None:
        """Ask helpers, by name, for the masks of a round; whatever else they were asked about its task is forgotten.

        Raises:
            ProtocolError: a helper is not configured any more, or a request is longer than a transfer.
        """
        unknown = [name for name in requests if name not in self._helpers]
        if unknown:
            raise ProtocolError(
                f"the configuration does not name helper {' and '.join(unknown)} of round {about.number} any more"
            )
        self.forget(about.task)
        signed = {name: sign(request, self._signing_key) for name, request in requests.items()}
        longest = max(map(len, signed.values()), default=0)
        if longest > MAX_TRANSFER_BYTES:
            raise ProtocolError(f"a request to a helper has {longest} bytes, and {MAX_TRANSFER_BYTES} can be sent")
        for name, request_bytes in signed.items():
            self._helpers[name].calls[about.task] = _Call(about, request_bytes)
        self.look_after()

    def forget(self, task: str) -> None:
        """A task's round is over."""
        for helper in self._helpers.values():
            helper.calls.pop(task, None)

    def is_asked(self, about: RoundAsked) -> bool:
        """Whether helpers are asked for this round's masks."""
        return any(about == call.about for _, call in self._calls(about.task))

    def answers(self, task: str) -> tuple[MaskSumMsg, ...] | None:
        """What all helpers have answered about a task's round; None as long as one has not."""
        found = [call.answer for _, call in self._calls(task)]
        answers = tuple(answer for answer in found if answer is not None)
        return answers if found and len(answers) == len(found) else None

    def refusal(self, task: str) -> str:
        """Why a helper will not answer about a task's round; empty if none has said so."""
        return "; ".join(f"helper {name} refuses: {call.refusal}" for name, call in self._calls(task) if call.refusal)

    def missing(self, task: str) -> str:
        """Which helpers have not answered about a task's round."""
        names = [name for name, call in self._calls(task) if call.answer is None]
        problems = "".join(self._problem(name) for name in names)
        return f"no answer of {' and '.join(names)} in time; are they running, and can they be reached?{problems}"

    def _problem(self, name: str) -> str:
        """What is wrong with a helper's own link."""
        problem = self._links[name].problem if name in self._links else ""
        return f" ({problem})" if problem else ""

    def look_after(self) -> None:
        """Ask again where an answer is overdue, and hear what has come another way than over the broker."""
        now_s, self.has_news = self._now_s(), False
        self._seek_keys(now_s)
        for name, helper in self._helpers.items():
            self._poll(name)
            for call in helper.calls.values():
                done = call.answer is not None or call.refusal
                if not done and not happened_within(ASK_EVERY_S, call.asked_s, now_s):
                    call.asked_s = now_s
                    self._send(name, call.request)

    def _seek_keys(self, now_s: float) -> None:
        """Have the broker send the retained keys again that have not come: no helper publishes one twice."""
        missing = any(helper.key is None for name, helper in self._helpers.items() if name not in self._links)
        if missing and not happened_within(ASK_EVERY_S, self._sought_s, now_s):
            self._sought_s = now_s
            self._transport.subscribe(helper_filters(self._tenant)[0])

    def _topic_of(self, event: TransportEvent) -> HelperTopic | None:
        """The helper's topic that a message came on; None for anything else."""
        # Nearly all that comes are uploads, and finding them not to be a helper's must cost nothing.
        if not isinstance(event, Received) or not is_helper_topic(event.topic, self._tenant):
            return None
        with suppress(ProtocolError):
            return parse_helper_topic(event.topic)
        return None

    def _calls(self, task: str) -> list[tuple[str, _Call]]:
        """What each helper was asked about a task's round."""
        return [(name, helper.calls[task]) for name, helper in self._helpers.items() if task in helper.calls]

    def _send(self, name: str, request: bytes) -> None:
        """Send a request in chunks, or over its own link."""
        if name in self._links:
            self._links[name].ask(request)
        else:
            self._publish(name, request)

    def _publish(self, name: str, request: bytes) -> None:
        """Send a request in chunks."""
        transfer_id = hashlib.sha256(request).digest()[:16]
        for chunk in split(transfer_id, request, data_bytes=self._data_bytes):
            topic = helper_transfer_topic(self._tenant, name, "request", transfer_id, chunk.index)
            self._transport.publish(topic, encode(chunk))

    def _poll(self, name: str) -> None:
        """What a helper's own link has brought."""
        if name not in self._links:
            return
        for message in self._links[name].poll():
            try:
                self._hear_either(self._helpers[name], message)
            except CoveyError as error:
                self._note("helper_message_refused", helper=name, kind="answer", reason=str(error))

    def _hear(self, topic: HelperTopic, payload: bytes) -> None:
        """Take one message. Raises ProtocolError, RefusedError."""
        helper = self._helpers.get(topic.helper)
        if helper is None or topic.tenant != self._tenant:
            raise ProtocolError("it is not one of the pinned helpers")
        match topic.kind:
            case "key":
                self._hear_key(helper, payload)
            case "answer":
                whole = helper.transfers.accept(decode(payload, ChunkMsg), self._now_s())
                if whole is not None and not self._is_heard(helper.identity, whole):
                    self._hear_answer(helper, verify(whole, MaskSumMsg, helper.identity.key))
            case "refusal" if not self._is_heard(helper.identity, payload):
                self._hear_refusal(helper, verify(payload, UnmaskRefusalMsg, helper.identity.key))
            case "request":
                raise ProtocolError("requests are for helpers")

    def _is_heard(self, helper: HelperIdentity, message: bytes) -> bool:
        """Whether somebody else has taken a message. Raises ProtocolError, as they do."""
        return any(listener(helper, message) for listener in self._listeners)

    def _hear_either(self, helper: _Helper, message: bytes) -> None:
        """An answer or a refusal, or a key. Raises ProtocolError."""
        if self._is_heard(helper.identity, message):
            return None
        key = helper.identity.key
        with suppress(ProtocolError):
            return self._hear_answer(helper, verify(message, MaskSumMsg, key))
        with suppress(ProtocolError):
            return self._hear_refusal(helper, verify(message, UnmaskRefusalMsg, key))
        return self._hear_key(helper, message)

    def _hear_key(self, helper: _Helper, signed: bytes) -> None:
        """A helper's key. Raises ProtocolError."""
        key = verify(signed, HelperKeyMsg, helper.identity.key)
        if (key.helper, key.operator) != (helper.identity.name, helper.identity.operator):
            raise ProtocolError(
                f"expected the key of {helper.identity.name} of {helper.identity.operator}, got one of {key.helper} "
                f"of {key.operator}"
            )
        if helper.key is None or key.not_after_s > helper.key.not_after_s:  # an old one may be replayed
            helper.key, helper.signed_key, self.has_news = key, signed, True
            self._note("helper_key", helper=key.helper, operator=key.operator, not_after_s=key.not_after_s)

    def _hear_answer(self, helper: _Helper, answer: MaskSumMsg) -> None:
        """A sum of masks. Raises ProtocolError: it is about nothing that was asked."""
        call = self._call_about(helper, answer)
        if call.answer is None:
            call.answer, call.refusal, self.has_news = answer, "", True

    def _hear_refusal(self, helper: _Helper, refusal: UnmaskRefusalMsg) -> None:
        """A helper will not answer. Raises ProtocolError: it is about nothing that was asked."""
        call = self._call_about(helper, refusal)
        if call.answer is None:
            call.refusal, self.has_news = f"{refusal.reason.value}: {refusal.detail}", True

    def _call_about(self, helper: _Helper, message: MaskSumMsg | UnmaskRefusalMsg) -> _Call:
        """What a message answers. Raises ProtocolError."""
        call = helper.calls.get(message.task)
        about = RoundAsked(message.task, message.round, message.manifest_digest)
        if (
            call is None
            or call.about != about
            or (message.helper, message.tenant) != (helper.identity.name, self._tenant)
        ):
            raise ProtocolError(f"round {message.round} of {message.task} was not asked for")
        return call
