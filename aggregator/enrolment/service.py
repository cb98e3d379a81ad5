"""The desk's process: takes sealed requests from its brokers, one message each, and answers each to its client.

Claims come from the claim broker, renewals from the study's own. What cannot be opened is dropped without a word:
whoever sent it holds no key to read an answer with. More than so many a minute are told to come again, each at a time
of its own, so that a fleet that was switched on at once is spread out. A task that is created while the desk runs is
taken up within seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.enrolment.desk import Desk
from aggregator.enrolment.enforcement import LOOK_EVERY_S, Enforcement
from aggregator.errors import AggregatorError, DatabaseError
from aggregator.outage import Outage
from fl_protocol.adapters.journal import Journal
from fl_protocol.errors import ConfigError, ProtocolError
from fl_protocol.joining import EnrolmentAnswerMsg, EnrolmentRequestMsg, StudyPins, opened_request, sealed_answer
from fl_protocol.recency import happened_within
from fl_protocol.sealing import RoundKey
from fl_protocol.topics import enrolment_request_filter, enrolment_topic, parse_enrolment_topic
from fl_protocol.transport import Connected, Disconnected, Received, Transport

LONGEST_WAIT_S = 0.2
"""How long one wait for events may take, so that stop requests are noticed soon."""
TASKS_EVERY_S = 5.0
"""How often it is looked whether there are other tasks; a device that was too early asks again after four seconds."""
ANSWER_EXPIRES_S = 600
"""After which the broker need not keep an answer that was not fetched: the device asks again, and gets the same."""


class Pacing:
    """How many requests are taken in a minute, and when the others should come again. Pure.

    Args:
        a_minute: how many; as many may come at once.
    """

    def __init__(self, a_minute: int) -> None:
        self._every_s, self._most = 60.0 / a_minute, float(a_minute)
        self._left, self._as_of_s, self._told_until_s = self._most, float("-inf"), float("-inf")

    def wait_s(self, now_s: float) -> float:
        """0 if a request is taken now; otherwise in how many seconds its turn is, another for each."""
        gained = max(0.0, now_s - self._as_of_s) / self._every_s
        self._left, self._as_of_s = min(self._most, self._left + gained), now_s
        if self._left >= 1:
            self._left -= 1
            return 0.0
        # A clock that was put back must not send anybody away for long.
        latest_s = now_s + 60 * self._most * self._every_s
        self._told_until_s = min(max(self._told_until_s, now_s) + self._every_s, latest_s)
        return self._told_until_s - now_s


class DeskKeys(NamedTuple):
    """What the desk opens requests with, and the aggregator's key, which signs its answers."""

    opens: RoundKey
    signs: Ed25519PrivateKey


class DeskService:
    """See the module docstring.

    Args:
        desk: decides.
        tenant: name on the wire.
        keys: of the desk.
        transports: to the claim broker, and to the study's.
        journal: where events are told.
        now_s: Unix seconds.
        pacing: of requests.
        wait: waits so many seconds at most for events of any transport; in virtual time it does nothing.
        enforcement: tells the broker who was revoked; None where nobody does.
        pins: what devices of each task pin, as the database has it now; None where the tasks never change.
    """

    def __init__(
        self,
        desk: Desk,
        *,
        tenant: str,
        keys: DeskKeys,
        transports: Sequence[Transport],
        journal: Journal,
        now_s: Callable[[], float],
        pacing: Pacing,
        wait: Callable[[float], None],
        enforcement: Enforcement | None = None,
        pins: Callable[[], Mapping[str, StudyPins]] | None = None,
    ) -> None:
        self._pins, self._tasks_s = pins, float("-inf")
        self._enforcement, self._looked_s = enforcement, float("-inf")
        self._desk, self._tenant, self._keys, self._transports = desk, tenant, keys, transports
        self._journal, self._now_s, self._pacing, self._wait = journal, now_s, pacing, wait
        self._outage = Outage("desk", note=self._note, now_s=now_s)

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Serve until `should_stop`."""
        self.start()
        while not should_stop():
            if not self.step():
                self._wait(LONGEST_WAIT_S)
        self.stop()

    def start(self) -> None:
        """Connect."""
        self._note("started")
        for transport in self._transports:
            transport.open()

    def step(self) -> int:
        """Act on what has come, on who was revoked and on new tasks; how many events that were."""
        self._enforce()
        self._take_up_tasks()
        return sum(self._take(transport) for transport in self._transports)

    def stop(self) -> None:
        """Disconnect."""
        for transport in self._transports:
            transport.close()
        self._note("stopped")

    def _enforce(self) -> None:
        """Have the broker know who was revoked, now and then."""
        if self._enforcement is None or happened_within(LOOK_EVERY_S, self._looked_s, self._now_s()):
            return
        self._looked_s = self._now_s()
        try:
            self._enforcement.look()
            self._outage.over()
        except DatabaseError as error:
            self._outage.failed(str(error))

    def _take_up_tasks(self) -> None:
        """Serve the tasks that there are by now."""
        if self._pins is None or happened_within(TASKS_EVERY_S, self._tasks_s, self._now_s()):
            return
        self._tasks_s = self._now_s()
        try:
            pins = dict(self._pins())
        except DatabaseError as error:
            self._outage.failed(str(error))
            return
        except (AggregatorError, ConfigError) as error:
            self._note("tasks_failed", reason=str(error))
            return
        if pins != self._desk.pins:
            self._note("tasks", tasks=sorted(pins))
            self._desk = replace(self._desk, pins=pins)

    def _take(self, transport: Transport) -> int:
        """What one transport has."""
        count = 0
        for event in _pending(transport):
            count += 1
            match event:
                case Connected():
                    transport.subscribe(enrolment_request_filter(self._tenant))
                    self._note("connected")
                case Disconnected():
                    self._note("disconnected", reason=event.reason)
                case Received():
                    self._handle(transport, event)
        return count

    def _handle(self, transport: Transport, event: Received) -> None:
        """Answer a request, or leave it: it will be sent again."""
        try:
            client = parse_enrolment_topic(event.topic, self._tenant)
            request, digest = self._opened(event.payload, client)
        except ProtocolError as error:
            self._note("request_dropped", reason=str(error)[:200])
            return
        try:
            answer = self._answer(request, digest)
        except DatabaseError as error:
            self._outage.failed(str(error))
            return
        self._outage.over()
        try:
            sealed = sealed_answer(answer, to=request.answer_to, client=client, key=self._keys.signs)
        except ProtocolError as error:
            self._note("request_dropped", reason=str(error)[:200])
            return
        topic = enrolment_topic(self._tenant, client, "answer")
        transport.publish(topic, sealed, expires_s=ANSWER_EXPIRES_S)

    def _opened(self, sealed: bytes, client: str) -> tuple[EnrolmentRequestMsg, bytes]:
        """A request for one of the studies here. Raises ProtocolError."""
        tasks = list(self._desk.pins)
        for task in tasks:
            try:
                return opened_request(sealed, self._keys.opens, tenant=self._tenant, task=task, client=client)
            except ProtocolError:
                if task == tasks[-1]:
                    raise
        raise ProtocolError("no study takes devices in here")

    def _answer(self, request: EnrolmentRequestMsg, digest: bytes) -> EnrolmentAnswerMsg:
        """What is answered, told in the journal. Raises DatabaseError."""
        now_s = self._now_s()
        wait_s = self._pacing.wait_s(now_s)
        if wait_s:
            detail = "many devices are asking at once; this one's turn is later"
            answer = EnrolmentAnswerMsg(request_digest=digest, outcome="busy", detail=detail, retry_after_s=wait_s)
        else:
            answer = self._desk.answer(request, digest, now_s=now_s)
        event = "request_granted" if answer.is_granted else "request_refused"
        self._note(event, outcome=answer.outcome, enrolment=answer.enrolment, request=digest.hex()[:16])
        return answer

    def _note(self, event: str, **fields: object) -> None:
        """Write to the journal."""
        self._journal.write(f"enrolment_{event}", at_s=self._now_s(), **fields)


def _pending(transport: Transport) -> Iterable[Connected | Disconnected | Received]:
    """What has come, without waiting."""
    while (event := transport.poll(0.0)) is not None:
        yield event
