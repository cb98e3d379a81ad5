"""One study's broker, as its helper sees it: requests come in chunks, answers go out in chunks, the key is retained.

The broker is not trusted: whatever comes is put together under caps, and counts only if the aggregator has signed it.
Nothing is waited for: who has no answer asks again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from aggregator.errors import DatabaseError
from aggregator.helper.answerer import Answerer, Reply
from aggregator.helper.key_ring import KeyRing
from aggregator.outage import Outage
from aggregator.throttle import Repetitions
from fl_protocol.adapters.journal import Journal
from fl_protocol.chunking import Reassembler, split
from fl_protocol.errors import LocalMisuseError, ProtocolError
from fl_protocol.limits import chunk_data_bytes
from fl_protocol.messages import ChunkMsg, decode, encode
from fl_protocol.topics import helper_request_filter, helper_topic, helper_transfer_topic, parse_helper_topic
from fl_protocol.transport import Connected, Disconnected, Received, Transport

MOST_EVENTS = 200
"""Taken from a connection before the others have their turn."""
FORGOTTEN_AFTER_S = 600.0
"""What half-received requests are kept for after their last chunk."""
TOLD_EVERY_S = 60.0
"""How often the journal is told of what is ignored; the rest is counted."""


@dataclass(frozen=True)
class HelperParts:
    """What all connections of one helper share.

    Args:
        name: of the helper.
        answerer: what answers.
        keys: whose announcement is published.
        journal: where events are told.
        now_s: Unix seconds.
        request_bytes: most that half-received requests of one study take.
    """

    name: str
    answerer: Answerer
    keys: KeyRing
    journal: Journal
    now_s: Callable[[], float]
    request_bytes: int


class StudyConnection:
    """See the module docstring.

    Args:
        tenant: the study.
        transport: its broker.
        parts: shared with the other studies.
    """

    def __init__(self, tenant: str, transport: Transport, parts: HelperParts) -> None:
        self.tenant, self._transport, self._parts = tenant, transport, parts
        self._requests = Reassembler(max_bytes=parts.request_bytes)
        self._maximum_packet_bytes: int | None = None
        self._is_connected = False
        self._outage = Outage(tenant, note=self._note, now_s=parts.now_s)
        self._ignored = Repetitions(TOLD_EVERY_S)

    def open(self) -> None:
        """Connect."""
        self._transport.open()

    def close(self) -> None:
        """Disconnect."""
        self._transport.close()

    def handle_pending(self) -> int:
        """Act on what has come, a bounded number of events; how many."""
        for handled in range(MOST_EVENTS):
            event = self._transport.poll(0.0)
            if event is None:
                return handled
            match event:
                case Connected():
                    self._on_connected(event)
                case Disconnected():
                    self._is_connected = False
                    self._note("disconnected", reason=event.reason)
                case Received():
                    self._on_message(event)
        return MOST_EVENTS

    def tidy(self) -> None:
        """Forget what nobody finishes, and tell what was left out."""
        self._requests.forget_before(self._parts.now_s() - FORGOTTEN_AFTER_S)
        for fields in self._ignored.overdue(self._parts.now_s()):
            self._note("request_ignored", **fields)

    def announce(self) -> None:
        """Publish the key, retained."""
        announcement = self._parts.keys.announcement
        if announcement is not None and self._is_connected:
            self._transport.publish(helper_topic(self.tenant, self._parts.name, "key"), announcement, retain=True)
            self._note("key_published", not_after_s=self._parts.keys.not_after_s)

    def _on_connected(self, event: Connected) -> None:
        """Everything anew: the broker may have forgotten all of it."""
        self._is_connected, self._maximum_packet_bytes = True, event.maximum_packet_bytes
        self._note("connected")
        self._transport.subscribe(helper_request_filter(self.tenant, self._parts.name))
        self.announce()

    def _on_message(self, message: Received) -> None:
        """A chunk of a request; whatever it is, it ends nothing but itself."""
        try:
            whole = self._take(message)
            if whole is not None:
                self._send(self._parts.answerer.answer(self.tenant, whole))
                self._outage.over()
        except (ProtocolError, LocalMisuseError) as error:
            told = self._ignored.tell((type(error).__name__, ""), {"reason": str(error)}, self._parts.now_s())
            if told is not None:
                self._note("request_ignored", **told)
        except DatabaseError as error:
            # Security: what may not be durable is not said.
            self._outage.failed(str(error))
        finally:
            self._transport.acknowledge(message)

    def _take(self, message: Received) -> bytes | None:
        """A whole request, if this was its last chunk. Raises ProtocolError."""
        topic = parse_helper_topic(message.topic)
        if topic[:3] != (self.tenant, self._parts.name, "request"):
            raise ProtocolError(f"expected requests to {self._parts.name}, got {message.topic[:120]!r}")
        chunk = decode(message.payload, ChunkMsg)
        if chunk.transfer_id != chunk.digest[:16]:
            raise ProtocolError("the transfer id is not the beginning of the request's digest")
        return self._requests.accept(chunk, self._parts.now_s())

    def _send(self, reply: Reply) -> None:
        """An answer in chunks, or a refusal."""
        if not reply.is_answer:
            self._transport.publish(helper_topic(self.tenant, self._parts.name, "refusal"), reply.data)
            return
        transfer_id = hashlib.sha256(reply.data).digest()[:16]
        for chunk in split(transfer_id, reply.data, data_bytes=chunk_data_bytes(self._maximum_packet_bytes)):
            topic = helper_transfer_topic(self.tenant, self._parts.name, "answer", transfer_id, chunk.index)
            self._transport.publish(topic, encode(chunk))

    def _note(self, event: str, **fields: object) -> None:
        """Write to the journal."""
        self._parts.journal.write(event, at_s=self._parts.now_s(), **{"tenant": self.tenant, **fields})
