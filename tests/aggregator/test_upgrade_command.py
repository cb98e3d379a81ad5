"""The command `upgrade`, and what the others say of a database of an earlier version."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from aggregator.adapters.local_blobs import LocalBlobs
from aggregator.backup_file import BackupFile
from aggregator.store.migrations import newest_revision
from tests.aggregator.old_databases import database_of
from tests.aggregator.operator_desk import Operator, one_sentence, operator

__all__ = ["operator"]


@pytest.fixture
def old(operator: Operator) -> Operator:
    """An operator whose database an earlier version left."""
    operator.says("init", "CONFIG")
    (operator.folder / "aggregator.db").unlink()
    blobs = LocalBlobs(operator.folder / "aggregator.db.blobs")
    database_of(f"sqlite:///{operator.folder / 'aggregator.db'}", "0005", blobs)
    return operator


def files(folder: Path) -> dict[str, str]:
    """Digest of every file by name."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def test_one_command_says_what_it_does_and_does_it(old: Operator) -> None:
    told = old.says("upgrade", "CONFIG").splitlines()
    assert told[0] == f"the database is of revision 0005, this software needs {newest_revision()}:"
    assert told[1].startswith("  0006  What an operator sees and decides")
    (backup,) = old.folder.glob("covey-20*-revision-0005.backup")
    assert told[-3].startswith(f"{backup}: 314 rows and 6 models and other large values as they were, ")
    assert told[-2] == "all 317 rows are there, and the audit log of 5 entries holds"
    assert told[-1] == f"the database is of revision {newest_revision()} now; start the service again"
    assert BackupFile(backup, revision="0005").manifest.pruned == []
    assert "database.upgraded" in old.says("audit", "list", "CONFIG")


def test_scripts_get_json_and_a_second_time_nothing_is_written(old: Operator) -> None:
    done = old.json("upgrade", "CONFIG", "--backup", "./before.backup")
    assert (done["from"], done["to"]) == ("0005", newest_revision())
    assert done["migrations"][0]["revision"] == "0006"
    assert done["backup_bytes"] == (old.folder / "before.backup").stat().st_size
    assert (done["rows"], done["audit_entries"], done["audit_fault"]) == (317, 5, None)
    before = files(old.folder)
    again = old.json("upgrade", "CONFIG", "--backup", "./before.backup")
    assert again == {"from": newest_revision(), "to": newest_revision(), "migrations": [], "backup": None}
    assert old.says("upgrade", "CONFIG").startswith(f"nothing to do: the database is of revision {newest_revision()}")
    assert files(old.folder) == before


def test_every_other_command_refuses_and_says_what_to_do(old: Operator) -> None:
    for words in (["status"], ["run"], ["backup", "--out", "./new.backup"], ["task", "list"], ["init"]):
        one_sentence(old.run(*words, "CONFIG"), 3, "of revision 0005", "covey-aggregator upgrade")
    assert not (old.folder / "new.backup").exists()


def test_a_failure_is_one_sentence(old: Operator) -> None:
    old.write("before.backup", "last week's")
    code, _, err = old.run("upgrade", "CONFIG", "--backup", "./before.backup")
    assert code == 3
    assert err.count("\n") == 1
    assert "nothing was upgraded, and the database is as it was, of revision 0005" in err
    assert "is not replaced" in err


def test_an_empty_database_gets_its_tables_and_a_missing_one_is_told(operator: Operator) -> None:
    one_sentence(operator.run("upgrade", "CONFIG"), 3, "there is no database")
    (operator.folder / "aggregator.db").touch()
    assert "was empty" in operator.says("upgrade", "CONFIG")
    assert operator.json("upgrade", "CONFIG")["migrations"] == []
    assert list(operator.folder.glob("*.backup")) == []


def test_the_help_has_examples(operator: Operator) -> None:
    assert "covey-aggregator upgrade --config aggregator.toml --backup" in operator.says("upgrade", "--help")
