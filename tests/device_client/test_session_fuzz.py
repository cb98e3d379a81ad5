"""Whatever a broker sends, the session raises nothing, keeps little, and trains only what was signed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_client.events import Participate, ParticipationEnded, PendingUpdate, Tick
from device_client.session import DeviceSession
from fl_protocol.chunking import split
from fl_protocol.errors import RefusalReason
from fl_protocol.messages import NackMsg, encode
from fl_protocol.signing import sign
from fl_protocol.topics import down_topic, model_topic, round_topic
from fl_protocol.transport import Connected, Disconnected, Received
from tests.device_client.ports import DEVICE, TASK, TENANT
from tests.device_client.session_driver import (
    AGGREGATOR,
    DIGEST,
    STRANGER,
    Driver,
    chunk_message,
    manifest,
    manifest_message,
    model_chunks,
)
from tests.device_client.test_session import receipt_for, some_update

RUNS, EVENTS = 30, 800

OPEN = {number: manifest_message(manifest(round=number)) for number in range(1, 2 + EVENTS // 40)}
FINISHED = {number: manifest_message(manifest(status="finished", round=number)) for number in OPEN}
CHUNKS = [chunk_message(chunk) for chunk in model_chunks()]
GENUINE = [
    OPEN[1],
    manifest_message(manifest(), STRANGER),
    *CHUNKS,
    *(chunk_message(chunk) for chunk in split(b"\x01" * 16, bytes(3000), data_bytes=300)),
    Received(down_topic(TENANT, DEVICE, "receipt"), sign(receipt_for(some_update()), AGGREGATOR)),
    *(
        Received(
            down_topic(TENANT, DEVICE, "nack"),
            sign(
                NackMsg(
                    tenant=TENANT,
                    device=DEVICE,
                    update_id=some_update().update_id,
                    reason=reason,
                    missing=b"\xff" * 30 if reason is RefusalReason.TRUNCATED else b"",
                ),
                AGGREGATOR,
            ),
        )
        for reason in (RefusalReason.TRUNCATED, RefusalReason.WRONG_ROUND)
    ),
]
TOPICS = [
    round_topic(TENANT, TASK),
    model_topic(TENANT, DIGEST, 0),
    down_topic(TENANT, DEVICE, "receipt"),
    down_topic(TENANT, DEVICE, "nack"),
    down_topic(TENANT, DEVICE, "control"),
]


def mutated(message: Received, chance: Random) -> Received:
    """A genuine message with its bytes or its topic changed."""
    payload = bytearray(message.payload)
    where = chance.randrange(len(payload))
    match chance.choice(["flip", "cut", "grow", "repeat", "topic"]):
        case "flip":
            payload[where] ^= 1 << chance.randrange(8)
        case "cut":
            del payload[where:]
        case "grow":
            payload[where:where] = chance.randbytes(chance.randrange(1, 300))
        case "repeat":
            payload *= 2
        case "topic":
            return Received(chance.choice(TOPICS), bytes(payload))
    return Received(message.topic, bytes(payload))


def random_event(chance: Random, position: int) -> object:
    """Mostly what a session looks at, sometimes anything else; a new round opens every 40 events."""
    kind = chance.randrange(24)
    if kind < 4:
        return chance.choice([OPEN, OPEN, OPEN, FINISHED])[1 + position // 40]
    if kind < 14:
        return chance.choice(CHUNKS if kind < 11 else GENUINE)
    if kind < 20:
        return mutated(chance.choice(GENUINE), chance)
    odd = {
        20: Received(chance.choice(TOPICS), chance.randbytes(chance.randrange(300))),
        21: ParticipationEnded(chance.randrange(5), "spent"),
        22: Disconnected("gone"),
        23: Connected(chance.choice([None, chance.randrange(200_000), chance.randrange(2000)])),
    }
    return chance.choice([odd[kind], Tick()])


def story(seed: int) -> Iterator[tuple[object, float]]:
    """Events, and the seconds before each."""
    chance = Random(seed)  # noqa: S311 - a test's variety
    for position in range(EVENTS):
        yield random_event(chance, position), chance.choice([0.0, 0.0, 0.01, 0.1])


any_event = st.one_of(
    st.builds(Received, st.sampled_from(TOPICS) | st.text(max_size=60), st.binary(max_size=200)),
    st.builds(Connected, st.none() | st.integers(0, 200_000)),
    st.builds(Disconnected, st.text(max_size=20)),
    st.just(Tick()),
    st.builds(ParticipationEnded, st.integers(0, 5), st.text(max_size=20)),
)


def held_bytes(subject: object, seen: set[int] | None = None) -> int:
    """Bytes of everything an object keeps, its pinned key and configuration aside."""
    seen = set() if seen is None else seen
    if id(subject) in seen or isinstance(subject, type) or callable(subject):
        return 0
    seen.add(id(subject))
    size = sys.getsizeof(subject)
    if isinstance(subject, dict):
        return size + sum(held_bytes(part, seen) for item in subject.items() for part in item)
    if isinstance(subject, list | tuple | set):
        return size + sum(held_bytes(part, seen) for part in subject)
    fields = getattr(subject, "__dict__", None) or {
        name: getattr(subject, name) for name in getattr(subject, "__struct_fields__", ())
    }
    return size + sum(held_bytes(part, seen) for part in fields.values())


def check_events(events: Iterable[tuple[object, float]]) -> list[int]:
    """Nothing raises, nothing unsigned is trained, nothing twice, and the next wake is ahead; the rounds trained."""
    driver = Driver(outbox=(some_update(),))
    signed = {encode(manifest(round=number)) for number in OPEN}
    trained: list[int] = []
    for event, wait_s in events:
        driver.now_s += wait_s
        actions = driver.tell(event)
        driver.actions.clear()
        assert len(actions) < 50
        for action in actions:
            if isinstance(action, Participate):
                assert encode(action.manifest) in signed
                trained.append(action.manifest.round)
        wake_s = driver.session.next_wake_s()
        assert wake_s is None or wake_s > driver.now_s, "the daemon would spin"
    assert trained == sorted(set(trained))
    assert held_bytes(driver.session) < 60_000
    return trained


@pytest.mark.parametrize("seed", range(RUNS))
def test_no_event_raises_and_nothing_unsigned_is_trained(seed: int) -> None:
    trained = check_events(story(seed))
    assert len(trained) >= 3, "the events should reach training"


@given(events=st.lists(st.tuples(any_event, st.floats(0.0, 500.0)), max_size=20))
@settings(max_examples=100, deadline=None)
def test_no_unforeseen_event_raises(events: list[tuple[object, float]]) -> None:
    check_events(events)


@pytest.mark.parametrize("transfer", range(3))
def test_a_flood_of_half_sent_models_keeps_no_more_than_one(transfer: int) -> None:
    driver = Driver()
    driver.open_round()
    before = held_bytes(driver.session)
    for number in range(400):
        chunk = model_chunks()[transfer % len(model_chunks())]
        forged = [
            type(chunk)(
                transfer_id=number.to_bytes(16, "little"),
                index=index,
                count=3,
                total_bytes=1500,
                digest=DIGEST,
                data=bytes(500),
            )
            for index in range(transfer, 3)
        ]
        for message in forged:
            driver.tell(chunk_message(message))
    assert held_bytes(driver.session) < before + 10_000
    driver.send_model()
    assert any(isinstance(action, Participate) for action in driver.actions)


def test_the_measure_of_memory_sees_what_a_session_keeps() -> None:
    small, large = Driver(), Driver(outbox=(PendingUpdate(b"\x01" * 16, TASK, 1, bytes(10**6), bytes(32), 1e9),))
    assert isinstance(large.session, DeviceSession)
    assert held_bytes(large.session) > held_bytes(small.session) + 10**6
