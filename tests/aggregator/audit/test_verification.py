"""A log with one entry edited, dropped, reordered or added, one cut short, one written anew: each has its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import delete, insert, select, update

from aggregator.audit import export, verification
from aggregator.audit.checkpoint_rows import Checkpoints
from aggregator.audit.checkpoints import cosign, parse_note
from aggregator.audit.entries import AuditError, decode_entry, encode_entry
from aggregator.audit.entry_proofs import EntryProof, ProofRefusedError, check_entry, prove_entry
from aggregator.audit.export import export_log, verify_database, verify_file
from aggregator.audit.log import AuditEvent, append
from aggregator.audit.merkle import leaf_hash
from aggregator.audit.verification import LogKeys, Verified
from aggregator.store import schema
from aggregator.store.database import Database
from fl_protocol.errors import ConfigError
from fl_protocol.signing import public_key_hex
from tests.enrolments import broken_copy

KEY, HELPER, STRANGER = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2, 3))
ORIGIN, NOW_S = "covey/clinic", 1_800_000_000.0
KEYS = LogKeys(ORIGIN, KEY.public_key(), {"helper-a": HELPER.public_key()})
TABLE = schema.audit_entries
SIZES = (10, 20, 30)


class Log:
    """34 entries, with checkpoints after 10, 20 and 30; the helper has co-signed the first two."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = Database(f"sqlite:///{folder / 'log.db'}")
        self.checkpoints = Checkpoints(self.database, ORIGIN)
        for size in SIZES:
            self.add(10)
            note = self.checkpoints.make(KEY, now_s=NOW_S)
            assert note is not None
            if size < 30:
                self.checkpoints.add_cosignature(
                    size, "helper-a", cosign(note.checkpoint, "operator-a/helper-a", HELPER, at_s=NOW_S)
                )
        self.add(4)

    def add(self, count: int, **detail: Any) -> None:
        with self.database.transaction() as connection:
            for number in range(count):
                told = AuditEvent(NOW_S, "local:anna", "task.created", "watch", {"n": number, **detail})
                append(connection, told)

    def run(self, *statements: Any) -> None:
        with self.database.transaction() as connection:
            for one in statements:
                connection.execute(one)

    def row(self, number: int) -> dict[str, Any]:
        with self.database.reading() as connection:
            return dict(connection.execute(select(TABLE).where(TABLE.c.number == number)).mappings().one())

    def verify(self, keys: LogKeys = KEYS, **how: Any) -> Verified:
        return verify_database(self.database, keys, **how)

    def export(self) -> Path:
        path = self.folder / "log.jsonl"
        with path.open("wb") as file:
            export_log(self.database, ORIGIN, file)
        return path

    def edit(self, number: int, *, leaf: bool = False, **changes: Any) -> None:
        """Change an entry; its leaf hash as well, if whoever does it is careful."""
        entry = msgspec.structs.replace(decode_entry(self.row(number)["entry"]), **changes)
        data = encode_entry(entry)
        listed = {name: getattr(entry, name) for name in ("at_s", "actor", "action", "subject")}
        values = {"entry": data, **listed, **({"leaf": leaf_hash(data)} if leaf else {})}
        self.run(update(TABLE).where(TABLE.c.number == number).values(**values))

    def swap(self, first: int, second: int) -> None:
        rows = {first: self.row(second), second: self.row(first)}
        for number, row in rows.items():
            self.run(update(TABLE).where(TABLE.c.number == number).values(**{**row, "number": number}))

    def put_in(self, number: int) -> None:
        """One more entry, and all that come after it one further."""
        for one in range(33, number - 1, -1):
            self.run(update(TABLE).where(TABLE.c.number == one).values(number=one + 1))
        extra = {**self.row(number - 1), "number": number}
        entry = msgspec.structs.replace(decode_entry(extra["entry"]), number=number, previous=extra["leaf"].hex())
        data = encode_entry(entry)
        self.run(insert(TABLE).values(**{**extra, "entry": data, "leaf": leaf_hash(data)}))

    def write_anew(self) -> None:
        """With the key: another history of the same length, its checkpoints signed anew for all but the helper."""
        kept = self.checkpoints.newest()
        self.run(*(delete(table) for table in (TABLE, schema.audit_nodes, schema.audit_checkpoints)))
        self.add(30, rewritten=True)
        assert self.checkpoints.make(KEY, now_s=NOW_S) != kept


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path)


def test_a_log_that_nobody_touched_holds(log: Log) -> None:
    found = log.verify()
    assert found.fault is None
    assert (found.entries, found.checkpoints, found.covered, found.cosigned) == (34, 3, 30, {"helper-a": 20})
    assert verify_file(log.export(), KEYS) == found


def test_an_empty_log_holds(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'a.db'}")
    found = verify_database(database, KEYS)
    assert (found.entries, found.fault) == (0, None)


def _edited_at_the_end(log: Log) -> None:
    """Nothing comes after it."""
    _removed(log, 30, 31, 32, 33)
    log.edit(29, leaf=True, actor="bert")


def _removed(log: Log, *numbers: int) -> None:
    log.run(delete(TABLE).where(TABLE.c.number.in_(numbers)))


def _renumbered(log: Log) -> None:
    """Dropped, and the rows after it moved up."""
    _removed(log, 13)
    for number in range(14, 34):
        log.run(update(TABLE).where(TABLE.c.number == number).values(number=number - 1))


def _checkpoint(log: Log, size: int, **values: Any) -> None:
    log.run(update(schema.audit_checkpoints).where(schema.audit_checkpoints.c.size == size).values(**values))


def _signed_by_another(log: Log) -> None:
    note = parse_note(_note_text(log, 20))
    from aggregator.audit.checkpoints import sign_checkpoint  # noqa: PLC0415 - the only use

    _checkpoint(log, 20, note=sign_checkpoint(note.checkpoint, STRANGER).text)


def _note_text(log: Log, size: int) -> str:
    table = schema.audit_checkpoints.c
    with log.database.reading() as connection:
        return str(connection.execute(select(table.note).where(table.size == size)).scalar_one())


FAULTS: dict[str, tuple[Callable[[Log], None], str, int, str]] = {
    "edited": (lambda log: log.edit(12, actor="bert"), "edited", 12, "its hash is another one"),
    "edited with its hash": (lambda log: log.edit(12, leaf=True, actor="bert"), "edited", 12, "do not fit together"),
    "edited link": (lambda log: log.edit(12, leaf=True, previous="ab" * 32), "edited", 12, "do not fit together"),
    "edited first": (lambda log: log.edit(0, leaf=True, at_s=1.0), "edited", 0, "do not fit together"),
    "edited before a checkpoint": (lambda log: log.edit(9, leaf=True, at_s=1.0), "edited", 9, "does not follow"),
    "edited under the last checkpoint": (_edited_at_the_end, "forked", 30, "are not those"),
    "edited last": (lambda log: log.edit(33, at_s=1.0), "edited", 33, "its hash"),
    "edited listing": (
        lambda log: log.run(update(TABLE).where(TABLE.c.number == 12).values(actor="bert")),
        "edited",
        12,
        "listed as something else",
    ),
    "no entry": (
        lambda log: log.run(update(TABLE).where(TABLE.c.number == 12).values(entry=b"{}")),
        "edited",
        12,
        "cannot be read",
    ),
    "dropped": (lambda log: _removed(log, 13), "dropped", 13, "entry 13 is missing"),
    "several dropped": (lambda log: _removed(log, 13, 14, 15), "dropped", 13, "entries 13 to 15 are missing"),
    "dropped first": (lambda log: _removed(log, 0), "dropped", 0, "entry 0 is missing"),
    "dropped and renumbered": (_renumbered, "dropped", 13, "entry 13 is missing"),
    "reordered": (lambda log: log.swap(12, 13), "reordered", 12, "entry 13 comes before entry 12"),
    "reordered far": (lambda log: log.swap(3, 31), "reordered", 3, "entry 31 comes before entry 3"),
    "added": (lambda log: log.put_in(15), "added", 16, "a second entry 15"),
    "truncated": (lambda log: _removed(log, *range(25, 34)), "truncated", 25, "has 25 entries"),
    "truncated, co-signed": (
        lambda log: _removed(log, *range(15, 34)),
        "truncated",
        15,
        "helper-a co-signed covers 20",
    ),
    "forked": (Log.write_anew, "", 0, ""),  # below: who kept a checkpoint sees it
    "stranger's checkpoint": (_signed_by_another, "bad_checkpoint", 20, "not signed by this aggregator"),
    "no checkpoint": (lambda log: _checkpoint(log, 20, note="rubbish"), "bad_checkpoint", 10, "expected a checkpoint"),
    "no co-signature": (
        lambda log: _checkpoint(log, 20, cosignatures='{"helper-a":"x"}'),
        "bad_checkpoint",
        10,
        "expected",
    ),
}


@pytest.mark.parametrize("name", [name for name in FAULTS if name != "forked"])
def test_each_fault_has_its_name_and_its_place(log: Log, name: str) -> None:
    change, outcome, number, words = FAULTS[name]
    change(log)
    found = log.verify()
    assert found.fault is not None
    assert (found.fault.outcome, found.fault.number) == (outcome, number), found.fault
    assert words in found.fault.detail


IN_FILES = [
    name
    for name, (_, outcome, _, words) in FAULTS.items()
    if outcome
    and words not in {"its hash is another one", "its hash", "listed as something else"}
    and "no c" not in name
]


@pytest.mark.parametrize("name", IN_FILES)
def test_an_export_has_the_same_faults(log: Log, name: str) -> None:
    change, outcome, number, words = FAULTS[name]
    change(log)
    # As many entries are announced as the newest number says.
    found = verify_file(log.export(), KEYS)
    assert found.fault is not None
    assert (found.fault.outcome, found.fault.number) == (outcome, number), found.fault
    assert words in found.fault.detail


def test_a_history_written_anew_convicts_itself_where_a_checkpoint_was_kept(log: Log) -> None:
    kept = [parse_note(_note_text(log, 20))]
    log.write_anew()
    assert log.verify().fault is None  # it is whole in itself, and
    assert log.verify().cosigned == {"helper-a": 0}  # no helper has co-signed it
    for found in (log.verify(kept=kept), verify_file(log.export(), KEYS, kept=kept)):
        assert found.fault is not None
        assert (found.fault.outcome, found.fault.number) == ("forked", 20)


def test_a_co_signed_checkpoint_in_a_forked_log_names_the_helper(log: Log) -> None:
    with log.database.reading() as connection:
        (row,) = connection.execute(select(schema.audit_checkpoints).where(schema.audit_checkpoints.c.size == 20)).all()
    log.write_anew()
    log.run(insert(schema.audit_checkpoints).values(**row._mapping))
    found = log.verify()
    assert found.fault is not None
    assert (found.fault.outcome, found.fault.number) == ("forked", 20)
    assert "that helper-a co-signed" in found.fault.detail


def test_a_kept_checkpoint_beyond_the_log_shows_that_it_was_cut(log: Log) -> None:
    log.add(6)
    kept = log.checkpoints.make(KEY, now_s=NOW_S)
    assert kept is not None
    _removed(log, *range(34, 40))
    log.run(delete(schema.audit_checkpoints).where(schema.audit_checkpoints.c.size == 40))
    assert log.verify().fault is None  # without it nothing shows
    for found in (log.verify(kept=[kept]), verify_file(log.export(), KEYS, kept=[kept])):
        assert found.fault is not None
        assert found.fault.outcome == "truncated"


def test_another_log_or_key_is_told(log: Log) -> None:
    for keys, words in (
        (KEYS._replace(origin="covey/another"), "expected a checkpoint of covey/another"),
        (KEYS._replace(aggregator=STRANGER.public_key()), "not signed"),
    ):
        found = log.verify(keys)
        assert found.fault is not None
        assert found.fault.outcome == "bad_checkpoint"
        assert words in found.fault.detail
    with pytest.raises(AuditError, match="expected an export of covey/another"):
        verify_file(log.export(), KEYS._replace(origin="covey/another"))


def test_a_file_that_ends_early_is_truncated(log: Log) -> None:
    path = log.export()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]))
    found = verify_file(path, KEYS)
    assert found.fault is not None
    assert (found.fault.outcome, found.fault.detail) == ("truncated", "34 entries were announced, and 32 are there")


def test_a_file_whose_checkpoint_is_damaged_or_moved_is_told(log: Log) -> None:
    path = log.export()
    lines = path.read_bytes().splitlines(keepends=True)
    (place,) = [place for place, line in enumerate(lines) if line.startswith(b'{"checkpoint":"covey/clinic\\n20')]
    for changed in (
        [*lines[:place], b'{"checkpoint":"x"}\n', *lines[place + 1 :]],
        [*lines[:place], b'{"checkpoint":1}\n', *lines[place + 1 :]],
        [*lines[:place], lines[place + 1], lines[place], *lines[place + 2 :]],
    ):
        path.write_bytes(b"".join(changed))
        found = verify_file(path, KEYS)
        assert found.fault is not None
        assert found.fault.outcome == "bad_checkpoint"


@pytest.mark.parametrize("data", [b"", b"{}\n", b"\xff\n", b'{"covey_audit":2,"origin":"covey/clinic","entries":0}\n'])
def test_what_is_no_export_is_one_sentence(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(AuditError, match="expected an export"):
        verify_file(path, KEYS)
    with pytest.raises(ConfigError, match="cannot be read"):
        verify_file(tmp_path / "nowhere", KEYS)


def test_progress_is_told(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_TELL_EVERY", 10)
    for run in (
        lambda told: log.verify(progress=lambda *done: told.append(done)),
        lambda told: verify_file(log.export(), KEYS, progress=lambda *done: told.append(done)),
    ):
        told: list[tuple[int, int]] = []
        run(told)
        assert told == [(10, 34), (20, 34), (30, 34), (34, 34)]


# Proofs of single entries.


def test_an_entry_is_proved_without_the_log(log: Log) -> None:
    for number in (0, 9, 10, 19):
        data = msgspec.json.encode(prove_entry(log.database, number))
        found = check_entry(data, aggregator=None, helpers=[HELPER.public_key()])
        assert (found.entry.number, found.origin, found.size) == (number, ORIGIN, 20)
        assert found.cosigned_s == {public_key_hex(HELPER.public_key()): int(NOW_S)}
        check_entry(data, aggregator=KEY.public_key(), helpers=[HELPER.public_key()])


def test_the_newest_entries_are_proved_by_what_there_is(log: Log) -> None:
    data = msgspec.json.encode(prove_entry(log.database, 25))
    assert check_entry(data, aggregator=KEY.public_key(), helpers=[]).size == 30
    with pytest.raises(ProofRefusedError) as caught:
        check_entry(data, aggregator=None, helpers=[HELPER.public_key()])
    assert caught.value.outcome == "not_cosigned"
    with pytest.raises(AuditError, match="no checkpoint covers entry 33 yet"):
        prove_entry(log.database, 33)
    with pytest.raises(AuditError, match="no entry 99"):
        prove_entry(log.database, 99)
    with pytest.raises(AuditError, match="expected the key"):
        check_entry(data, aggregator=None, helpers=[])


def _forged_proofs(log: Log) -> dict[str, tuple[bytes, str]]:
    proof = prove_entry(log.database, 7)
    other = prove_entry(log.database, 8)
    replace = msgspec.structs.replace

    def made(**changes: Any) -> bytes:
        return msgspec.json.encode(replace(proof, **changes))

    entry = decode_entry(proof.entry.encode())
    edited = encode_entry(replace(entry, actor="bert")).decode()
    moved = encode_entry(replace(entry, number=8)).decode()
    fork = proof.checkpoint.replace("\n20\n", "\n21\n")
    return {
        "edited": (made(entry=edited), "edited"),
        "moved": (made(entry=moved), "edited"),
        "another's path": (made(path=other.path), "edited"),
        "short path": (made(path=proof.path[1:]), "edited"),
        "no path": (made(path=[]), "edited"),
        "another size": (made(checkpoint=fork), "bad_checkpoint"),
        "stranger's": (made(checkpoint=proof.checkpoint.split("\n\n")[0] + "\n\n— a/b AAAAAAAAAAAA\n"), "not_cosigned"),
        "no proof": (b"{}", "malformed"),
        "rubbish": (b"\xff", "malformed"),
        "another version": (made().replace(b'proof":1', b'proof":2'), "malformed"),
        "other spelling": (made(entry=proof.entry + " "), "malformed"),
        "no checkpoint": (made(checkpoint="x"), "malformed"),
    }


def test_a_forged_proof_proves_nothing(log: Log) -> None:
    for name, (data, outcome) in _forged_proofs(log).items():
        with pytest.raises(ProofRefusedError) as caught:
            check_entry(data, aggregator=None, helpers=[HELPER.public_key()])
        assert caught.value.outcome == outcome, name


def _believed(log: Log, module: Any) -> list[str]:
    found = []
    for name, (data, _) in _forged_proofs(log).items():
        try:
            module.check_entry(data, aggregator=None, helpers=[HELPER.public_key()])
        except AuditError:
            continue
        found.append(name)
    return found


@pytest.mark.parametrize(
    ("change", "believes"),
    [
        (
            ("verify_inclusion(leaf_hash(proof.entry.encode()), entry.number, tree.size, path, tree.root)", "pass"),
            "edited",
        ),
        (("    if missing:", "    if False:"), "stranger's"),
    ],
)
def test_a_check_that_believes_forged_proofs_is_caught(log: Log, change: tuple[str, str], believes: str) -> None:
    assert _believed(log, broken_copy("aggregator.audit.entry_proofs")) == []
    assert believes in _believed(log, broken_copy("aggregator.audit.entry_proofs", change))


def _overlooked(folder: Path, module: Any, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Faults that a verifier does not see, or calls by another name."""
    monkeypatch.setattr(export, "LogVerifier", module.LogVerifier)
    found = set()
    for place, (name, (change, outcome, _, _)) in enumerate(FAULTS.items()):
        if not outcome:
            continue
        (folder / str(place)).mkdir(exist_ok=True)
        log = Log(folder / str(place))
        change(log)
        fault = log.verify().fault
        if fault is None or fault.outcome != outcome:
            found.add(name)
        log.database.close()
    return found


@pytest.mark.parametrize(
    ("change", "overlooks"),
    [
        (("elif leaf is not None and leaf != found:", "elif False:"), "edited last"),
        (("elif entry.previous != self._previous:", "elif False:"), "edited link"),
        (("if tree.root != self._tree.root():", "if False:"), "edited under the last checkpoint"),
        (("elif entry.number < number:", "elif False:"), "added"),
        (("elif entry.number > number:", "elif False:"), "dropped"),
        (("if number == expected:", "if False:"), "reordered"),
        (("if tree.size > size:", "if False:"), "truncated"),
        (("verify_note(note, self._keys.aggregator)", "pass"), "stranger's checkpoint"),
        (("elif listed is not None and listed", "elif False and listed"), "edited listing"),
    ],
)
def test_a_verifier_that_overlooks_something_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str], overlooks: str
) -> None:
    assert overlooks in _overlooked(tmp_path, broken_copy("aggregator.audit.verification", change), monkeypatch)


def test_the_verifier_overlooks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _overlooked(tmp_path, verification, monkeypatch) == set()


def test_the_log_is_verified_in_postgresql_too(postgresql_server: Any) -> None:
    database = Database(postgresql_server.new_database())
    checkpoints = Checkpoints(database, ORIGIN)
    with database.transaction() as connection:
        for number in range(300):
            append(connection, AuditEvent(NOW_S, "desk", "device.added", f"watch-{number}", {}))
    note = checkpoints.make(KEY, now_s=NOW_S)
    assert note is not None
    checkpoints.add_cosignature(300, "helper-a", cosign(note.checkpoint, "operator-a/helper-a", HELPER, at_s=NOW_S))
    found = verify_database(database, KEYS)
    assert (found.entries, found.cosigned, found.fault) == (300, {"helper-a": 300}, None)
    proof: EntryProof = prove_entry(database, 255)
    check_entry(msgspec.json.encode(proof), aggregator=None, helpers=[HELPER.public_key()])
    database.close()
