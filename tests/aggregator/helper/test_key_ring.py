"""A helper's keys: durable before they are announced, renewed, and gone when nobody can need them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from aggregator.errors import DatabaseError
from aggregator.helper import key_ring
from aggregator.helper.helper_store import HelperDatabase, HelperStore
from aggregator.helper.key_ring import Helper, KeyTerms
from fl_protocol.secagg.messages import HelperKeyMsg, MaskSumMsg
from fl_protocol.signing import verify
from fl_protocol.topics import helper_topic
from tests.aggregator.helper.helper_desk import (
    DEVICES,
    HELPER,
    IDENTITY,
    NOW_S,
    TENANT,
    Desk,
    recipient_in,
    request_for,
    rounds_reply,
)
from tests.enrolments import broken_copy

DAY_S = 86_400.0
TERMS = KeyTerms("x25519")


class Ring:
    """A key ring on a store in a folder, with a clock, keeping every secret that it drew."""

    def __init__(self, folder: Path, module: Any = key_ring, store: type[HelperStore] = HelperStore) -> None:
        self.folder, self.module, self.now_s, self.drawn = folder, module, NOW_S, list[bytes]()
        self.kind = store
        self.open()

    def open(self) -> None:
        self.store = self.kind(HelperDatabase(self.folder / "helper.db"))
        self.ring = self.module.KeyRing(
            Helper(HELPER, "operator-a", IDENTITY),
            terms=TERMS,
            store=self.store,
            entropy=self.draw,
            now_s=lambda: self.now_s,
        )

    def draw(self, count: int) -> bytes:
        self.drawn.append(bytes([len(self.drawn) + 1]) * 8 + b"a secret never to be seen"[: count - 8])
        return self.drawn[-1][:count].ljust(count, b"!")

    def on_disk(self, secret: bytes) -> bool:
        """Whether any file of the store has these bytes."""
        return any(secret in path.read_bytes() for path in self.folder.iterdir())

    def announced(self) -> HelperKeyMsg:
        return verify(self.ring.announcement, HelperKeyMsg, IDENTITY.public_key())


def test_a_key_is_renewed_each_day_and_valid_for_three(tmp_path: Path) -> None:
    ring = Ring(tmp_path)
    assert ring.ring.announcement is None
    assert ring.ring.refresh()
    first = ring.announced()
    assert (first.helper, first.operator, first.not_after_s) == (HELPER, "operator-a", NOW_S + 3 * DAY_S)
    ring.now_s += DAY_S - 1
    assert not ring.ring.refresh()
    assert ring.announced() == first
    ring.now_s += 1
    assert ring.ring.refresh()
    assert ring.announced().recipient != first.recipient
    assert ring.announced().not_after_s == NOW_S + 4 * DAY_S


def test_a_new_process_announces_the_same_bytes(tmp_path: Path) -> None:
    ring = Ring(tmp_path)
    ring.ring.refresh()
    before = ring.ring.announcement
    ring.open()
    ring.ring.refresh()
    assert ring.ring.announcement == before
    assert len(ring.drawn) == 1


@pytest.mark.parametrize("back_s", [1.0, 8 * DAY_S])
def test_a_clock_that_was_set_back_has_nobody_wait_for_its_return(tmp_path: Path, back_s: float) -> None:
    ring = Ring(tmp_path)
    ring.ring.refresh()
    ring.now_s -= back_s
    assert ring.ring.refresh()
    assert ring.announced().not_after_s == ring.now_s + 3 * DAY_S


def check_secrets_are_gone(folder: Path, module: Any) -> None:
    """Not before the grace is over, and then from every file."""
    ring = Ring(folder, module)
    ring.ring.refresh()
    ring.ring.erase()
    (secret,) = (one[:24] for one in ring.drawn)
    recipient = ring.announced().recipient
    assert ring.on_disk(secret)
    ring.now_s += 4 * DAY_S
    assert ring.ring.refresh()
    assert ring.ring.erase() == 0
    assert ring.ring.find(recipient) is not None
    ring.now_s += 1
    assert ring.ring.erase() == 1
    assert ring.ring.find(recipient) is None
    assert not ring.on_disk(secret)
    assert ring.on_disk(ring.drawn[1][:24])
    first, second = ring.store.keys.all()
    assert (first.secret, first.erased_s, second.erased_s) == (None, ring.now_s, None)


def test_a_secret_is_kept_for_its_grace_and_then_in_no_file(tmp_path: Path) -> None:
    check_secrets_are_gone(tmp_path, key_ring)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("self._store.keys.erase_ended(now_s - self._terms.grace_s, now_s)", "0"),
        (
            "self._store.keys.erase_ended(now_s - self._terms.grace_s, now_s)",
            "self._store.keys.erase_ended(now_s, now_s)",
        ),
        ("self._log_is_empty = self._store.database.empty_log()", "pass"),
    ],
    ids=["never", "too early", "but for the write-ahead log"],
)
def test_a_helper_that_does_not_erase_as_it_says_is_caught(tmp_path: Path, right: str, wrong: str) -> None:
    with pytest.raises(AssertionError):
        check_secrets_are_gone(tmp_path, broken_copy("aggregator.helper.key_ring", (right, wrong)))


def test_what_a_killed_process_left_in_the_log_is_emptied_at_the_next_start(tmp_path: Path) -> None:
    ring = Ring(tmp_path)
    ring.ring.refresh()
    ring.now_s += 5 * DAY_S
    held = ring.store.database.engine.connect()  # a process that was killed never closes, which would empty the log
    ring.store.keys.erase_ended(ring.now_s, ring.now_s)
    assert ring.on_disk(ring.drawn[0][:24])
    ring.open()
    assert not ring.on_disk(ring.drawn[0][:24])
    held.close()


def test_while_somebody_reads_the_log_is_emptied_later(tmp_path: Path) -> None:
    ring = Ring(tmp_path)
    ring.ring.refresh()
    ring.ring.erase()
    reader = HelperStore(HelperDatabase(tmp_path / "helper.db"))
    with reader.database.reading() as connection:
        connection.exec_driver_sql("SELECT count(*) FROM keys").all()
        ring.now_s += 5 * DAY_S
        assert ring.ring.erase() == 1
        assert ring.on_disk(ring.drawn[0][:24])
    assert ring.ring.erase() == 0
    assert not ring.on_disk(ring.drawn[0][:24])


def check_what_is_announced_is_kept(folder: Path, module: Any) -> None:
    """The disk takes nothing: nothing is announced, or devices would seal to a key that nobody has."""

    class Full(HelperStore):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            with self.database.engine.connect() as connection:
                connection.connection.cursor().execute("PRAGMA query_only=1")

    ring = Ring(folder, module, Full)
    with suppress(DatabaseError):
        ring.ring.refresh()
    assert ring.ring.announcement is None or ring.ring.find(ring.announced().recipient) is not None


def test_a_key_is_kept_before_it_is_announced(tmp_path: Path) -> None:
    check_what_is_announced_is_kept(tmp_path, key_ring)


def test_a_helper_that_announces_first_is_caught(tmp_path: Path) -> None:
    hasty = broken_copy(
        "aggregator.helper.key_ring",
        (
            "        self._store.keys.add(\n",
            "        self.announcement = self._announce(StoredKey(1, kem, key.secret, now_s, now_s, None))\n"
            "        self._store.keys.add(\n",
        ),
    )
    with pytest.raises(AssertionError):
        check_what_is_announced_is_kept(tmp_path, hasty)


def test_a_round_of_an_older_key_is_answered_and_the_new_one_is_retained(tmp_path: Path) -> None:
    desk = Desk(tmp_path, key_terms=TERMS)
    old = desk.key()
    manifest = desk.manifest()
    desk.now_s += 1.5 * DAY_S
    desk.settle()
    assert recipient_in(desk.key()) != recipient_in(old)
    assert desk.broker.retained.keys() == {helper_topic(TENANT, HELPER, "key")}
    assert isinstance(rounds_reply(desk.ask(request_for(manifest, DEVICES[:3]))), MaskSumMsg)
    desk.now_s += 3 * DAY_S
    desk.settle()
    (told,) = desk.journal.named("keys_erased")
    assert told["count"] == 1


def test_a_store_that_fails_for_a_while_keeps_the_announced_key(tmp_path: Path) -> None:
    desk = Desk(tmp_path, key_terms=TERMS)
    before: Callable[[], None] = desk.store.database.close
    old = desk.key()
    with desk.store.database.engine.connect() as connection:
        connection.connection.cursor().execute("PRAGMA query_only=1")
    desk.now_s += 2 * DAY_S
    desk.settle()
    assert desk.key() == old
    assert desk.journal.named("degraded")
    with desk.store.database.engine.connect() as connection:
        connection.connection.cursor().execute("PRAGMA query_only=0")
    desk.now_s += 5
    desk.settle()
    assert desk.key() != old
    assert desk.journal.named("recovered")
    before()
