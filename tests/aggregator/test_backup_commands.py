"""The commands `backup` and `restore`, from a configuration to a file and back."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from aggregator.adapters.local_blobs import LocalBlobs
from aggregator.cli_backup import register
from aggregator.command_line import make_app
from aggregator.errors import DatabaseError
from aggregator.store.database import Database
from aggregator.store.tasks import Tasks
from fl_protocol.errors import ConfigError
from tests.aggregator.store.rows import TASK, put_all_kinds

APP = make_app("covey-aggregator", "For a test.")
register(APP)


def write_config(folder: Path) -> Path:
    """A configuration of an SQLite file in this folder."""
    folder.mkdir()
    path = folder / "aggregator.toml"
    path.write_text(
        '[aggregator]\ntenant = "study"\ndatabase = "a.db"\nsigning_key = "a.key"\n'
        '[broker]\nhost = "localhost"\nport = 1883\n'
    )
    return path


def call(*arguments: str | Path) -> str:
    """What a command prints; its error is raised."""
    done = CliRunner().invoke(APP, [str(one) for one in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_service_is_backed_up_and_restored_by_two_commands(tmp_path: Path) -> None:
    here, there, path = write_config(tmp_path / "here"), write_config(tmp_path / "there"), tmp_path / "covey.backup"
    blobs = LocalBlobs(tmp_path / "here" / "a.db.blobs")
    database = Database(f"sqlite:///{tmp_path / 'here' / 'a.db'}")
    put_all_kinds(database, blobs)
    database.close()
    assert call("backup", "--config", here, "--out", path).startswith(f"{path}: 3 rows and 6 models")
    told = call("restore", path, "--config", there, "--after-round", "70").splitlines()
    assert told[0].startswith("restored 3 rows and 6 models")
    assert told[1] == "watch: rounds go on after 70; see covey-aggregator task show watch"
    restored = Database(f"sqlite:///{tmp_path / 'there' / 'a.db'}")
    assert Tasks(restored).get(TASK).state.number == 70
    restored.close()
    with pytest.raises(DatabaseError, match="only into an empty database"):
        call("restore", path, "--config", there)


def test_a_mistyped_configuration_does_not_back_up_an_empty_database(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match="there is no database"):
        call("backup", "--config", write_config(tmp_path / "here"), "--out", tmp_path / "covey.backup")
    assert not (tmp_path / "covey.backup").exists()


def test_a_backup_that_can_be_nowhere_is_one_sentence(tmp_path: Path) -> None:
    here = write_config(tmp_path / "here")
    database = Database(f"sqlite:///{tmp_path / 'here' / 'a.db'}")
    put_all_kinds(database, LocalBlobs(tmp_path / "here" / "a.db.blobs"))
    database.close()
    for out in (here / "a.backup", tmp_path / ("x" * 300), tmp_path / "nowhere" / "a.backup"):
        with pytest.raises(ConfigError, match=r"the backup .* cannot be written"):
            call("backup", "--config", here, "--out", out)
