"""Deliveries on a line that takes its time: what a test tells them, and what they had sent when."""

from __future__ import annotations

import math
from collections.abc import Iterator

from device_client.delivery import Deliveries
from device_client.events import Action, Note, PendingUpdate, Publish
from fl_protocol.chunking import Reassembler
from fl_protocol.errors import RefusalReason
from fl_protocol.messages import ChunkMsg, NackMsg, decode
from fl_protocol.topics import parse_upload_topic
from tests.device_client.ports import DEVICE, TENANT
from tests.device_client.session_driver import seeded, some_update

DEADLINE_S = 10_000.0
YEARS_S = 10 * 365.25 * 86400.0
PACKET = 1024 + 256 + 500  # chunks of 500 bytes


def pending(number: int = 1, size: int = 3000) -> PendingUpdate:
    return some_update(number, size, deadline_s=DEADLINE_S)


def nack(update: PendingUpdate, reason: RefusalReason, **changes: object) -> NackMsg:
    fields = {"tenant": TENANT, "device": DEVICE, "update_id": update.update_id, "reason": reason}
    return NackMsg(**{**fields, **changes})  # type: ignore[arg-type]


def published(actions: list[Action]) -> list[Publish]:
    return [action for action in actions if isinstance(action, Publish)]


def events(actions: list[Action]) -> list[str]:
    return [action.event for action in actions if isinstance(action, Note)]


def indices(actions: list[Action]) -> list[int]:
    return [parse_upload_topic(message.topic).chunk_index for message in published(actions)]


def reassembled(messages: list[Publish]) -> bytes | None:
    whole, reassembler = None, Reassembler()
    for message in messages:
        chunk = decode(message.payload, ChunkMsg)
        topic = parse_upload_topic(message.topic)
        assert (topic.device, topic.update_id, topic.chunk_index) == (DEVICE, chunk.transfer_id, chunk.index)
        whole = reassembler.accept(chunk, 0.0) or whole
    return whole


class Line:
    """Deliveries on a line that takes a while for each message; time passes as it is told.

    Args:
        seconds_a_message: until the broker has acknowledged one; None for a broker that never does.
    """

    def __init__(
        self,
        *outbox: PendingUpdate,
        new: PendingUpdate | None = None,
        packet: int | None = PACKET,
        seconds_a_message: float | None = 0.0,
        subject: type[Deliveries] = Deliveries,
        seed: str = "jitter",
        now_s: float = 0.0,
    ) -> None:
        self.subject = subject(tenant=TENANT, entropy=seeded(seed), outbox=outbox)
        if new is not None:
            self.subject.add(new)
        self.now_s, self._each_s = now_s, seconds_a_message
        self._acks_s: list[float] = []
        self.log: list[tuple[float, Action]] = []
        self.most_waiting = 0
        self.subject.hold_large(hold=False)
        self.subject.connected(packet)

    @property
    def backlog(self) -> int:
        return len(self._acks_s)

    def next_s(self) -> float:
        """When something happens: an acknowledgement, or what the deliveries want to wake for."""
        return min([self.subject.next_wake_s(), *self._acks_s[:1]])

    def look(self) -> list[Action]:
        """Let them do what is due now."""
        while self._acks_s and self._acks_s[0] <= self.now_s:
            self._acks_s.pop(0)
        actions = self.subject.due(self.now_s, backlog=self.backlog)
        for _ in published(actions):
            last_s = self._acks_s[-1] if self._acks_s else self.now_s
            self._acks_s.append(math.inf if self._each_s is None else last_s + self._each_s)
        self.most_waiting = max(self.most_waiting, self.backlog)
        self.log += [(self.now_s, action) for action in actions]
        return actions

    def until(self, end_s: float) -> list[Action]:
        """Live until then."""
        before = len(self.log)
        self.look()
        while (at_s := self.next_s()) <= end_s:
            self.now_s = max(self.now_s, at_s)
            self.look()
        self.now_s = max(self.now_s, end_s)
        return [action for _, action in self.log[before:]]

    def sent(self) -> Iterator[tuple[float, int]]:
        """When which chunk was handed over."""
        for at_s, action in self.log:
            if isinstance(action, Publish):
                yield at_s, parse_upload_topic(action.topic).chunk_index

    def attempts_s(self) -> list[float]:
        return [
            at_s
            for at_s, action in self.log
            if isinstance(action, Note) and action.event in {"update_sent", "update_asked_about"}
        ]
