"""Devices' presence at the aggregator: counted by state and reason, written many at a time, believed by nobody."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import event, insert

from aggregator import fleet_watch
from aggregator.fleet_watch import EVERYBODY_WITHIN_S, WRITE_EVERY_S
from aggregator.store import schema
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.database import Database
from aggregator.store.presence import FleetCounts, counts, presence_of
from firmware_sim.virtual_broker import VirtualBroker, VirtualTransport
from fl_protocol.messages import PresenceMsg, encode
from fl_protocol.topics import state_topic
from tests.enrolments import broken_copy

TENANT = "clinic"


class Site:
    """A coordinator's listener and a broker, with registered names ``w-0000``, ``w-0001``, ..."""

    def __init__(self, database: Database, *, devices: int = 5, module: Any = fleet_watch) -> None:
        self.store = AggregatorStore(database, None)  # type: ignore[arg-type]  # presence has no blobs
        self.broker, self.now_s = VirtualBroker(), 1000.0
        rows = [{"device": f"w-{n:04}", "public_key": bytes(32), "added_s": 0.0} for n in range(devices)]
        with database.transaction() as connection:
            connection.execute(insert(schema.devices), rows)
        self.listen(module)

    def listen(self, module: Any = fleet_watch) -> None:
        """Another listener takes over."""
        self.transport = VirtualTransport(self.broker)
        self.watch = module.FleetWatch(
            tenant=TENANT, store=self.store, transport=self.transport, now_s=lambda: self.now_s
        )
        self.transport.open()
        self.turn()

    def say(self, device: str, state: str = "online", reason: str = "") -> None:
        message = PresenceMsg(state=state, software="covey 1", reason=reason)  # type: ignore[arg-type]
        self.raw(state_topic(TENANT, device), encode(message))

    def raw(self, topic: str, payload: bytes) -> None:
        self.broker.publish(topic, payload, retain=True)

    def turn(self, *, leads: bool = True, after_s: float = 0.0) -> None:
        """One step of the process, some seconds later."""
        self.now_s += after_s
        events = []
        while (found := self.transport.poll(0.0)) is not None:
            events.append(found)
        self.watch.take(events)
        self.watch.look_after(leads=leads)

    def counted(self) -> FleetCounts:
        """What the database has once everything was written."""
        self.turn()
        self.turn(after_s=WRITE_EVERY_S + 0.1)
        with self.store.database.reading() as connection:
            return counts(connection, now_s=self.now_s)


def enrol(site: Site, name: str, names: list[str], state: str) -> None:
    """One device with several names, all of them valid."""
    row = {
        "enrolment": name, "task": "watch", "owner": "o", "renewal_key": bytes(32), "state": state, "reason": "",
        "enrolled_s": 0.0, "changed_s": 0.0, "lasts_until_s": 1e9, "request_digest": bytes(32), "answer": b"",
    }  # fmt: skip
    period = {"not_before_s": 0.0, "not_after_s": 1e9}
    with site.store.database.transaction() as connection:
        connection.execute(insert(schema.enrolments).values(row))
        for one in names:
            connection.execute(insert(schema.enrolment_names).values(device=one, enrolment=name, serial=one, **period))


def check_what_is_said_is_counted(site: Site) -> None:
    """By state, and what keeps those that are there from training; what is unknown or malformed is only counted."""
    site.say("w-0000")
    site.say("w-0001", reason="charger")
    site.say("w-0002", reason="charger")
    site.say("w-0003", "offline")
    site.say("stranger", reason="battery")
    site.raw(state_topic(TENANT, "w-0004"), b"\x93rubbish")
    site.raw(state_topic(TENANT, "w-0004"), bytes(5000))
    site.raw(f"fl/v1/{TENANT}/state/W!", b"x")
    found = site.counted()
    assert (found.active, found.online, found.offline, found.unheard) == (5, 3, 1, 1)
    assert {name: count for name, count in found.reasons.items() if count} == {"charger": 2}
    site.turn(after_s=WRITE_EVERY_S + 0.1)
    assert site.store.refusals("") == {
        "presence_unknown": 1, "presence_malformed": 1, "presence_oversized": 1, "presence_misplaced": 1
    }  # fmt: skip


def test_what_devices_say_is_counted_by_state_and_reason(database: Database) -> None:
    check_what_is_said_is_counted(Site(database))


@pytest.mark.parametrize(
    "change",
    [("> LONGEST_BYTES", "> 10**9"), ('self.refused["presence_unknown"] += self._book', "self._book")],
)
def test_a_listener_that_lets_something_pass_uncounted_is_caught(database: Database, change: tuple[str, str]) -> None:
    module = broken_copy("aggregator.fleet_watch", change)
    with pytest.raises(AssertionError):
        check_what_is_said_is_counted(Site(database, module=module))


def test_a_device_counts_once_whatever_its_names_and_not_at_all_once_it_is_thrown_out(database: Database) -> None:
    site = Site(database, devices=6)
    enrol(site, "one", ["w-0000", "w-0001"], "active")
    enrol(site, "aside", ["w-0002"], "quarantined")
    enrol(site, "out", ["w-0003"], "revoked")
    for name in ("w-0000", "w-0001", "w-0002", "w-0003", "w-0004"):
        site.say(name, reason="idle")
    found = site.counted()
    # The device of two names, and two that were registered by hand.
    assert (found.active, found.quarantined, found.revoked) == (3, 1, 1)
    assert (found.online, found.unheard, found.reasons["idle"]) == (2, 1, 2)


def test_ten_thousand_devices_are_written_in_a_dozen_transactions(database: Database) -> None:
    site = Site(database, devices=10_000)
    commits: list[None] = []
    event.listen(database.engine, "commit", lambda _connection: commits.append(None))
    for n in range(10_000):
        site.say(f"w-{n:04}", reason="battery" if n % 2 else "")
    for _ in range(12):
        site.turn(after_s=0.2)
    found = site.counted()
    assert (found.online, found.reasons["battery"]) == (10_000, 5_000)
    assert len(commits) <= 15


def test_whoever_takes_over_is_told_of_everybody_anew(database: Database) -> None:
    site = Site(database)
    site.say("w-0000", reason="hours")
    site.counted()
    site.say("w-0001")  # while nobody has written it yet
    site.listen()
    assert site.counted().online == 2
    site.say("w-0000")
    with site.store.database.reading() as connection:
        before = presence_of(connection, "w-0000")
    assert before is not None
    assert before.reason == "hours"
    site.counted()
    with site.store.database.reading() as connection:
        after = presence_of(connection, "w-0000")
    assert after is not None
    assert (after.reason, after.since_s > before.since_s) == ("", True)


def test_one_that_stands_by_hears_nothing(database: Database) -> None:
    site = Site(database)
    site.turn(leads=False)
    site.say("w-0000")
    site.turn(leads=False, after_s=10.0)
    with database.reading() as connection:
        assert counts(connection, now_s=site.now_s).online == 0


def test_a_presence_that_is_taken_away_and_one_that_the_broker_forgot(database: Database) -> None:
    site = Site(database)
    site.say("w-0000")
    site.say("w-0001")
    assert site.counted().online == 2
    site.raw(state_topic(TENANT, "w-0000"), b"")
    assert (site.counted().online, site.counted().unheard) == (1, 4)
    site.broker.retained.clear()  # the broker lost what it kept
    site.listen()
    site.turn(after_s=EVERYBODY_WITHIN_S + 1)
    assert (site.counted().online, site.counted().unheard) == (0, 5)


def test_memory_is_bounded_and_what_did_not_fit_is_asked_for_again(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_watch, "MOST_WAITING", 3)
    site = Site(database, devices=8)
    for n in range(8):
        site.say(f"w-{n:04}")
    assert site.counted().online == 3
    monkeypatch.setattr(fleet_watch, "MOST_WAITING", 8)
    site.counted()
    assert site.counted().online == 8
