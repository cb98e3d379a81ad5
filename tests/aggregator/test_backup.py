"""A backup holds what was promised, comes back whole into either database, and takes no step twice."""

from __future__ import annotations

import io
import stat
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from sqlalchemy import Connection, func, insert, select, update

from aggregator import restore as restoring
from aggregator.adapters.local_blobs import LocalBlobs
from aggregator.backup import backup
from aggregator.backup_file import ERASED, decode_row, encode_row
from aggregator.errors import BlobError, DatabaseError
from aggregator.restore import ROUND_GAP, restore
from aggregator.store import schema
from aggregator.store.blobs import Blobs
from aggregator.store.database import Database
from aggregator.store.sweep import named_blobs
from fl_protocol.errors import ConfigError
from tests.aggregator.full_database import LATER_S, NOW_S, SECRET, blobs, empty, full, rows
from tests.aggregator.store.rows import TASK, model_row
from tests.enrolments import broken_copy

__all__ = ["blobs", "empty", "full"]


def test_nothing_of_an_open_round_is_in_a_backup(full: Database, blobs: Blobs, tmp_path: Path) -> None:
    path = tmp_path / "covey.backup"
    backup(full, blobs, path, now_s=NOW_S)
    raw = path.read_bytes()
    for hidden in (SECRET, msgspec.json.encode(SECRET)[1:-3], b"segment/", b"partial/"):
        assert hidden not in raw
    assert b"params/" in raw
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_backup_that_keeps_keys_is_caught(
    full: Database, blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(ERASED, "rounds")
    path = tmp_path / "covey.backup"
    backup(full, blobs, path, now_s=NOW_S)
    assert msgspec.json.encode(SECRET)[1:-3] in path.read_bytes()


def restored_after(full: Database, blobs: Blobs, empty: Database, tmp_path: Path, after: int | None = None) -> Database:
    backup(full, blobs, tmp_path / "covey.backup", now_s=NOW_S)
    restore(tmp_path / "covey.backup", empty, LocalBlobs(tmp_path / "restored"), now_s=LATER_S, after_round=after)
    return empty


def test_the_open_round_is_given_up_and_tasks_wait_for_their_operator(
    full: Database, blobs: Blobs, empty: Database, tmp_path: Path
) -> None:
    database = restored_after(full, blobs, empty, tmp_path)
    tasks = {row["task"]: row for row in rows(database, schema.tasks)}
    assert {name: row["phase"] for name, row in tasks.items()} == {"done": "finished", "new": "paused", TASK: "paused"}
    assert "restored from the backup of 2027-01-15" in tasks[TASK]["reason"]
    given_up = [row for row in rows(database, schema.rounds) if row["task"] == TASK]
    assert [(row["outcome"], row["secret"], row["closed_s"]) for row in given_up] == [("aborted", None, LATER_S)]
    assert "no backup has its key" in given_up[0]["reason"]
    assert rows(database, schema.partials) == rows(database, schema.leases) == rows(database, schema.workers) == []


def test_rounds_go_on_above_what_devices_may_have_seen(
    full: Database, blobs: Blobs, empty: Database, tmp_path: Path
) -> None:
    database = restored_after(full, blobs, empty, tmp_path)
    numbers = {row["task"]: row["number"] for row in rows(database, schema.tasks)}
    assert numbers == {"done": 9 + ROUND_GAP, "new": ROUND_GAP, TASK: 1 + ROUND_GAP}


def test_who_knows_the_newest_round_names_it(full: Database, blobs: Blobs, empty: Database, tmp_path: Path) -> None:
    database = restored_after(full, blobs, empty, tmp_path, after=5)
    numbers = {row["task"]: row["number"] for row in rows(database, schema.tasks)}
    assert numbers == {"done": 9, "new": 5, TASK: 5}  # never below the backup's own


def test_orders_that_waited_are_dropped_and_new_ones_get_numbers_of_their_own(
    full: Database, blobs: Blobs, empty: Database, tmp_path: Path
) -> None:
    database = restored_after(full, blobs, empty, tmp_path)
    done, dropped = rows(database, schema.orders)
    assert (done["name"], done["done_s"], done["outcome"]) == ("pause", 6.0, "done")
    assert (dropped["name"], dropped["done_s"]) == ("abort", LATER_S)
    assert dropped["outcome"].startswith("dropped when the backup of")
    with database.transaction() as connection:
        connection.execute(insert(schema.orders).values(task=TASK, name="resume", argument="", asked_s=1.0, outcome=""))
    assert len({row["id"] for row in rows(database, schema.orders)}) == 3


def restored_tokens(
    full: Database, blobs: Blobs, database: Database, tmp_path: Path, *, way: Callable[..., object] = restore
) -> list[tuple[float | None, float | None]]:
    """When each token was used and withdrawn, of one that was unused, one used and one withdrawn before the backup."""
    ends = [(None, None), (7.0, None), (None, 8.0)]
    columns = {"owner": "clinic", "task": "", "created_s": 1.0, "expires_s": 1e10}
    tokens = [
        {**columns, "digest": bytes([at]) * 32, "used_s": used_s, "withdrawn_s": withdrawn_s, "enrolment": None}
        for at, (used_s, withdrawn_s) in enumerate(ends)
    ]
    with full.transaction() as connection:
        connection.execute(insert(schema.enrolment_tokens), tokens)
    backup(full, blobs, tmp_path / "covey.backup", now_s=NOW_S)
    way(tmp_path / "covey.backup", database, LocalBlobs(tmp_path / "restored"), now_s=LATER_S)
    return [(row["used_s"], row["withdrawn_s"]) for row in rows(database, schema.enrolment_tokens)]


def test_a_token_that_may_have_been_used_since_lets_nobody_in(
    full: Database, blobs: Blobs, empty: Database, tmp_path: Path
) -> None:
    assert restored_tokens(full, blobs, empty, tmp_path) == [(None, LATER_S), (7.0, None), (None, 8.0)]


def test_a_restore_that_leaves_tokens_good_is_caught(
    full: Database, blobs: Blobs, empty: Database, tmp_path: Path
) -> None:
    broken = broken_copy("aggregator.restore", ("schema.enrolment_tokens: self._enrolment_token,", ""))
    found = restored_tokens(full, blobs, empty, tmp_path, way=broken.restore)
    assert found == [(None, None), (7.0, None), (None, 8.0)]


@pytest.mark.parametrize("broken", [False, True])
def test_the_brokers_list_of_revoked_certificates_is_written_anew_on_another_machine(
    full: Database, blobs: Blobs, empty: Database, tmp_path: Path, broken: bool
) -> None:
    """One that was revoked and enforced before the backup; the broken copy of `restore` takes it for enforced here."""
    row = {"serial": "ab12", "device": "w-1", "revoked_s": 5.0, "not_before_s": 1.0, "not_after_s": 1e12}
    with full.transaction() as connection:
        connection.execute(insert(schema.revoked_certificates).values(**row, enforced_s=6.0))
    backup(full, blobs, tmp_path / "covey.backup", now_s=NOW_S)
    way = broken_copy("aggregator.restore", ('{"enforced_s": None}', "{}")).restore if broken else restore
    way(tmp_path / "covey.backup", empty, LocalBlobs(tmp_path / "restored"), now_s=LATER_S)
    (found,) = rows(empty, schema.revoked_certificates)
    assert (found["serial"], found["enforced_s"] is None) == ("ab12", not broken)


def test_a_backup_shows_one_moment_while_the_service_goes_on(
    full: Database, blobs: Blobs, empty: Database, tmp_path: Path
) -> None:
    class ServiceGoesOn(LocalBlobs):
        """While large values are copied, the task prunes its first model, and gets one more."""

        def get(self, name: str) -> bytes:
            if name.startswith("bundle/"):
                gone = rows(full, schema.models)[0]
                with full.transaction() as connection:
                    columns = ("params", "optimiser", "control", "delta")
                    connection.execute(
                        update(schema.models).where(schema.models.c.version == 0).values(dict.fromkeys(columns))
                    )
                    connection.execute(insert(schema.models).values(model_row(2)))
                self.delete([gone[column] for column in columns])
            return super().get(name)

    before = rows(full, schema.models)
    done = backup(full, ServiceGoesOn(tmp_path / "blobs"), tmp_path / "covey.backup", now_s=NOW_S)
    assert done.blobs == 3  # bundle, validation set, version 1
    there = LocalBlobs(tmp_path / "restored")
    restore(tmp_path / "covey.backup", empty, there, now_s=LATER_S)
    after = rows(empty, schema.models)
    assert [row["version"] for row in after] == [row["version"] for row in before]
    assert after[0]["params"] is None  # pruned, as the service did
    assert there.get(after[1]["params"]) == b"version 1"


def test_a_large_value_that_is_lost_is_no_backup(full: Database, blobs: Blobs, tmp_path: Path) -> None:
    lost = rows(full, schema.models)[1]["params"]
    blobs.delete([lost])
    with pytest.raises(DatabaseError, match=f"would lack {lost}, which is in use"):
        backup(full, blobs, tmp_path / "covey.backup", now_s=NOW_S)
    assert [path.name for path in tmp_path.iterdir() if "backup" in path.name] == []


def test_a_file_that_exists_is_never_replaced(full: Database, blobs: Blobs, tmp_path: Path) -> None:
    (tmp_path / "covey.backup").write_bytes(b"last week's")
    with pytest.raises(ConfigError, match="is not replaced"):
        backup(full, blobs, tmp_path / "covey.backup", now_s=NOW_S)
    assert (tmp_path / "covey.backup").read_bytes() == b"last week's"
    with pytest.raises(ConfigError, match="cannot be written"):
        backup(full, blobs, tmp_path / "nowhere" / "covey.backup", now_s=NOW_S)


def test_a_backup_is_restored_only_into_an_empty_database(
    full: Database, blobs: Blobs, empty: Database, tmp_path: Path
) -> None:
    backup(full, blobs, tmp_path / "covey.backup", now_s=NOW_S)
    with empty.transaction() as connection:
        connection.execute(insert(schema.devices).values(device="watch-9", public_key=bytes(32), added_s=1.0))
    there = LocalBlobs(tmp_path / "restored")
    with pytest.raises(DatabaseError, match="only into an empty database, and this one has rows in its table devices"):
        restore(tmp_path / "covey.backup", empty, there, now_s=LATER_S)
    assert list(there.stored()) == []


def assert_empty(database: Database, blobs: Blobs) -> None:
    with database.reading() as connection:
        for table in schema.metadata.tables.values():
            assert connection.execute(select(func.count()).select_from(table)).scalar_one() == 0
    assert list(blobs.stored()) == []


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """A copy of a backup with changed files; None leaves one out."""
    other = path.with_suffix(".changed")
    with tarfile.open(path) as old, tarfile.open(other, "w") as new:
        for member in old:
            file = old.extractfile(member)
            assert file is not None
            data = change(member.name, file.read())
            if data is not None:
                member.size = len(data)
                new.addfile(member, io.BytesIO(data))
    return other


def flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.fixture
def made(full: Database, blobs: Blobs, tmp_path: Path) -> Path:
    path = tmp_path / "covey.backup"
    backup(full, blobs, path, now_s=NOW_S)
    return path


CHANGES: dict[str, tuple[Callable[[str, bytes], bytes | None], str]] = {
    "a row": (lambda name, data: flip(data) if name == "rows/devices.jsonl" else data, "is damaged: rows/devices"),
    "a model": (lambda name, data: flip(data) if name.startswith("blobs/params") else data, "is damaged: blobs/params"),
    "a lost model": (lambda name, data: None if name.startswith("blobs/params") else data, "is damaged: blobs/params"),
    "a lost table": (lambda name, data: None if name == "rows/updates.jsonl" else data, "is damaged: rows/updates"),
    "no manifest": (lambda name, data: None if name == "manifest.json" else data, "has no manifest"),
    "a bad manifest": (lambda name, data: b"{}" if name == "manifest.json" else data, "cannot read"),
    "another revision": (
        lambda name, data: data.replace(b'"revision":"', b'"revision":"9') if name == "manifest.json" else data,
        "restore it with the software of that revision",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_damaged_backup_is_refused_before_anything_is_written(
    made: Path, empty: Database, tmp_path: Path, what: str
) -> None:
    change, words = CHANGES[what]
    there = LocalBlobs(tmp_path / "restored")
    with pytest.raises(DatabaseError, match=words):
        restore(rewritten(made, change), empty, there, now_s=LATER_S)
    assert_empty(empty, there)


def test_a_backup_that_ends_early_or_is_none_is_refused(made: Path, tmp_path: Path) -> None:
    database, there = Database(f"sqlite:///{tmp_path / 'empty.db'}"), LocalBlobs(tmp_path / "restored")
    raw, torn = made.read_bytes(), tmp_path / "torn.backup"
    for length in (0, 10, 512, 600, len(raw) // 2, raw.rindex(b"manifest.json") + 700):
        torn.write_bytes(raw[:length])
        with pytest.raises(DatabaseError, match=r"damaged|not whole|cannot read"):
            restore(torn, database, there, now_s=LATER_S)
    with pytest.raises(DatabaseError, match="No such file"):
        restore(tmp_path / "nowhere", database, there, now_s=LATER_S)
    assert_empty(database, there)
    database.close()


def test_a_restore_that_fails_half_way_leaves_nothing(
    made: Path, empty: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, inserted = LocalBlobs(tmp_path / "restored"), []

    def fail_at_models(connection: Any, table: Any, rows: Any, settled: Any) -> int:
        inserted.append(table.name)
        if table is schema.models:
            raise BlobError("no more")
        return insert_rows(connection, table, rows, settled)

    insert_rows = restoring._insert
    monkeypatch.setattr(restoring, "_insert", fail_at_models)
    with pytest.raises(BlobError):
        restore(made, empty, there, now_s=LATER_S)
    assert len(inserted) > 1
    assert_empty(empty, there)
    monkeypatch.setattr(restoring, "_insert", insert_rows)
    restore(made, empty, there, now_s=LATER_S)


def check_an_answer_that_is_lost_costs_no_model(
    module: ModuleType, made: Path, database: Database, folder: Path
) -> None:
    """The commit gets through, and what would say so does not."""
    there, transaction = LocalBlobs(folder / "restored"), database.transaction

    @contextmanager
    def without_an_answer() -> Iterator[Connection]:
        with transaction() as connection:
            yield connection
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "transaction", without_an_answer)
        with pytest.raises(KeyboardInterrupt):
            module.restore(made, database, there, now_s=LATER_S)
    named = named_blobs(database)
    assert named
    assert all(there.get(name) for name in named)


def test_a_restore_whose_answer_is_lost_is_whole(made: Path, empty: Database, tmp_path: Path) -> None:
    check_an_answer_that_is_lost_costs_no_model(restoring, made, empty, tmp_path)


def test_a_restore_that_deletes_what_it_committed_is_caught(made: Path, empty: Database, tmp_path: Path) -> None:
    broken = broken_copy(
        restoring.__name__,
        ("                _refuse_rows(connection)\n            blobs", "                pass\n            blobs"),
    )
    with pytest.raises(BlobError):
        check_an_answer_that_is_lost_costs_no_model(broken, made, empty, tmp_path)


def test_progress_is_told(full: Database, blobs: Blobs, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    done = backup(
        full, blobs, tmp_path / "covey.backup", now_s=NOW_S, progress=lambda count, all_: told.append((count, all_))
    )
    assert told == [(count, done.blobs) for count in range(done.blobs + 1)]


@pytest.mark.parametrize("line", [b"", b"[]", b'{"nosuch":1}', b'{"public_key":"no base64"}', b"\xff", b'{"device":'])
def test_what_is_no_row_is_one_sentence(line: bytes) -> None:
    with pytest.raises(DatabaseError, match="no row of the table devices"):
        decode_row(schema.devices, line)


def test_a_row_comes_back_as_it_was() -> None:
    row = {"device": "ä\n\0", "public_key": bytes(range(256)), "added_s": 0.1 + 0.2}
    assert decode_row(schema.devices, encode_row(row)) == row
