"""``covey-fleet``: help with examples, exit codes, and one sentence for everything a person can get wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from fl_protocol.adapters.software import software_version
from tests.firmware_sim.test_report import METRICS

ROOT = Path(__file__).resolve().parents[2]


def fleet(*arguments: str, cache_home: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    if cache_home is not None:
        environment["XDG_CACHE_HOME"] = str(cache_home)
    return subprocess.run(
        [sys.executable, "-m", "firmware_sim.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=120,
    )


def complaint_of(result: subprocess.CompletedProcess[str]) -> str:
    """The one sentence on standard error."""
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("covey-fleet: ")
    return line


def test_help_lists_the_commands_with_examples_and_exit_codes() -> None:
    result = fleet("--help")
    assert result.returncode == 0
    for text in (
        "Examples:",
        "covey-fleet demo",
        "covey-fleet demo --resume",
        "covey-fleet report",
        "Exit codes:",
        "130",
    ):
        assert text in result.stdout, text


@pytest.fixture(scope="module")
def help_of_the_demo() -> str:
    return fleet("demo", "--help").stdout


@pytest.mark.parametrize(
    "option",
    ["--held-out", "--rounds", "--epsilon", "--no-dp", "--engine", "--helpers", "--broker", "--out", "--resume"],
)
def test_every_option_of_the_demo_is_in_its_help(option: str, help_of_the_demo: str) -> None:
    assert re.search(rf"{option}\b", help_of_the_demo)


def test_the_version_is_the_softwares() -> None:
    assert fleet("--version").stdout == f"covey-fleet {software_version()}\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--held-out", "a,b"], "--held-out: expected numbers such as 9,10, got 'a,b'"),
        (["--held-out", ""], "--held-out: expected numbers such as 9,10, got ''"),
        (["--held-out", "9,11"], "held-out people: expected some but not all of 1 to 10, got (9, 11)"),
        (["--rounds", "0"], "rounds: expected at least 1, got 0"),
        (["--epsilon", "0"], "epsilon: expected a finite number above 0, got 0.0"),
        (["--epsilon", "nan"], "epsilon: expected a finite number above 0, got nan"),
        (["--helpers", "9"], "helpers: expected 1 to 8, got 9"),
        (["--epsilon", "1e-9"], "epsilon 1e-09 is too small for 60 rounds"),
    ],
)
def test_an_option_out_of_range_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, cache_home: Path, arguments: list[str], complaint: str
) -> None:
    result = fleet("demo", "--out", str(tmp_path / "run"), *arguments, cache_home=cache_home)
    assert result.returncode == 2
    assert complaint in complaint_of(result)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [["--rounds", "x"], ["--broker", "other"], ["--nonsense"]])
def test_what_is_no_option_is_a_usage_error(arguments: list[str]) -> None:
    result = fleet("demo", *arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_no_command_shows_the_help() -> None:
    result = fleet()
    assert result.returncode == 2
    assert "Examples:" in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("full", "is not empty; name a new folder, or use --resume"), ("file", "cannot be written (Not a directory)")],
)
def test_a_folder_that_cannot_take_a_run_is_one_sentence(
    tmp_path: Path, cache_home: Path, name: str, complaint: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "file").touch()
    result = fleet("demo", "--out", str(tmp_path / name), cache_home=cache_home)
    assert result.returncode == 1
    assert complaint in complaint_of(result)


@pytest.mark.parametrize("name", ["missing", "empty", "file"])
def test_a_folder_that_holds_no_run_cannot_be_resumed(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    result = fleet("demo", "--resume", str(tmp_path / name))
    assert result.returncode == 1
    assert "is not a run folder: run.json" in complaint_of(result)


def test_a_report_is_drawn_again(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_bytes(msgspec.json.encode(METRICS))
    result = fleet("report", str(tmp_path))
    assert result.returncode == 0
    assert result.stdout.strip() == str(tmp_path / "report.html")
    assert "81.4 % of 4321 windows" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "holds no run that can be reported: No such file or directory"),
        ("", "metrics.json cannot be read"),
        ("{}", "metrics.json cannot be read (Object missing required field `covey`)"),
        ("\xff\xfe", "metrics.json cannot be read"),
    ],
    ids=["none", "empty", "other JSON", "no text"],
)
def test_a_folder_without_metrics_cannot_be_reported(tmp_path: Path, text: str | None, complaint: str) -> None:
    if text is not None:
        (tmp_path / "metrics.json").write_bytes(text.encode("latin1"))
    result = fleet("report", str(tmp_path))
    assert result.returncode == 1
    assert complaint in complaint_of(result)
    assert not (tmp_path / "report.html").exists()
