"""Coordinator and helper about the audit log, on a virtual broker: no rewritten log is co-signed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import delete, update

from aggregator import cosigning
from aggregator.audit import checkpoint_rows
from aggregator.audit.checkpoint_rows import Checkpoints, best_note, stored_notes
from aggregator.audit.checkpoints import (
    Checkpoint,
    Note,
    NoteSignature,
    cosign,
    cosigned_s,
    cosigner_key_id,
    origin_of,
    sign_checkpoint,
    verify_note,
)
from aggregator.audit.log import AuditError, AuditEvent, append
from aggregator.cosigning import ASK_EVERY_S, CHECKPOINT_EVERY_S, Cosigning
from aggregator.helper_calls import HelperCalls
from aggregator.store import schema
from aggregator.store.database import Database
from firmware_sim.virtual_broker import VirtualTransport
from fl_protocol.errors import ProtocolError
from fl_protocol.log_messages import CosignatureMsg, CosignRefusal, CosignRefusalMsg
from fl_protocol.secagg.terms import HelperIdentity
from fl_protocol.signing import sign
from tests.aggregator.helper.helper_desk import HELPER, IDENTITY, NOW_S, TENANT, Desk
from tests.enrolments import broken_copy
from tests.fl_protocol.examples import AGGREGATOR_KEY

PINNED = HelperIdentity(HELPER, "operator-a", IDENTITY.public_key())
NAME = f"operator-a/{HELPER}"
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(32))


class Site:
    """A log in a database, its coordinator's part, and a helper with a store."""

    def __init__(self, folder: Path, module: Any = cosigning, rows: Any = checkpoint_rows) -> None:
        self.folder, self.module, self.rows = folder, module, rows
        self.desk = Desk(folder)
        self.notes: list[dict[str, Any]] = []
        self.database = Database(f"sqlite:///{folder / 'log.db'}")
        self.begin()

    def begin(self) -> None:
        """A coordinator that knows nothing but what is in the database."""
        transport = VirtualTransport(self.desk.broker)
        transport.open()

        def note(event: str, **fields: Any) -> None:
            self.notes.append({"event": event, **fields})

        self.calls = HelperCalls(
            tenant=TENANT,
            helpers={HELPER: PINNED},
            signing_key=AGGREGATOR_KEY,
            transport=transport,
            note=note,
            now_s=lambda: self.desk.now_s,
        )
        self.transport = transport
        self.checkpoints: Checkpoints = self.rows.Checkpoints(self.database, origin_of(TENANT))
        self.cosigning: Cosigning = self.module.Cosigning(
            tenant=TENANT,
            checkpoints=self.checkpoints,
            signing_key=AGGREGATOR_KEY,
            helpers={HELPER: PINNED},
            line=self.calls,
            note=note,
            now_s=lambda: self.desk.now_s,
        )
        self.calls.listen(self.cosigning.hear)
        self.calls.connected(None)

    def add(self, count: int) -> None:
        with self.database.transaction() as connection:
            for number in range(count):
                append(connection, AuditEvent(NOW_S, "aggregator", "round.closed", "watch", {"n": number}))

    def settle(self, *, round_closed: bool = False) -> None:
        """A few looks of the coordinator, and what the helper makes of them."""
        for _ in range(3):
            self.desk.now_s += 0.2
            self.cosigning.look_after(round_closed=round_closed)
            round_closed = False
            self.desk.settle()
            self.pump()

    def pump(self) -> None:
        while (event := self.transport.poll(0.0)) is not None:
            self.calls.take([event])

    def stored(self) -> list[Note]:
        with self.database.reading() as connection:
            return list(stored_notes(connection))

    def named(self, event: str) -> list[dict[str, Any]]:
        return [one for one in self.notes if one["event"] == event]

    def rewrite(self) -> None:
        """An operator with the key rewrites the log and its checkpoints: every digest fits."""
        with self.database.transaction() as connection:
            for table in (schema.audit_entries, schema.audit_nodes, schema.audit_checkpoints):
                connection.execute(delete(table))
            for number in range(9):
                append(connection, AuditEvent(NOW_S, "aggregator", "round.closed", "watch", {"another": number}))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def all_cosigned(site: Site) -> list[int]:
    """Sizes of the checkpoints, which are signed and co-signed each."""
    notes = site.stored()
    for note in notes:
        verify_note(note, AGGREGATOR_KEY.public_key())
        assert cosigned_s(note, IDENTITY.public_key(), name=NAME) is not None, note.checkpoint
    return [note.checkpoint.size for note in notes]


def test_each_round_brings_a_checkpoint_that_the_helper_co_signs(site: Site) -> None:
    for count in (3, 1, 300, 17):
        site.add(count)
        site.settle(round_closed=True)
    assert all_cosigned(site) == [3, 4, 304, 321]
    assert [one["size"] for one in site.named("checkpoint_cosigned")] == [3, 4, 304, 321]
    assert site.desk.store.logs.all()[0].size == 321


def test_without_rounds_new_entries_have_one_every_ten_minutes(site: Site) -> None:
    site.settle()
    assert site.stored() == []
    site.add(2)
    site.settle()
    assert site.stored() == []
    site.desk.now_s += CHECKPOINT_EVERY_S
    site.settle()
    assert all_cosigned(site) == [2]
    site.desk.now_s += CHECKPOINT_EVERY_S
    site.settle()
    assert all_cosigned(site) == [2]


def test_a_coordinator_that_was_restarted_finds_out_where_the_helper_is(site: Site) -> None:
    site.add(5)
    site.settle(round_closed=True)
    site.add(5)
    site.begin()
    site.settle(round_closed=True)
    assert all_cosigned(site) == [5, 10]
    assert not site.named("checkpoint_refused")


def test_a_helper_that_was_away_is_asked_again_for_the_newest_one(site: Site, tmp_path: Path) -> None:
    site.desk.transport.close()
    site.add(5)
    site.cosigning.look_after(round_closed=True)
    site.add(1)
    site.cosigning.look_after(round_closed=True)
    assert all(len(note.signatures) == 1 for note in site.stored())
    site.desk.transport.open()
    site.settle()
    assert len(site.stored()[-1].signatures) == 1
    site.desk.now_s += ASK_EVERY_S
    site.settle()
    assert [len(note.signatures) for note in site.stored()] == [1, 2]


def test_a_rewritten_log_is_not_co_signed(site: Site) -> None:
    site.add(5)
    site.settle(round_closed=True)
    site.rewrite()
    site.begin()
    site.settle(round_closed=True)
    (note,) = site.stored()
    assert (note.checkpoint.size, len(note.signatures)) == (9, 1)
    (told,) = site.named("checkpoint_refused")
    assert (told["helper"], told["reason"]) == (HELPER, "forked")


def test_a_log_that_was_put_back_is_not_co_signed(site: Site) -> None:
    site.add(20)
    site.settle(round_closed=True)
    site.rewrite()
    site.begin()
    site.settle(round_closed=True)
    assert [one["reason"] for one in site.named("checkpoint_refused")] == ["smaller"]
    site.desk.store.logs.give_up(TENANT, now_s=NOW_S)  # by the helper's operator, who was told why
    site.add(1)
    site.settle(round_closed=True)
    assert cosigned_s(site.stored()[-1], IDENTITY.public_key()) is not None


def _edit_first(database: Database) -> None:
    with database.transaction() as connection:
        connection.execute(
            update(schema.audit_entries).values(leaf=bytes(32)).where(schema.audit_entries.c.number == 1)
        )


def test_an_aggregator_signs_nothing_that_does_not_continue_what_it_has_signed(site: Site) -> None:
    site.add(5)
    site.settle(round_closed=True)
    _edit_first(site.database)
    site.add(1)
    site.settle(round_closed=True)
    assert all_cosigned(site) == [5]
    (told,) = site.named("checkpoint_failed")
    assert "was changed since its checkpoint of 5 entries" in told["reason"]
    site.settle(round_closed=True)
    assert len(site.named("checkpoint_failed")) == 1  # tried again later
    site.desk.now_s += ASK_EVERY_S
    site.settle(round_closed=True)
    assert len(site.named("checkpoint_failed")) == 2


def test_an_aggregator_that_signs_a_changed_log_is_caught(tmp_path: Path) -> None:
    rows = broken_copy(
        "aggregator.audit.checkpoint_rows",
        ("verify_consistency(last.size, size, path, (last.root, tree.root))", "pass"),
    )
    site = Site(tmp_path, rows=rows)
    site.add(5)
    site.settle(round_closed=True)
    _edit_first(site.database)
    site.add(1)
    site.settle(round_closed=True)
    assert len(site.stored()) == 2  # signed, and
    assert [one["reason"] for one in site.named("checkpoint_refused")] == ["forked"]  # it is the helper that says so


def test_entries_that_are_gone_are_told_and_end_nothing(site: Site) -> None:
    site.add(5)
    with site.database.transaction() as connection:
        connection.execute(delete(schema.audit_entries).where(schema.audit_entries.c.number == 2))
    site.settle(round_closed=True)
    (told,) = site.named("checkpoint_failed")
    assert "entries were removed" in told["reason"]
    site.add(300)  # and work goes on


# What a helper is said to have said.


def _answer(site: Site, key: Ed25519PrivateKey = IDENTITY, *, of: Checkpoint | None = None, **changes: Any) -> bytes:
    tree = of or site.stored()[-1].checkpoint
    one = cosign(tree, NAME, changes.pop("by", key), at_s=NOW_S)
    fields = {
        "tenant": TENANT,
        "helper": HELPER,
        "size": tree.size,
        "root": tree.root,
        "cosignature": one.signature,
    }
    return sign(CosignatureMsg(**{**fields, **changes}), key)


def _refusal(key: Ed25519PrivateKey, request: bytes) -> bytes:
    fields = {"request_digest": hashlib.sha256(request).digest(), "last_size": 0, "detail": "x"}
    return sign(CosignRefusalMsg(tenant=TENANT, helper=HELPER, reason=CosignRefusal.FORKED, **fields), key)


def _asked(tmp_path: Path, module: Any = cosigning) -> Site:
    """A helper that does not answer."""
    site = Site(tmp_path, module)
    site.desk.transport.close()
    site.add(5)
    site.cosigning.look_after(round_closed=True)
    return site


FORGED: dict[str, Callable[[Site], bytes]] = {
    "a stranger's message": lambda site: _answer(site, STRANGER),
    "a stranger's co-signature": lambda site: _answer(site, by=STRANGER),
    "of another root": lambda site: _answer(site, of=Checkpoint(origin_of(TENANT), 5, bytes(32))),
    "of another size": lambda site: _answer(site, of=Checkpoint(origin_of(TENANT), 6, bytes(32))),
    "about another study": lambda site: _answer(site, tenant="another"),
    "of another helper": lambda site: _answer(site, helper="helper-b"),
    "a refusal of another request": lambda site: _refusal(IDENTITY, b"another"),
    "a stranger's refusal": lambda site: _refusal(STRANGER, site.cosigning._asked[HELPER].requests[-1].data),
}


def _believed(site: Site, data: bytes) -> bool:
    """Whether anything came of a message."""
    try:
        site.cosigning.hear(PINNED, data)
    except ProtocolError:
        return False
    return len(site.stored()[-1].signatures) > 1 or bool(site.named("checkpoint_refused"))


@pytest.mark.parametrize("forged", FORGED)
def test_what_a_helper_has_not_said_is_not_believed(tmp_path: Path, forged: str) -> None:
    site = _asked(tmp_path)
    assert not _believed(site, FORGED[forged](site))
    assert _believed(site, _answer(site))


@pytest.mark.parametrize(
    ("change", "forged"),
    [
        (("verify(data, CosignRefusalMsg, helper.key)", "_read(data, CosignRefusalMsg)"), "a stranger's refusal"),
        (
            ("            verify_cosignature(found.tree, one, asked.identity.key)", "            pass"),
            "a stranger's co-signature",
        ),
        (("(answer.size, answer.root) == (tree.size, tree.root)", "True"), None),
        (("if (tenant, helper) != (self._tenant, asked.identity.name):", "if False:"), "about another study"),
        (
            ("hashlib.sha256(one.data).digest() == digest)", "True)"),
            "a refusal of another request",
        ),
    ],
)
def test_a_coordinator_that_believes_forgeries_is_caught(
    tmp_path: Path, change: tuple[str, str], forged: str | None
) -> None:
    extra = "def _read(data, kind):\n    return decode(decode(data, SignedMsg).payload, kind)\n\n\ndef _kind_of("
    module = broken_copy("aggregator.cosigning", change, ("def _kind_of(", extra))
    site = _asked(tmp_path, module)
    found = [name for name, make in FORGED.items() if _believed(site, make(site))]
    assert (forged in found) if forged else found == []  # that one is held by the signature itself as well


def check_answers_that_come_late_are_taken(folder: Path, module: Any = cosigning) -> None:
    """Rounds close faster than the helper answers: what it says of earlier checkpoints is as good, and no complaint."""
    site = Site(folder, module)
    for _ in range(4):
        site.add(3)
        site.desk.now_s += 0.2
        site.cosigning.look_after(round_closed=True)
    site.settle()
    site.settle()
    assert [one for one in site.notes if "refused" in one["event"]] == []
    # The first request is answered; those after it began where the helper no longer was, and the newest is asked again.
    assert [one["size"] for one in site.named("checkpoint_cosigned")] == [3, 12]
    (first, *_, newest) = site.stored()
    for note in (first, newest):
        verify_note(note, AGGREGATOR_KEY.public_key())
        assert cosigned_s(note, IDENTITY.public_key(), name=NAME) is not None


def test_answers_that_come_late_are_taken(tmp_path: Path) -> None:
    check_answers_that_come_late_are_taken(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        ("_REMEMBERED = 16", "_REMEMBERED = 1"),
        ("asked.begins_elsewhere = is_last", "asked.begins_elsewhere = False"),
        ("refusal.last_size != found.start:", "refusal.last_size != asked.start:"),
    ],
)
def test_a_coordinator_that_forgets_what_it_asked_is_caught(tmp_path: Path, change: tuple[str, str]) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check_answers_that_come_late_are_taken(tmp_path, broken_copy("aggregator.cosigning", change))


def test_an_answer_that_comes_twice_is_kept_once(tmp_path: Path) -> None:
    site = _asked(tmp_path)
    answer = _answer(site)
    site.add(2)
    site.desk.now_s += 0.2
    site.cosigning.look_after(round_closed=True)
    for _ in range(2):
        assert site.cosigning.hear(PINNED, answer)
    assert [one["size"] for one in site.named("checkpoint_cosigned")] == [5]


def test_co_signatures_are_kept_once_and_read_back(site: Site) -> None:
    site.add(2)
    note = site.checkpoints.make(AGGREGATOR_KEY, now_s=NOW_S)
    assert note is not None
    assert site.checkpoints.make(AGGREGATOR_KEY, now_s=NOW_S) is None
    first, later = (cosign(note.checkpoint, NAME, IDENTITY, at_s=at_s) for at_s in (5, 6))
    other = NoteSignature("operator-b/helper-b", cosigner_key_id("x", IDENTITY.public_key()), bytes(72))
    for helper, one in ((HELPER, first), (HELPER, later), ("helper-b", other)):
        site.checkpoints.add_cosignature(2, helper, one)
    site.checkpoints.add_cosignature(7, HELPER, first)  # of none that there is
    newest = site.checkpoints.newest()
    assert newest == note._replace(signatures=(*note.signatures, first, other))


def test_the_best_checkpoint_for_a_proof_is_the_most_co_signed_that_covers_the_entry(site: Site) -> None:
    for count, helpers in ((2, 2), (3, 1), (4, 1), (1, 0)):
        site.add(count)
        note = site.checkpoints.make(AGGREGATOR_KEY, now_s=NOW_S)
        assert note is not None
        for number in range(helpers):
            name = f"operator/{number}"
            site.checkpoints.add_cosignature(
                note.checkpoint.size, str(number), cosign(note.checkpoint, name, IDENTITY, at_s=1)
            )
    with site.database.reading() as connection:
        sizes = [best_note(connection, number) for number in (0, 1, 2, 8, 9, 10)]
    assert [one.checkpoint.size if one else None for one in sizes] == [2, 2, 9, 9, 10, None]


def test_a_checkpoint_that_cannot_be_read_is_told(site: Site) -> None:
    site.add(2)
    site.checkpoints.make(AGGREGATOR_KEY, now_s=NOW_S)
    with site.database.transaction() as connection:
        connection.execute(update(schema.audit_checkpoints).values(cosignatures="rubbish"))
    with pytest.raises(AuditError, match="cannot be read"):
        site.checkpoints.newest()


def test_many_checkpoints_are_read_in_several_turns(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with site.database.transaction() as connection:
        for size in range(1, 12):
            note = sign_checkpoint(Checkpoint(origin_of(TENANT), size, bytes(32)), AGGREGATOR_KEY)
            row = {"size": size, "root": bytes(32), "signed_s": 1.0, "note": note.text, "cosignatures": "{}"}
            connection.execute(schema.audit_checkpoints.insert(), row)
    for at_once in (1, 4, 11):
        monkeypatch.setattr(checkpoint_rows, "_AT_ONCE", at_once)
        assert [note.checkpoint.size for note in site.stored()] == list(range(1, 12))
