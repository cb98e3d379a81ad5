"""The log's rows on both databases: a chain without gaps, whoever writes at the same time; pages; proofs from rows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection, delete, func, select, update

from aggregator.audit import log
from aggregator.audit.entries import (
    BEGINNING,
    LONGEST_NAME,
    LONGEST_TEXT,
    AuditEntry,
    decode_entry,
    encode_entry,
    entry_of,
)
from aggregator.audit.log import AuditError, AuditEvent, AuditLog, append, local_actor, log_size, stored_entries
from aggregator.audit.merkle import (
    CompactRange,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    root_of,
    verify_consistency,
    verify_inclusion,
)
from aggregator.audit.tree_nodes import stored_nodes
from aggregator.errors import DatabaseError
from aggregator.store import schema
from aggregator.store.database import Database
from tests.enrolments import broken_copy

NOW_S = 1_800_000_000.5


def event(number: int = 0, **changes: Any) -> AuditEvent:
    fields = {
        "at_s": NOW_S + number,
        "actor": "local:anna",
        "action": "task.created",
        "subject": "watch",
        "detail": {"number": number},
    }
    return AuditEvent(**{**fields, **changes})


def fill(database: Database, count: int, add: Callable[[Connection, AuditEvent], int] = append) -> None:
    with database.transaction() as connection:
        for number in range(count):
            assert add(connection, event(number)) == number


def is_a_chain(database: Database) -> int:
    """How many entries there are; each names the one before, and its row says what it says."""
    previous, count = BEGINNING, 0
    with database.reading() as connection:
        for count, row in enumerate(stored_entries(connection), 1):
            entry = decode_entry(row.entry)
            assert (entry.number, bytes.fromhex(entry.previous)) == (count - 1, previous)
            assert row[:5] == (entry.number, entry.at_s, entry.actor, entry.action, entry.subject)
            previous = leaf_hash(row.entry)
            assert row.leaf == previous
    return count


def test_entries_are_numbered_and_each_names_the_one_before(database: Database) -> None:
    assert AuditLog(database).size() == 0
    fill(database, 3)
    assert is_a_chain(database) == 3 == AuditLog(database).size()


def test_an_entry_goes_with_its_transaction(database: Database) -> None:
    fill(database, 1)

    def fails() -> None:
        with database.transaction() as connection:
            append(connection, event(7))
            raise KeyError("the action itself")

    with pytest.raises(KeyError):
        fails()
    fill_one = database.transaction()
    with fill_one as connection:
        assert append(connection, event(1)) == 1
    assert is_a_chain(database) == 2


def _write_at_once(database: Database, add: Callable[[Connection, AuditEvent], int], each: int = 12) -> None:
    """Four writers, all beginning together."""
    begin, failed = threading.Barrier(4), list[BaseException]()

    def write() -> None:
        try:
            begin.wait()
            for number in range(each):
                with database.transaction() as connection:
                    add(connection, event(number))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    assert is_a_chain(database) == 4 * each


def test_writers_at_the_same_time_queue_and_none_fails(database: Database) -> None:
    _write_at_once(database, append)


def test_a_log_without_its_queue_is_caught(postgresql_server: Any) -> None:
    """Two writers would give one number twice, and one of them, with what it did, would fail."""
    database = Database(postgresql_server.new_database())
    copy = broken_copy("aggregator.audit.log", ('== "postgresql"', '== "none"'))
    with pytest.raises(AssertionError, match="another process was quicker"):
        _write_at_once(database, copy.append, each=60)
    database.close()


def test_pages_come_newest_first_and_go_on_where_the_last_one_ended(database: Database) -> None:
    fill(database, 25)
    audit = AuditLog(database)
    first = audit.page(limit=10)
    assert [one.number for one in first] == list(range(24, 14, -1))
    second = audit.page(limit=20, before=first[-1].number)
    assert [one.number for one in second] == list(range(14, -1, -1))
    assert audit.page(before=0) == []


def test_a_page_may_be_of_one_actor_action_or_subject(database: Database) -> None:
    with database.transaction() as connection:
        append(connection, event(0))
        append(connection, event(1, actor="bert", action="task.paused"))
        append(connection, event(2, actor="bert", action="device.added", subject="watch-7"))
        append(connection, event(3, action="taskxpaused"))
    audit = AuditLog(database)

    def numbers(**chosen: str) -> list[int]:
        return [one.number for one in audit.page(**chosen)]

    assert numbers(actor="bert") == [2, 1]
    assert numbers(subject="watch-7") == [2]
    assert numbers(action="task.paused") == [1]
    assert numbers(action="task.") == [1, 0]
    assert numbers(action="task.", actor="local:anna") == [0]
    assert numbers(actor="nobody") == []
    assert audit.entry(2).subject == "watch-7"
    with pytest.raises(AuditError, match="no entry 4; it has 4"):
        audit.entry(4)


@pytest.mark.parametrize("limit", [0, -1, 1001])
def test_a_page_has_a_bounded_size(tmp_path: Any, limit: int) -> None:
    database = Database(f"sqlite:///{tmp_path}/a.db")
    with pytest.raises(AuditError, match="expected 1 to 1000"):
        AuditLog(database).page(limit=limit)
    database.close()


def test_roots_and_proofs_come_from_few_rows(database: Database) -> None:
    fill(database, 1100)
    with database.reading() as connection:
        assert connection.execute(select(func.count()).select_from(schema.audit_nodes)).scalar() == 4
        node, grown = stored_nodes(connection), CompactRange()
        roots = [grown.root()]
        leaves = [row.leaf for row in stored_entries(connection)]
        for leaf in leaves:
            grown.append(leaf)
            roots.append(grown.root())
        for size in (1, 255, 256, 257, 512, 1023, 1024, 1100):
            assert root_of(size, node) == roots[size]
            number = size * 2 // 3
            verify_inclusion(leaves[number], number, size, inclusion_proof(number, size, node), roots[size])
            path = consistency_proof(size, 1100, node)
            verify_consistency(size, 1100, path, (roots[size], roots[1100]))


def test_a_log_with_a_removed_entry_makes_no_proof_over_it(database: Database) -> None:
    fill(database, 9)
    with database.transaction() as connection:
        connection.execute(delete(schema.audit_entries).where(schema.audit_entries.c.number == 3))
    with database.reading() as connection, pytest.raises(DatabaseError, match="entries were removed"):
        root_of(9, stored_nodes(connection))


def test_a_part_of_the_log_can_be_read(database: Database) -> None:
    fill(database, 30)
    with database.reading() as connection:
        assert [row.number for row in stored_entries(connection, begin=7, end=12)] == [7, 8, 9, 10, 11]
        assert log_size(connection) == 30


def test_many_rows_are_read_in_several_turns(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(f"sqlite:///{tmp_path}/a.db")
    fill(database, 20)
    for at_once in (1, 3, 10, 20, 21):
        monkeypatch.setattr(log, "_AT_ONCE", at_once)
        with database.reading() as connection:
            assert [row.number for row in stored_entries(connection)] == list(range(20))
    database.close()


def test_an_entry_that_cannot_be_read_is_named(database: Database) -> None:
    fill(database, 1)
    with database.transaction() as connection:
        connection.execute(update(schema.audit_entries).values(entry=b'{"number":0}'))
    with pytest.raises(AuditError, match="expected an audit entry"):
        AuditLog(database).page()


texts = st.text(max_size=20)
details = st.dictionaries(
    texts,
    st.one_of(
        texts, st.integers(-(2**63) + 1, 2**63 - 1), st.booleans(), st.floats(allow_nan=False, allow_infinity=False)
    ),
)


@given(texts, texts, details, st.floats(0, 1e11))
def test_what_was_written_is_read_and_encodes_to_the_same_bytes(
    actor: str, subject: str, detail: dict[str, Any], at_s: float
) -> None:
    told = AuditEvent(at_s, actor, "a.b", subject, detail)
    entry = entry_of(told, number=5, previous=bytes(32))
    data = encode_entry(entry)
    assert decode_entry(data) == entry
    assert b"\n" not in data  # a line of an export


@given(st.binary(max_size=200))
def test_rubbish_is_no_entry(data: bytes) -> None:
    with pytest.raises(AuditError):
        decode_entry(data)


def _canonical(entry: AuditEntry) -> bytes:
    return encode_entry(entry)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data + b" ",
        lambda data: b" " + data,
        lambda data: data.replace(b":", b": ", 1),
        lambda data: data.replace(b'"action":"task.created",', b"").replace(b"}}", b'},"action":"task.created"}'),
        lambda data: data.replace(b'"number":3', b'"number":3.0'),
        lambda data: data.replace(b"{", b'{"more":1,', 1),
        lambda data: data.replace(b"task", b"t\\u0061sk"),
        lambda data: data.replace(b'"number":3', b'"number":3,"number":3'),
    ],
)
def test_an_entry_has_one_form_only(change: Callable[[bytes], bytes]) -> None:
    data = encode_entry(entry_of(event(3), number=3, previous=BEGINNING))
    decode_entry(data)
    assert change(data) != data
    with pytest.raises(AuditError):
        decode_entry(change(data))


def test_texts_are_cut_and_made_printable() -> None:
    told = event(actor="a" * 5000, subject="x\0y\nz\udcff", detail={"reason": "b" * 5000, "n\t": "c\x1b[0m"})
    entry = entry_of(told, number=0, previous=BEGINNING)
    assert len(entry.actor) == LONGEST_NAME
    assert entry.actor.endswith("a…")
    assert entry.subject == "x\ufffdy\ufffdz\ufffd"
    assert entry.detail == {"reason": "b" * (LONGEST_TEXT - 1) + "…", "n\ufffd": "c\ufffd[0m"}
    assert decode_entry(encode_entry(entry)) == entry


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**63, -(2**70)])
def test_a_number_that_json_does_not_have_is_refused(value: float) -> None:
    with pytest.raises(AuditError, match="audit detail x"):
        entry_of(event(detail={"x": value}), number=0, previous=BEGINNING)


def test_an_entry_that_is_too_long_is_refused() -> None:
    told = event(detail={f"name {number}": "z" * 999 for number in range(80)})
    with pytest.raises(AuditError, match="65536 are allowed"):
        encode_entry(entry_of(told, number=0, previous=BEGINNING))


def test_a_command_acts_as_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "anna")
    assert local_actor() == "local:anna"

    def nobody() -> str:
        raise OSError("no such user")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert local_actor() == "local:unknown"


def test_a_log_that_accepts_another_form_is_caught() -> None:
    copy = broken_copy("aggregator.audit.entries", ("if _ENCODER.encode(entry) != data:", "if False:"))
    data = encode_entry(entry_of(event(3), number=3, previous=BEGINNING)) + b" "
    copy.decode_entry(data)
    with pytest.raises(AuditError):
        decode_entry(data)
