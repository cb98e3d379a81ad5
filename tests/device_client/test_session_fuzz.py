"""Whatever a broker sends, in whatever order: nothing is raised, little is kept, and only what was signed is done.

``python -m tests.device_client.test_session_fuzz --cases 200000`` runs as many cases as wanted; pytest runs
``COVEY_FUZZ_CASES`` (default 1,500), the same every time. A case is one script of up to about a hundred events.
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
import time
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from device_client import session as session_module
from device_client.current_round import CurrentRound
from device_client.delivery import Deliveries
from device_client.downloads import WINDOW, Download
from device_client.events import (
    Abandon,
    Action,
    ConditionsRead,
    CountRecords,
    Discard,
    Evaluate,
    KeepChunk,
    Note,
    Participate,
    ParticipationEnded,
    PendingUpdate,
    Publish,
    RecordsCounted,
    Remember,
    Subscribe,
    Unsubscribe,
    UpdateReady,
)
from device_client.floors import Floors
from device_client.session import DeviceSession
from fl_protocol.errors import ProtocolError
from fl_protocol.messages import ChunkMsg, RoundManifestMsg, SignedMsg, decode, encode
from fl_protocol.signing import verify
from fl_protocol.topics import down_filter, round_topic, state_topic, upload_topic
from fl_protocol.transport import Connected, Disconnected, Received
from tests.device_client.hostile_broker import EARLIER, FLOORS, ROUNDS, WAITS_S, Script, good, next_event, update_of
from tests.device_client.ports import DEVICE, GRAPH_DIGEST, TASK, TENANT
from tests.device_client.session_driver import (
    AGGREGATOR,
    NUM_PARAMETERS,
    Disk,
    Driver,
    chunk_message,
    model_chunks,
    seeded,
    some_update,
)

CASES = int(os.environ.get("COVEY_FUZZ_CASES", "1500"))
SCRIPTS = st.binary(min_size=80, max_size=320)
MOST_HELD_BYTES = 90_000
"""Of a session: four updates in the outbox (13 kB), one of them in chunks, two vectors of 1,600 bytes, and objects."""


@dataclass
class Watch:
    """A device lived through a script, and what must hold after every event; it is restarted from its disk at times.

    Args:
        reached: how often the interesting was reached, over many cases.
    """

    script: Script
    reached: collections.Counter[str]
    signed: set[bytes] = field(default_factory=set)
    outcomes: dict[int, str] = field(default_factory=dict)
    counted: set[int] = field(default_factory=set)
    enough: set[int] = field(default_factory=set)
    discarded: set[bytes] = field(default_factory=set)
    subscribed: set[str] = field(default_factory=set)
    working: RoundManifestMsg | None = None
    highest: int = 0
    may_train: bool = False
    subject: type[DeviceSession] = DeviceSession

    def live(self) -> None:
        """All of it."""
        settings_byte = self.script.byte()
        self.role = "evaluate" if settings_byte % 8 == 0 else "train"
        self.counts_records = settings_byte % 8 in {1, 2}
        earlier = [update_of(number) for number in EARLIER[: settings_byte // 8 % 3]]
        self.driver = self._start(Disk(updates={update.update_id: update for update in earlier}), now_s=1100.0)
        if settings_byte < 224:  # most lives begin in order, to come further
            self.tell(Connected(), backlog=0)
            self.tell(ConditionsRead(()), backlog=0)
        round_number = 1
        while not self.script.is_over:
            wait = self.script.byte()
            self.driver.now_s = max(0.0, self.driver.now_s + WAITS_S[wait if wait < 16 else 0])
            if wait == 255:
                self.driver = self._start(self.driver.disk, now_s=self.driver.now_s)
                continue
            if wait in range(250, 255):
                round_number = min(round_number + 1, ROUNDS[-1])
            self.tell(self._event(round_number), backlog=0 if wait < 220 else wait - 220)
        assert held_bytes(self.driver.session) < MOST_HELD_BYTES
        assert sum(len(parts) for parts in self.driver.disk.chunks.values()) <= 8

    def _start(self, disk: Disk, *, now_s: float) -> Driver:
        """A process on a disk; its transport makes its own connection."""
        self.subscribed.clear()
        self.may_train = False
        return Driver(
            role=self.role,  # type: ignore[arg-type]
            floors=FLOORS,
            counts_records=self.counts_records,
            entropy=seeded(f"{len(self.outcomes)} {self.script.position}"),
            disk=disk,
            now_s=now_s,
            working_on=self.working,
            blocked=None,
            connects=False,
            subject=self.subject,
        )

    def _event(self, round_number: int) -> object:
        """From the broker, or from the device itself: an update is ready only if one was trained."""
        event = next_event(
            self.script,
            round_number=round_number,
            subscribed=sorted(self.subscribed),
            pending=list(self.driver.disk.updates),
        )
        if isinstance(event, ParticipationEnded) and self.working is not None and event.round % 2:
            number = self.working.round
            self.working = None
            return UpdateReady(update_of(number)) if number in ROUNDS else event
        return event

    def tell(self, event: object, *, backlog: int) -> None:
        """Hand over one event and hold every action against what is allowed."""
        self._note(event)
        self.reached[type(event).__name__] += 1
        actions = self.driver.tell(event, backlog=backlog)
        self.driver.actions.clear()
        assert len(actions) < 120
        for action in actions:
            self._check(action)
        wake_s = self.driver.session.next_wake_s()
        assert wake_s > self.driver.now_s, "the daemon would spin"
        assert len(self.driver.session.view().doing) < 500

    def _note(self, event: object) -> None:
        """What the event allows."""
        match event:
            case Received() if event.topic == round_topic(TENANT, TASK):
                try:
                    self.signed.add(encode(verify(event.payload, RoundManifestMsg, AGGREGATOR.public_key())))
                except ProtocolError:
                    return
            case Connected() | Disconnected():
                self.subscribed.clear()
            case ConditionsRead():
                self.may_train = not event.blocked
            case RecordsCounted() if not event.reason and event.round in self.counted:
                self.enough.add(event.round)
            case ParticipationEnded():
                self.working = None

    def _check(self, action: Action) -> None:
        """One action."""
        self.reached[type(action).__name__] += 1
        match action:
            case Participate() | Evaluate():
                self._check_use(action)
            case CountRecords():
                assert self.counts_records
                assert self.may_train
                assert action.manifest.round not in self.counted, "each count is charged"
                self.counted.add(action.manifest.round)
            case Abandon():
                assert self.working is not None
                assert action.round == self.working.round
                self.working = None
            case Remember():
                assert action.state.highest_round >= self.highest
                self.highest = action.state.highest_round
            case KeepChunk():
                chunk = verify(action.payload, ChunkMsg, AGGREGATOR.public_key())
                assert (chunk.digest, chunk.index) == (action.digest, action.index)
            case Discard():
                self.discarded.add(action.update_id)
            case Note():
                self._check_note(action)
            case Publish() | Subscribe() | Unsubscribe():
                self._check_wire(action)

    def _check_use(self, action: Participate | Evaluate) -> None:
        """A model is used only for a manifest that was signed, of this study; and trained only within the floors."""
        manifest = action.manifest
        assert encode(manifest) in self.signed
        assert (manifest.tenant, manifest.task) == (TENANT, TASK)
        assert (manifest.graph_digest, manifest.num_parameters) == (GRAPH_DIGEST, NUM_PARAMETERS)
        assert self.may_train
        assert action.params.tobytes() in MODELS
        if isinstance(action, Evaluate):
            assert self.role == "evaluate"
            return
        assert self.role == "train"
        assert manifest.status == "open"
        assert FLOORS_HOLD(manifest)
        assert self.outcomes.setdefault(manifest.round, "trained once") == "trained once"
        self.outcomes[manifest.round] = "trained"
        assert not self.counts_records or manifest.round in self.enough
        self.working = manifest

    def _check_note(self, note: Note) -> None:
        """A coin that said no is not tossed again; what is told stays short."""
        self.reached[note.event] += 1
        assert sum(len(str(value)) for value in note.fields.values()) < 1000
        if note.fields.get("reason") == "the coin said no":
            number = int(note.fields["round"])
            assert number not in self.outcomes
            self.outcomes[number] = "stayed out"

    def _check_wire(self, action: Publish | Subscribe | Unsubscribe) -> None:
        """Only this device's own topics, and no more at a time than the window."""
        if isinstance(action, Publish):
            parts = action.topic.split("/")
            if action.topic == state_topic(TENANT, DEVICE):
                return
            update_id = bytes.fromhex(parts[6])
            assert action.topic == upload_topic(TENANT, DEVICE, update_id, int(parts[7]))
            assert update_id not in self.discarded, "sent after it was let go"
            assert action.expires_s is not None
            assert 1 <= action.expires_s < 2**32
            return
        own = {down_filter(TENANT, DEVICE), round_topic(TENANT, TASK)}
        assert action.topic_filter in own or action.topic_filter.startswith(f"fl/v1/{TENANT}/model/")
        assert "+" not in action.topic_filter or action.topic_filter in own
        if isinstance(action, Subscribe):
            self.subscribed.add(action.topic_filter)
        else:
            self.subscribed.discard(action.topic_filter)
        assert len(self.subscribed) <= 2 + 2 * (WINDOW + 1)


def floors_hold(manifest: RoundManifestMsg) -> bool:
    """Written anew here, so that a device without the check is caught."""
    plan = manifest.plan
    return plan.noise_multiplier >= 2.0 and manifest.minimum_cohort >= 2 and plan.l2_norm_clip <= 1.5


FLOORS_HOLD = floors_hold
MODELS = {b"".join(chunk.data for chunk in model_chunks())}


def held_bytes(subject: object, seen: set[int] | None = None) -> int:
    """Bytes of everything an object keeps, its pinned key and configuration aside."""
    seen = set() if seen is None else seen
    if id(subject) in seen or isinstance(subject, type) or callable(subject):
        return 0
    seen.add(id(subject))
    size = sys.getsizeof(subject)
    if isinstance(subject, dict):
        return size + sum(held_bytes(part, seen) for item in subject.items() for part in item)
    if isinstance(subject, list | tuple | set | collections.deque):
        return size + sum(held_bytes(part, seen) for part in subject)
    fields = getattr(subject, "__dict__", None) or {
        name: getattr(subject, name) for name in getattr(subject, "__struct_fields__", ())
    }
    return size + sum(held_bytes(part, seen) for part in fields.values())


def check_script(data: bytes, reached: collections.Counter[str], subject: type[DeviceSession] = DeviceSession) -> None:
    """One case."""
    reached["cases"] += 1
    Watch(Script(data), reached, subject=subject).live()


def fuzz(cases: int, *, seed_number: int | None) -> collections.Counter[str]:
    """As many cases as wanted, the same ones for the same seed; how often the interesting was reached."""
    reached: collections.Counter[str] = collections.Counter()

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=seed_number is None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=SCRIPTS)
    def run(data: bytes) -> None:
        check_script(data, reached)

    (run if seed_number is None else seed(seed_number)(run))()
    return reached


def test_no_hostile_broker_breaks_a_rule() -> None:
    reached = fuzz(CASES, seed_number=None)
    assert reached["cases"] >= CASES
    for interesting in ("Participate", "Evaluate", "CountRecords", "KeepChunk", "Discard", "Abandon", "UpdateReady"):
        assert reached[interesting] >= CASES / 100, f"{interesting} is hardly reached: {reached}"


def is_caught(cases: int, subject: type[DeviceSession] = DeviceSession) -> bool:
    """Whether a device that was broken on purpose breaks a rule within so many cases."""
    chance, reached = Random(7), collections.Counter[str]()  # noqa: S311 - a test's variety
    try:
        for _ in range(cases):
            check_script(chance.randbytes(300), reached, subject)
    except AssertionError:
        return True
    return False


def test_the_same_cases_without_a_fault_break_no_rule() -> None:
    assert not is_caught(300)


def test_a_device_that_checks_no_signature_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(data: bytes, kind: type[RoundManifestMsg], _key: object) -> RoundManifestMsg:
        return decode(decode(data, SignedMsg).payload, kind)

    monkeypatch.setattr(session_module, "verify", careless)
    assert is_caught(2000)


def test_a_device_that_ignores_its_floors_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Floors, "check", lambda _self, _manifest: None)
    assert is_caught(2000)


def test_a_device_that_forgets_its_decisions_is_caught() -> None:
    class Forgetful(DeviceSession):
        def _toss(self, here: CurrentRound, now_s: float) -> list[Action]:
            actions = super()._toss(here, now_s)
            self._remember(decided_round=0)
            return actions

    assert is_caught(3000, Forgetful)


def test_a_device_that_accepts_old_rounds_is_caught() -> None:
    class Credulous(DeviceSession):
        def _check_is_ours_and_new(self, manifest: RoundManifestMsg) -> None:
            if manifest.round < self._state.highest_round:
                self._remember(highest_round=0)

    assert is_caught(2000, Credulous)


def test_a_device_that_trains_while_blocked_is_caught() -> None:
    class Eager(DeviceSession):
        def _go_on(self, now_s: float) -> list[Action]:
            self._blocked = ()
            return super()._go_on(now_s)

    assert is_caught(2000, Eager)


def test_a_device_that_sends_what_it_let_go_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    close = Deliveries._close

    def hoarding(self: Deliveries, update_id: bytes, *args: object, **fields: object) -> list[Action]:
        kept = self._open[update_id]
        actions = close(self, update_id, *args, **fields)  # type: ignore[arg-type]
        self._open[update_id] = kept
        return actions

    monkeypatch.setattr(Deliveries, "_close", hoarding)
    assert is_caught(3000)


def test_a_device_that_lets_errors_escape_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceSession, "_received", DeviceSession._verified)
    with pytest.raises(ProtocolError):
        is_caught(50)


def held_after_flood(subject: DeviceSession, driver: Driver, *, times: int) -> int:
    """Bytes more than before after so many different messages."""
    before = held_bytes(subject)
    chance = Random(3)  # noqa: S311 - a test's variety
    for number in range(times):
        messages = [
            *good()["unwelcome"][:4],
            *good()["nack"][:3],
            chunk_message(model_chunks(data_bytes=300 + number % 1000)[0]),
            Received(f"fl/v1/{TENANT}/model/{chance.randbytes(32).hex()}/0", chance.randbytes(500)),
            Received(f"fl/v1/{TENANT}/down/{DEVICE}/{chance.random()}", chance.randbytes(500)),
        ]
        for message in messages:
            driver.tell(message)
        driver.actions.clear()
    return held_bytes(subject) - before


def test_a_long_flood_leaves_nothing_behind() -> None:
    driver = Driver(floors=FLOORS, outbox=(some_update(1), some_update(2, 6000)))
    driver.open_round()
    assert held_after_flood(driver.session, driver, times=300) < 15_000
    driver.now_s += 1.0
    driver.session.handle(Disconnected("gone"), driver.now_s)
    driver.tell(Connected())
    driver.now_s += 400.0
    driver.send_model()
    driver.tell(ConditionsRead(()))
    assert driver.session.view().doing.startswith(("fetching", "training"))


def test_a_session_that_remembers_refusals_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[bytes] = []
    is_for = Download.is_for

    def hoarding(self: Download, topic: str) -> bool:
        self.__dict__.setdefault("refused", refused).append(topic.encode())
        return is_for(self, topic)

    monkeypatch.setattr(Download, "is_for", hoarding)
    driver = Driver(floors=FLOORS)
    driver.open_round()
    assert held_after_flood(driver.session, driver, times=300) > 15_000


def test_the_measure_of_memory_sees_what_a_session_keeps() -> None:
    large = some_update(1, 10**6)
    assert isinstance(large, PendingUpdate)
    assert held_bytes(Driver(outbox=(large,)).session) > held_bytes(Driver().session) + 10**6


def main() -> None:
    """Run many cases and say what was reached."""
    parser = argparse.ArgumentParser(description="Fuzz the device's session with a hostile broker.")
    parser.add_argument("--cases", type=int, default=200_000, help="how many scripts (default: 200000)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same scripts (default: 1)")
    options = parser.parse_args()
    began_s = time.monotonic()
    reached = fuzz(options.cases, seed_number=options.seed)
    print(f"{time.monotonic() - began_s:.0f} s, seed {options.seed}: {dict(reached)}")  # noqa: T201 - a command


if __name__ == "__main__":
    main()
