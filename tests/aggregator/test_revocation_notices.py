"""The coordinator tells helpers who was thrown out: soon, until they say so, and no name before its time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import delete, insert

from aggregator import revocation_notices
from aggregator.helper_calls import HelperCalls
from aggregator.revocation_notices import ALL_ANEW_EVERY_S, TELL_EVERY_S, RevocationNotices
from aggregator.store import schema
from aggregator.store.database import Database
from firmware_sim.virtual_broker import VirtualTransport
from fl_protocol.errors import ProtocolError
from fl_protocol.revocation_messages import MOST_REVOKED, RevocationsKeptMsg
from fl_protocol.secagg.terms import HelperIdentity
from fl_protocol.signing import sign
from tests.aggregator.helper.helper_desk import HELPER, IDENTITY, NOW_S, TENANT, Desk
from tests.enrolments import broken_copy
from tests.fl_protocol.examples import AGGREGATOR_KEY

PINNED = HelperIdentity(HELPER, "operator-a", IDENTITY.public_key())
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(32))


class Site:
    """An aggregator's database, its coordinator's part, and a helper with a store."""

    def __init__(self, folder: Path, module: Any = revocation_notices) -> None:
        self.module, self.desk = module, Desk(folder)
        self.database = Database(f"sqlite:///{folder / 'aggregator.db'}")
        self.notes: list[dict[str, Any]] = []
        self.begin()

    def begin(self) -> None:
        """A coordinator that knows nothing but what is in the database."""
        self.transport = VirtualTransport(self.desk.broker)
        self.transport.open()
        self.calls = HelperCalls(
            tenant=TENANT,
            helpers={HELPER: PINNED},
            signing_key=AGGREGATOR_KEY,
            transport=self.transport,
            note=self.note,
            now_s=lambda: self.desk.now_s,
        )
        self.notices: RevocationNotices = self.module.RevocationNotices(
            tenant=TENANT,
            database=self.database,
            signing_key=AGGREGATOR_KEY,
            helpers={HELPER: PINNED},
            line=self.calls,
            note=self.note,
            now_s=lambda: self.desk.now_s,
        )
        self.calls.listen(self.notices.hear)
        self.calls.connected(None)

    def note(self, event: str, **fields: Any) -> None:
        self.notes.append({"event": event, **fields})

    def revoke(self, *devices: str, begins_s: float = NOW_S - 10, ends_s: float = NOW_S + 1e6) -> None:
        rows = [
            {
                "serial": f"{hash((device, begins_s)) & 0xFFFFFFFF:08x}",
                "device": device,
                "revoked_s": self.desk.now_s,
                "not_before_s": begins_s,
                "not_after_s": ends_s,
            }
            for device in devices
        ]
        with self.database.transaction() as connection:
            connection.execute(insert(schema.revoked_certificates), rows)

    def settle(self, looks: int = 3) -> None:
        """A few looks of the coordinator, a second apart, and what the helper makes of them."""
        for _ in range(looks):
            self.desk.now_s += 1.0
            self.notices.look_after()
            self.desk.settle()
            self.pump()

    def pump(self) -> None:
        while (event := self.transport.poll(0.0)) is not None:
            self.calls.take([event])

    def kept(self) -> list[str]:
        return [one.device for one in self.desk.store.revoked.all()]

    def named(self, event: str) -> list[dict[str, Any]]:
        return [one for one in self.notes if one["event"] == event]


# What has to hold, each with a copy of the code that does not hold it.


def a_helper_knows_a_second_after_it_happens(site: Site) -> None:
    site.settle()
    assert site.kept() == []
    site.revoke("watch-1")
    site.settle(looks=1)
    assert site.kept() == ["watch-1"]
    (told,) = site.named("helper_knows_revocations")
    assert (told["helper"], told["devices"]) == (HELPER, 1)


def names_are_told_when_their_time_has_come(site: Site) -> None:
    site.revoke("p-now", ends_s=NOW_S + 1000)
    site.revoke("p-next", begins_s=NOW_S + 500)
    site.revoke("p-over", begins_s=NOW_S - 900, ends_s=NOW_S - 1)
    site.settle()
    assert site.kept() == ["p-now"]
    site.desk.now_s = NOW_S + 499
    site.settle(looks=1)
    assert site.kept() == ["p-next", "p-now"]


def a_helper_that_was_away_is_told_when_it_is_back(site: Site) -> None:
    site.desk.transport.close()
    site.revoke("watch-1")
    site.settle()
    site.desk.transport.open()
    site.settle(looks=int(TELL_EVERY_S) + 1)
    assert site.kept() == ["watch-1"]


def a_helper_that_lost_its_store_is_told_within_the_hour(site: Site) -> None:
    site.revoke("watch-1")
    site.settle()
    with site.desk.store.database.transaction() as connection:
        connection.exec_driver_sql("DELETE FROM revoked_devices")
    site.desk.now_s += ALL_ANEW_EVERY_S
    site.settle()
    assert site.kept() == ["watch-1"]


def a_word_of_somebody_else_does_not_count(site: Site) -> None:
    site.desk.transport.close()
    site.revoke("watch-1")
    site.settle()
    digest = site.notices._told[HELPER].digest
    said = sign(RevocationsKeptMsg(tenant=TENANT, helper=HELPER, request_digest=digest), STRANGER)
    with pytest.raises(ProtocolError):
        site.notices.hear(PINNED, said)
    site.desk.transport.open()
    site.settle(looks=int(TELL_EVERY_S) + 1)
    assert site.kept() == ["watch-1"]


def more_than_one_message_holds_are_told_one_after_the_other(site: Site) -> None:
    names = [f"watch-{number:04}" for number in range(2 * MOST_REVOKED + 3)]
    site.revoke(*names)
    site.settle()
    assert site.kept() == names


CHECKS: tuple[Callable[[Site], None], ...] = (
    a_helper_knows_a_second_after_it_happens,
    names_are_told_when_their_time_has_come,
    a_helper_that_was_away_is_told_when_it_is_back,
    a_helper_that_lost_its_store_is_told_within_the_hour,
    a_word_of_somebody_else_does_not_count,
    more_than_one_message_holds_are_told_one_after_the_other,
)


@pytest.mark.parametrize("check", CHECKS)
def test_it_holds(check: Callable[[Site], None], tmp_path: Path) -> None:
    check(Site(tmp_path))


@pytest.mark.parametrize(
    ("check", "change"),
    [
        (CHECKS[0], ("self._line.tell_of_revocations(name, message)", "pass")),
        (CHECKS[1], (" if one.not_before_s <= now_s})", "})")),
        (CHECKS[2], ("(told.waits and happened_within(TELL_EVERY_S, told.told_s, now_s))", "told.waits")),
        (CHECKS[3], ("told.kept.clear()", "pass")),
        (
            CHECKS[4],
            (
                "verify(data, RevocationsKeptMsg, helper.key)",
                "decode(decode(data, SignedMsg).payload, RevocationsKeptMsg)",
            ),
        ),
        (CHECKS[5], ("[:MOST_REVOKED]\n", "[:MOST_REVOKED] if not told.kept else ()\n")),
    ],
    ids=["silent", "all names at once", "told once", "never anew", "believes anybody", "the first few only"],
)
def test_a_coordinator_that_does_not_is_caught(
    check: Callable[[Site], None], change: tuple[str, str], tmp_path: Path
) -> None:
    site = Site(tmp_path, broken_copy("aggregator.revocation_notices", change))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(site)


def test_what_is_known_is_not_told_again(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.revoke("watch-1")
    site.settle(looks=100)
    assert len(site.named("helper_knows_revocations")) == 1


def test_a_restarted_coordinator_tells_again_and_nothing_changes(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.revoke("watch-1")
    site.settle()
    site.begin()
    site.settle()
    assert len(site.named("helper_knows_revocations")) == 2
    assert len(site.desk.journal.named("devices_revoked")) == 1


def test_a_database_that_was_put_back_takes_nothing_back(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.revoke("watch-1")
    site.settle()
    with site.database.transaction() as connection:
        connection.execute(delete(schema.revoked_certificates))
    site.revoke("watch-2")
    site.begin()
    site.settle()
    assert site.kept() == ["watch-1", "watch-2"]


def test_a_word_about_what_was_not_told_is_refused(tmp_path: Path) -> None:
    site = Site(tmp_path)
    other = sign(RevocationsKeptMsg(tenant=TENANT, helper=HELPER, request_digest=bytes(32)), IDENTITY)
    with pytest.raises(ProtocolError, match="nobody has asked"):
        site.notices.hear(PINNED, other)
    assert not site.notices.hear(PINNED, b"rubbish")


def test_a_database_that_fails_is_told_and_asked_later(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.revoke("watch-1")
    with site.database.transaction() as connection:
        connection.exec_driver_sql("ALTER TABLE revoked_certificates RENAME TO away")
    site.settle()
    assert len(site.named("revocations_not_told")) == 1
    with site.database.transaction() as connection:
        connection.exec_driver_sql("ALTER TABLE away RENAME TO revoked_certificates")
    site.settle(looks=int(TELL_EVERY_S) + 1)
    assert site.kept() == ["watch-1"]
