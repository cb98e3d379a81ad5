"""What a helper keeps: a ledger that shows what was changed in it, bounded refusals, a register for each study."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, delete, insert, update

from aggregator.errors import ConflictError, DatabaseError
from aggregator.helper import answer_chain, schema
from aggregator.helper.answer_chain import BEGINNING, AnswerRecord, chain_fault, chained, sign_head
from aggregator.helper.answer_ledger import LedgerError
from aggregator.helper.helper_store import HelperDatabase, HelperStore, Refused
from tests.aggregator.helper.helper_desk import IDENTITY, Desk
from tests.enrolments import broken_copy
from tests.fl_protocol.secagg.rounds import device_key

PUBLIC = IDENTITY.public_key()
STRANGER = Ed25519PrivateKey.from_private_bytes(b"\x09" * 32)


def record(number: int, **changes: Any) -> AnswerRecord:
    digest = hashlib.sha256(str(number).encode()).digest()
    answer = hashlib.sha256(answer_of(number)).digest()
    fields = {"tenant": "clinic", "task": "watch", "round": number, "count": 9, "answered_s": 1e6 + number / 3}
    return AnswerRecord(
        **{**fields, "manifest_digest": digest, "included_digest": digest, "answer_digest": answer, **changes}
    )


def answer_of(number: int) -> bytes:
    return f"answer {number}".encode()


@pytest.fixture
def store(tmp_path: Path) -> HelperStore:
    made = HelperStore(HelperDatabase(tmp_path / "helper.db"), most_refusals=5)
    for number in range(1, 6):
        made.answers.add(record(number), answer_of(number), IDENTITY)
    return made


def test_a_ledger_is_as_it_was_written_and_stays_so_without_the_bytes(store: HelperStore) -> None:
    store.answers.check(PUBLIC)
    assert [one for one, _ in store.answers.all()] == [record(number) for number in range(1, 6)]
    assert store.answers.counts() == {"clinic": 5}
    assert store.answers.drop_bytes(1e6 + 1) == 2
    store.answers.check(PUBLIC)
    dropped, kept = (store.answers.find("clinic", "watch", number) for number in (2, 3))
    assert dropped is not None
    assert kept is not None
    assert (dropped.answer, kept.answer) == (None, answer_of(3))
    assert store.answers.find("clinic", "other", 3) is None


def test_one_round_has_one_answer_whatever_the_code_above_does(store: HelperStore) -> None:
    with pytest.raises(ConflictError):
        store.answers.add(record(3, included_digest=bytes(32)), b"another", IDENTITY)
    store.answers.check(PUBLIC)
    store.answers.add(record(3, task="other"), answer_of(3), IDENTITY)


A = schema.answers


def rewritten(connection: Connection, key: Ed25519PrivateKey) -> None:
    """What somebody with the code, and without the identity, would do: a chain of their own."""
    connection.execute(delete(A).where(A.c.number == 3))
    head = BEGINNING
    for row in connection.execute(A.select().order_by(A.c.number)).all():
        head = chained(head, AnswerRecord(*(getattr(row, name) for name in AnswerRecord.__dataclass_fields__)))
        connection.execute(update(A).where(A.c.number == row.number).values(chain=head))
    connection.execute(update(schema.heads).values(signature=sign_head(head, key)))


CHANGES: dict[str, Callable[[Connection], Any]] = {
    "a row edited": lambda c: c.execute(update(A).where(A.c.number == 2).values(count=2)),
    "the time of a row": lambda c: c.execute(update(A).where(A.c.number == 5).values(answered_s=0.0)),
    "a row removed": lambda c: c.execute(delete(A).where(A.c.number == 3)),
    "the first row removed": lambda c: c.execute(delete(A).where(A.c.number == 1)),
    "the last row removed": lambda c: c.execute(delete(A).where(A.c.number == 5)),
    "all rows removed": lambda c: c.execute(delete(A)),
    "the signature removed": lambda c: c.execute(delete(schema.heads)),
    "an answer's bytes exchanged": lambda c: c.execute(update(A).where(A.c.number == 4).values(answer=b"other")),
    "the digest of a row": lambda c: c.execute(update(A).where(A.c.number == 4).values(chain=bytes(32))),
    "a row added": lambda c: c.execute(
        insert(A).values(**{**vars(record(9)), "number": 6, "chain": bytes(32), "answer": None})
    ),
    "a whole new chain": lambda c: rewritten(c, STRANGER),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_the_ledger_is_noticed(store: HelperStore, change: str) -> None:
    with store.database.transaction() as connection:
        CHANGES[change](connection)
    with pytest.raises(LedgerError, match="was changed"):
        store.answers.check(PUBLIC)


def test_whoever_has_the_identity_can_write_what_they_like(store: HelperStore) -> None:
    """What the chain does not promise."""
    with store.database.transaction() as connection:
        rewritten(connection, IDENTITY)
    store.answers.check(PUBLIC)


def test_no_answer_is_given_on_top_of_removed_rows(store: HelperStore) -> None:
    """Or it would sign that they never were."""
    for name in ("the last row removed", "the signature removed"):
        with store.database.transaction() as connection:
            CHANGES[name](connection)
        with pytest.raises(LedgerError):
            store.answers.add(record(7), answer_of(7), IDENTITY)


def test_a_changed_answer_is_never_sent(store: HelperStore) -> None:
    with store.database.transaction() as connection:
        CHANGES["an answer's bytes exchanged"](connection)
    with pytest.raises(LedgerError, match="the answer to clinic/watch round 4 was changed"):
        store.answers.find("clinic", "watch", 4)


@pytest.mark.parametrize(
    ("change", "right", "wrong"),
    [
        ("a row removed", "hashlib.sha256(_ROW + previous + fields)", "hashlib.sha256(_ROW + fields)"),
        ("the last row removed", "identity.verify(signature, _HEAD + head)", "pass"),
        ("a row edited", "if chained(head, record) != digest:", "if False:"),
    ],
)
def test_a_chain_that_does_not_cover_it_is_caught(change: str, right: str, wrong: str) -> None:
    copy = broken_copy("aggregator.helper.answer_chain", (right, wrong))

    def fault(module: Any) -> str:
        head, rows = BEGINNING, []
        for number in range(1, 5):
            head = module.chained(head, record(number))
            rows.append((record(number), head))
        signature = module.sign_head(head, IDENTITY)
        assert module.chain_fault(rows, head_signature=signature, identity=PUBLIC) == ""
        if change == "a row edited":
            rows[1] = (record(2, count=1), rows[1][1])
        else:
            del rows[1 if change == "a row removed" else -1]
        found: str = module.chain_fault(rows, head_signature=signature, identity=PUBLIC)
        return found

    assert fault(answer_chain)
    assert fault(copy) == ""


def test_an_empty_ledger_is_in_order() -> None:
    assert chain_fault([], head_signature=None, identity=PUBLIC) == ""


def test_a_helper_with_a_changed_ledger_does_not_start(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.store.answers.add(record(1), answer_of(1), IDENTITY)
    with desk.store.database.transaction() as connection:
        connection.execute(delete(A))
    desk.close()
    with pytest.raises(LedgerError, match="covey-helper audit"):
        Desk(tmp_path)


def test_refusals_are_bounded_and_all_are_counted(store: HelperStore) -> None:
    for number in range(12):
        reason = "too_few" if number % 3 else "unsigned"
        store.refusals.add(Refused(1e6, "clinic", "watch", number, reason, "why"))
    assert [one.round for one in store.refusals.all()] == [7, 8, 9, 10, 11]
    assert store.refusals.counts() == {"too_few": 8, "unsigned": 4}


def test_devices_are_known_for_each_study_by_itself(store: HelperStore) -> None:
    raw = device_key("a").public_key().public_bytes_raw()
    store.devices.add_all("clinic", [(f"watch-{number}", raw) for number in range(12_000)])
    names = [*(f"watch-{number}" for number in range(0, 12_000, 2)), "watch-x"]
    assert len(store.devices.find("clinic", names)) == 6000
    assert store.devices.find("hospital", names) == {}
    other = device_key("b").public_key()
    store.devices.add_all("clinic", [("watch-1", other.public_bytes_raw())])
    assert store.devices.find("clinic", ["watch-1"]) == {"watch-1": other}
    assert store.devices.counts() == {"clinic": 12_000}
    assert store.devices.remove("clinic", "watch-1")
    assert not store.devices.remove("clinic", "watch-1")
    assert len(store.devices.all()) == 11_999


def test_a_store_of_a_newer_version_is_not_touched(tmp_path: Path) -> None:
    made = HelperDatabase(tmp_path / "helper.db")
    with made.transaction() as connection:
        connection.exec_driver_sql("PRAGMA user_version=3")
    made.close()
    with pytest.raises(DatabaseError, match="version 3"):
        HelperDatabase(tmp_path / "helper.db")
    assert (tmp_path / "helper.db").stat().st_mode & 0o077 == 0


def test_a_store_of_version_1_gets_what_it_lacks_and_keeps_what_it_has(tmp_path: Path) -> None:
    made = HelperDatabase(tmp_path / "helper.db")
    store = HelperStore(made)
    store.devices.add_all("clinic", [("watch-1", device_key("a").public_key().public_bytes_raw())])
    with made.transaction() as connection:
        connection.exec_driver_sql("DROP TABLE revoked_devices")
        connection.exec_driver_sql("PRAGMA user_version=1")
    made.close()
    again = HelperStore(HelperDatabase(tmp_path / "helper.db"))
    assert [name for _, name, _ in again.devices.all()] == ["watch-1"]
    assert again.revoked.add("clinic", ["watch-1"], now_s=1.0) == 1
    again.close()
