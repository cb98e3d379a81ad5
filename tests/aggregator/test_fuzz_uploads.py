"""Hostile and broken senders at the MQTT boundary, on a whole aggregator that also runs its rounds.

Every case is seeded: whatever it puts on the wire, no exception leaves the service, what it keeps in memory is bounded,
and honest devices between the hostile ones get their receipts and count exactly once. A few hundred messages a case and
a few cases are run each time; COVEY_FUZZ_CASES asks for more (see the module's end for what was run once).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pytest

from aggregator.batches import FULL_BATCH
from aggregator.intake import MOST_HELD_MESSAGES, IntakeLimits
from aggregator.register_cache import MOST_NAMES
from aggregator.service import MOST_EVENTS
from fl_protocol.chunking import split
from fl_protocol.errors import ProtocolError
from fl_protocol.messages import ChunkMsg, ReceiptMsg, UpdateEnvelopeMsg, UpdateHeaderMsg, decode, encode
from fl_protocol.signing import sign_header
from fl_protocol.topics import shard_of, upload_topic
from fl_protocol.transport import Received
from tests.aggregator.desk import (
    DEVICES,
    D,
    Desk,
    a_desk,
    broken_committer,
    built_with,
    device_key,
    id_of,
    make_update,
    messages,
    sum_of,
    task_config,
)
from tests.enrolments import broken_copy
from tests.fl_protocol.examples import TENANT

CASES = int(os.environ.get("COVEY_FUZZ_CASES", "12"))
MESSAGES = 250
HONEST = DEVICES[:2]
HOSTILE = DEVICES[2:]
LIMITS = IntakeLimits(reassembly_bytes=2**17, device_bytes_a_minute=2**20, device_transfers_a_minute=40)
Wire = tuple[str, bytes]


def numbers(name: str) -> np.ndarray:
    return np.random.default_rng(int.from_bytes(id_of(name)[:4], "big")).normal(size=D).astype(np.float32)


def honest_update(name: str) -> list[Received]:
    update_id = id_of(f"honest {name}")
    envelope = make_update(name, update_id=update_id, body=numbers(name).astype("<f4").tobytes())
    return messages(envelope, name, update_id=update_id, data_bytes=400)


def signed_anew(envelope: bytes, signer: str, /, *, sealed: bytes | None = None, **changes: object) -> bytes:
    """An envelope with whatever header, valid or not, that its device signed."""
    outer = decode(envelope, UpdateEnvelopeMsg)
    inner = decode(outer.header, UpdateHeaderMsg)
    fields = {name: getattr(inner, name) for name in inner.__struct_fields__}
    header = msgspec.msgpack.encode({**fields, **changes})
    signature = sign_header(header, device_key(signer))
    return encode(
        UpdateEnvelopeMsg(header=header, signature=signature, sealed=outer.sealed if sealed is None else sealed)
    )


# What hostile devices put on the wire. They hold their own keys, and see what everybody publishes.


class Hostile:
    """One case's hostile devices.

    Args:
        chance: seeded.
        seen: what was published before.
    """

    def __init__(self, chance: Random, seen: list[Wire]) -> None:
        self.chance, self.seen = chance, seen
        self.makers: list[Callable[[], list[Wire]]] = [
            self.random_bytes,
            self.random_topic,
            self.mutated,
            self.mutated_envelope,
            self.signed_header,
            self.honest_looking,
            self.half,
            self.replay,
            self.in_anothers_name,
            self.sealed_garbage,
            self.nested,
        ]

    def message(self) -> list[Wire]:
        return self.chance.choice(self.makers)()

    def device(self) -> str:
        return self.chance.choice(HOSTILE)

    def update_id(self) -> bytes:
        # Few, so that transfers collide.
        return id_of(f"fuzz {self.chance.randrange(12)}")

    def some_bytes(self, most: int = 2000) -> bytes:
        return self.chance.randbytes(self.chance.randrange(most))

    def random_bytes(self) -> list[Wire]:
        topic = upload_topic(TENANT, self.device(), self.update_id(), self.chance.choice([0, 1, 65_535]))
        return [(topic, self.some_bytes())]

    def random_topic(self) -> list[Wire]:
        name = self.chance.choice([*DEVICES, "stranger", "x" * 64, "A", ""])
        shard = self.chance.choice([shard_of(name) if name else 0, 0, 63, 64])
        index = self.chance.choice(["0", "00", "-1", "65536", "99999999999", "x", ""])
        update = self.chance.choice([self.update_id().hex(), "zz", "", "0" * 32])
        tenant = self.chance.choice([TENANT, "other"])
        return [(f"fl/v1/{tenant}/up/{shard:02d}/{name}/{update}/{index}", self.some_bytes(100))]

    def flipped(self, data: bytes) -> bytes:
        raw = bytearray(data)
        for _ in range(self.chance.choice([1, 1, 1, 3, 20])):
            where = self.chance.randrange(len(raw))
            match self.chance.randrange(4):
                case 0:
                    raw[where] ^= 1 << self.chance.randrange(8)
                case 1:
                    del raw[where:]
                case 2:
                    raw[where:where] = self.chance.randbytes(self.chance.randrange(1, 9))
                case _:
                    raw[where : where + 4] = b"\xff\xff\xff\xff"
            if not raw:
                return b""
        return bytes(raw)

    def mutated(self) -> list[Wire]:
        """A good update's chunks, some of them changed."""
        return [
            (topic, self.flipped(payload) if self.chance.random() < 0.4 else payload) for topic, payload in self.good()
        ]

    def good(self, **changes: object) -> list[Wire]:
        device, update_id = self.device(), self.update_id()
        return self.cut(make_update(device, update_id=update_id, **changes), device, update_id)  # type: ignore[arg-type]

    def cut(self, envelope: bytes, device: str, update_id: bytes) -> list[Wire]:
        size = self.chance.choice([256, 300, 700, 4000])
        return [
            (upload_topic(TENANT, device, update_id, one.index), encode(one))
            for one in split(update_id, envelope, data_bytes=size)
        ]

    def mutated_envelope(self) -> list[Wire]:
        """Chunks that fit together, of an envelope that is none."""
        device, update_id = self.device(), self.update_id()
        envelope = self.flipped(make_update(device, update_id=update_id))
        return self.cut(envelope or b"\0", device, update_id)

    def signed_header(self) -> list[Wire]:
        """Whatever a header may say, signed by its device."""
        device, update_id = self.device(), self.update_id()
        changes = self.chance.choice(
            [
                {"round": self.chance.choice([0, 1, 2, 4, 2**31 - 1])},
                {"task": self.chance.choice(["other", "x" * 64])},
                {"tenant": "other"},
                {"model_digest": self.chance.randbytes(32)},
                {"kem": "mlkem768-x25519"},
                {"device": "watch-0"},
                {"update_id": self.chance.randbytes(16)},
                {"sealed_digest": self.chance.randbytes(32)},
            ]
        )
        return self.cut(signed_anew(make_update(device, update_id=update_id), device, **changes), device, update_id)

    def honest_looking(self) -> list[Wire]:
        """Sealed and signed as it should be; its numbers are not."""
        with np.errstate(all="ignore"):
            body = np.frombuffer(self.chance.randbytes(4 * D), "<f4").tobytes()
        encoding = self.chance.choice(["float32", "float16", "int8", "top_k"])
        length = self.chance.choice([D, D, 1, 4_000_000])
        if encoding == "float32":
            body, length = body[: 4 * length], min(length, D)
            body = body[: 4 * length]
        return self.good(body=body, encoding=encoding, num_parameters=length)

    def half(self) -> list[Wire]:
        """An update that is begun, as large as may be, and not ended."""
        update_id = self.chance.randbytes(16)
        data = bytes(self.chance.choice([256, 4000, 60_000]))
        count = self.chance.choice([2, 3, 200])
        total = len(data) * (count - 1) + 1
        half = ChunkMsg(transfer_id=update_id, index=0, count=count, total_bytes=total, digest=bytes(32), data=data)
        return [(upload_topic(TENANT, self.device(), update_id, 0), encode(half))]

    def replay(self) -> list[Wire]:
        """What was published before, by anybody, once more."""
        return [self.chance.choice(self.seen)] if self.seen else []

    def in_anothers_name(self) -> list[Wire]:
        """Another's chunks under one's own topic."""
        if not self.seen:
            return []
        _, payload = self.chance.choice(self.seen)
        return [(upload_topic(TENANT, self.device(), self.update_id(), self.chance.randrange(3)), payload)]

    def sealed_garbage(self) -> list[Wire]:
        """A header that is signed over sealed bytes that open with no key."""
        device, update_id = self.device(), self.update_id()
        sealed = self.some_bytes(600)
        envelope = make_update(device, update_id=update_id)
        return self.cut(
            signed_anew(envelope, device, sealed=sealed, sealed_digest=hashlib.sha256(sealed).digest()),
            device,
            update_id,
        )

    def nested(self) -> list[Wire]:
        """MessagePack that is nested beyond reason, or promises more than it holds."""
        payload = self.chance.choice([b"\x91" * 5000, b"\x81" * 5000, b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"])
        return [(upload_topic(TENANT, self.device(), self.update_id(), 0), payload)]


def check_bounds(desk: Desk) -> None:
    """What is kept in memory, whatever came."""
    intake = desk.intake("aggregator")
    assert intake._transfers.held_bytes <= LIMITS.reassembly_bytes
    assert sum(len(one) for one in intake._transfers._open.values()) <= 4 * len(DEVICES)
    assert intake._held._count <= MOST_HELD_MESSAGES
    assert intake.batches.num_gathered <= 2 * FULL_BATCH
    assert len(intake._register._known) <= min(MOST_NAMES, 100)
    assert len(intake._throttle._devices) <= len(DEVICES)
    for times in (intake._nacked_s, intake._receipted_s, intake._named_s):
        assert len(times) <= 40 * len(DEVICES)


def check_case(folder: Path, seed: int, count: int = MESSAGES) -> int:
    """One seeded case; how many messages were put on the wire."""
    chance, seen = Random(seed), list[Wire]()  # noqa: S311 - a seeded test
    desk = a_desk(folder, limits=LIMITS, tasks=(task_config(round_duration_s=1e9),))  # the round stays open
    desk.kill()
    desk.start("aggregator", coordinates=True)
    desk.said()
    hostile = Hostile(chance, seen)
    waiting = [one for name in HONEST for one in honest_update(name)]
    chance.shuffle(waiting)
    receipts: set[str] = set()
    sent = 0
    while sent < count or waiting:
        batch = hostile.message() if sent < count else []
        if waiting and chance.random() < 0.2:
            batch.append((waiting[-1].topic, waiting.pop().payload))
        if chance.random() < 0.3:
            chance.shuffle(batch)
        for topic, payload in batch:
            desk.broker.publish(topic, payload, retain=False)
            seen.append((topic, payload))
        sent += len(batch)
        if chance.random() < 0.3:
            desk.settle(1)
            check_bounds(desk)
        if chance.random() < 0.05:
            desk.clock.time_s += chance.choice([0.3, 2.0, 11.0, 61.0])
        receipts |= {one.device for one in desk.said() if isinstance(one, ReceiptMsg)}
    desk.settle()
    # A chunk that gave way to others' is sent again, as devices do.
    for _ in range(3):
        for name in sorted(set(HONEST) - receipts):
            desk.clock.time_s += 61.0
            desk.take(honest_update(name))
        receipts |= {one.device for one in desk.said() if isinstance(one, ReceiptMsg)}
    check_bounds(desk)
    assert set(HONEST) <= receipts, f"seed {seed}"
    assert desk.journal.named("degraded") == [], f"seed {seed}"
    total, others = desk.total(), _others(desk)
    assert total.count == len(HONEST) + len(others), f"seed {seed}"
    assert len(others) <= len(HOSTILE)
    if not others:
        assert total.total.tobytes() == sum_of(*(numbers(name) for name in HONEST)).tobytes()
    return sent


def _others(desk: Desk) -> list[bytes]:
    """Updates of hostile devices that count: good ones, at most one each."""
    return [one for one in desk.accepted() if one not in {id_of(f"honest {name}") for name in HONEST}]


@pytest.mark.parametrize("seed", range(CASES))
def test_whatever_is_sent_the_service_stands_and_honest_devices_count(tmp_path: Path, seed: int) -> None:
    check_case(tmp_path, seed)


def run_cases(folder: Path, cases: int) -> None:
    for seed in range(cases):
        (folder / str(seed)).mkdir()
        check_case(folder / str(seed), seed, 3 * MESSAGES)


def test_an_intake_that_lets_an_exception_out_is_caught(tmp_path: Path) -> None:
    change = ("except ProtocolError as error:\n            return", "except OSError as error:\n            return")
    with built_with(Intake=broken_copy("aggregator.intake", change).Intake), pytest.raises(ProtocolError):
        run_cases(tmp_path, 3)


def test_an_intake_without_a_cap_on_memory_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loose = broken_copy("aggregator.transfers", ("while self._held_bytes > self._most_bytes:", "while False:"))
    monkeypatch.setattr("aggregator.intake.Transfers", loose.Transfers)
    with pytest.raises(AssertionError):
        run_cases(tmp_path, 3)


def test_a_committer_that_forgets_what_it_accepted_is_caught(tmp_path: Path) -> None:
    forgetful = broken_committer(("(before := known.get((header.task, header.update_id)))", "(before := None)"))
    with built_with(Committer=forgetful), pytest.raises(AssertionError):
        run_cases(tmp_path, 3)


def test_a_flood_from_strangers_leaves_nothing_behind(tmp_path: Path) -> None:
    desk = a_desk(tmp_path)
    names = [f"stranger-{index}" for index in range(2000)]
    chunk = honest_update("watch-0")[0]
    for name in names:
        desk.broker.publish(upload_topic(TENANT, name, id_of(name), 0), chunk.payload, retain=False)
    desk.settle(2 + 2 * len(names) // MOST_EVENTS)
    intake = desk.intake()
    assert intake._transfers._open == {}
    assert intake._throttle._devices == {}
    assert intake._held._count == 0
    assert intake.batches.num_gathered == 0
    assert desk.said() == []
    assert desk.transport().num_held == 0
    assert len(intake._register._known) == len(names)  # bounded by MOST_NAMES, see test_register_cache
    assert desk.take(honest_update("watch-0")) == 1
